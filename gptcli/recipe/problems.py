"""What is wrong with a recipe, in the words of a recipe: unknown keys with the nearest valid one, wrong types.

pydantic's messages are made for programmers; these name the key, what was given, what is expected, and the line. At
most eight lines, whatever the number of problems.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from gptcli.errors import RecipeError
from gptcli.recipe.tree import Node

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

MAX_LINES = 8

EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
}
BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; a remedy that has to be looked for is only where it is shown."""

    where: str
    what: str
    remedy: str | Callable[[], str | None] | None = None

    def help(self) -> str | None:
        """The remedy's text."""
        return self.remedy() if callable(self.remedy) else self.remedy


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one `RecipeError` for all problems, of at most eight lines; return if there is none."""
    if not problems:
        return
    first, *others = problems
    lines = (first.help() or "").splitlines()
    room = MAX_LINES - 1 - len(lines)
    shown = others if len(others) <= room else others[: room - 1]
    for other in shown:
        remedy = other.help()
        lines.append(f"{other.where}: {other.what}{f' ({remedy})' if remedy else ''}")
    if len(shown) < len(others):
        lines.append(f"and {len(others) - len(shown)} more")
    raise RecipeError(first.what, where=first.where, remedy="\n".join(lines) or None)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type holds."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in sections_of(inner)]


def fields_of(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The types of the keys of these models, by the name that a recipe uses."""
    return {field.alias or name: field.annotation for model in models for name, field in model.model_fields.items()}


def unknown_keys(layer: Node, models: Sequence[type[BaseModel]], root: type[BaseModel]) -> list[Problem]:
    """The keys that the schema does not have."""
    return _unknown(layer, models, root, "")


def _unknown(node: Node, models: Sequence[type[BaseModel]], root: type[BaseModel], path: str) -> list[Problem]:
    if isinstance(node.value, list):
        return [problem for item in node.value for problem in _unknown(item, models, root, path)]
    if not isinstance(node.value, dict) or not models:
        return []
    known = fields_of(models)
    problems = []
    for key, child in node.value.items():
        if key not in known:
            nearest = functools.partial(nearest_key, key, path, known, root)
            problems.append(Problem(child.where, f"unknown key {_name(path, key)}", nearest))
        else:
            problems += _unknown(child, sections_of(known[key]), root, _name(path, key))
    return problems


def _name(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def nearest_key(key: str, path: str, known: dict[str, Any], root: type[BaseModel]) -> str:
    """Where an unknown key may have been meant to stand."""
    homes = {home: place for home, place in _places(root)}
    if key in homes:
        home = homes[key]
        return f"{key} belongs under {home}:" if home else f"{key} belongs at the top level, not under {path}:"
    if close := _closest(key, list(known)):
        return f"did you mean {close}?"
    if close := _closest(key, list(homes)):
        return f"did you mean {_name(homes[close], close)}?"
    names = ", ".join(known)
    return f"valid keys here: {names}" if len(names) < 200 else "`gptcli recipes schema` lists every key"


def _closest(word: str, names: list[str]) -> str | None:
    import difflib

    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), list(folded), n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def _places(root: type[BaseModel]) -> list[tuple[str, str]]:
    """Every key of the schema with its section; the shallowest place of a name comes last (and wins in a dict)."""
    found: list[tuple[str, str]] = []
    level: list[tuple[str, type[BaseModel]]] = [("", root)]
    while level:
        below = []
        for path, model in level:
            for name, annotation in fields_of([model]).items():
                found.append((name, path))
                below += [(_name(path, name), inner) for inner in sections_of(annotation)]
        level = below
    return list(reversed(found))


def from_validation(error: ValidationError, root: Node, label: str, model: type[BaseModel]) -> list[Problem]:
    """The problems that pydantic found, each with its place in the tree."""
    problems: list[Problem] = []
    for found in error.errors(include_url=False):
        location = [part for part in found["loc"] if not str(part).startswith("<")]
        node, name = find(root, location)
        where = node.where if node is not None else label
        if found["type"] == "extra_forbidden":
            problems.append(Problem(where, f"unknown key {name}", None))
            continue
        if found["type"] == "value_error" and node is not None:
            where = _place_of(str(found["ctx"]["error"]), node) or where
        if found["type"] == "missing":
            section = find(root, location[:-1])[0]
            where = section.where if section is not None and len(location) > 1 else label
        what, remedy = _words(found, name)
        problems.append(Problem(where, what, remedy))
    return list(dict.fromkeys(problems))


def find(root: Node, location: Sequence[str | int]) -> tuple[Node | None, str]:
    """The node at a location (None: not written) and the name of the key as the recipe would say it."""
    node: Node | None = root
    name = ""
    for part in location:
        value = node.value if node is not None else None
        sole = node is not None and node.sole
        if isinstance(value, list) and str(part).isdigit():
            node = value[int(part)] if int(part) < len(value) else None
            name = name if sole else f"{name}.{part}"
            continue
        if isinstance(value, list):
            value = value[0].value if sole else None
        node = value.get(str(part)) if isinstance(value, dict) else None
        name = f"{name}.{part}" if name else str(part)
    return node, name


def _place_of(message: str, section: Node) -> str | None:
    """The line of the last written key that a message about a section names."""
    if not isinstance(section.value, dict):
        return None
    words = set(re.findall(r"\w+", message))
    named = [child.where for key, child in section.value.items() if key in words]
    return named[-1] if named else None


def _words(found: Any, name: str) -> tuple[str, str | None]:
    kind, context = found["type"], found.get("ctx", {})
    given = _given(found["input"])
    if kind == "missing":
        return f"{name} is missing", None
    if kind == "value_error":
        message = str(context["error"])
        what, semicolon, remedy = message.partition("; ")
        subject = f"{name}: " if name else ""
        if message.startswith("expected "):
            return f"{subject}{what}, got {given}", remedy or None
        return f"{subject}{what}", remedy if semicolon else None
    if kind == "literal_error":
        options = [option.strip("'") for option in re.findall(r"'[^']*'|\w+", context["expected"]) if option != "or"]
        close = _closest(found["input"], options) if isinstance(found["input"], str) else None
        return f"{name}: expected {_any_of(options)}, got {given}", f"did you mean {close}?" if close else None
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"{name}: expected {words} {context[bound]:g}, got {given}", None
    if kind == "string_too_short":
        return f"{name}: expected a text, got an empty one", None
    if kind in ("too_short", "too_long"):
        wanted = context.get("min_length", context.get("max_length"))
        return f"{name}: expected {wanted} items, got {context['actual_length']}", None
    expected = EXPECTED.get(kind)
    if expected == "a text" and isinstance(found["input"], int | float):
        return f"{name}: expected a text, got {given}", f'put it in quotes: "{given}"'
    return f"{name}: expected {expected}, got {given}" if expected else f"{name}: {found['msg']}, got {given}", None


def _any_of(options: list[str]) -> str:
    return " or ".join([", ".join(options[:-1]), options[-1]]) if len(options) > 1 else options[0]


def _given(value: Any) -> str:
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
