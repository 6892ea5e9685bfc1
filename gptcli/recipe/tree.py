"""YAML 1.2 text as a tree of values that know where they were written.

ruamel.yaml reads the events; the tree is built here, because a recipe needs what a constructor throws away (the line of
every key) and must not do what one does (tags, duplicate keys, aliases that grow without bound). Scalars follow the
core schema: `3e-4` is a number, `no` is a word. Reading stops at 5000 values, 32 levels and 256 KiB,
which keeps the slowest hostile file under a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from gptcli.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_VALUES = 5_000
MAX_DEPTH = 32
MAX_DIGITS = 300

Scalar: TypeAlias = str | int | float | bool | None

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}")


@dataclass(frozen=True)
class Node:
    """A value as written.

    Attributes:
        value: a scalar, a list of nodes, or nodes by key.
        where: "file:line" or "override KEY=VALUE".
        base: the folder to which a path in it is relative.
        text: a scalar's text as written.
        sole: a list that was written as one item.
    """

    value: dict[str, Node] | list[Node] | Scalar
    where: str
    base: Path
    text: str = ""
    sole: bool = False


def plain(node: Node) -> Any:
    """The values of a tree, without the places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def scalar(text: str) -> Scalar:
    """What an unquoted text means in YAML 1.2's core schema.

    Raises:
        ValueError: a number of more than 300 digits.
    """
    if _NULL.fullmatch(text):
        return None
    if boolean := _BOOL.fullmatch(text):
        return boolean.group(1) is not None
    if len(text) > MAX_DIGITS and _FLOAT.fullmatch(text):
        raise ValueError(f"a number of {len(text)} digits")
    if _INT.fullmatch(text):
        return int(text)
    if re.fullmatch(r"0o[0-7]+", text) and len(text) < MAX_DIGITS:
        return int(text[2:], 8)
    if re.fullmatch(r"0x[0-9a-fA-F]+", text) and len(text) < MAX_DIGITS:
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float("nan") if infinite.group(3) else float(f"{infinite.group(1)}inf")
    return text


def read_text(path: Path, label: str) -> str:
    """The text of a recipe file, or a `RecipeError` that says why it is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=label) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"is larger than {MAX_BYTES // 1024} KiB, which no recipe is",
            where=label,
            remedy="is this the data? A recipe names data by its path: data: {train: {path: FILE}}",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"is not UTF-8 text (byte {error.start})", where=f"{label}:{line}", remedy="save the recipe as UTF-8"
        ) from None


def parse(text: str, label: str, base: Path, environment: Mapping[str, str] | None = None) -> Node:
    """The tree of a recipe's text; `${VAR}` is replaced when an environment is given.

    Raises:
        RecipeError: not YAML, or YAML that a recipe may not hold.
    """
    reader = _Reader(label, base, environment)
    return reader.document(text)


def parse_inline(text: str, where: str, base: Path) -> Node:
    """The tree of the value of an override: a flow collection or a quoted text, else the text itself as a scalar."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{", '"', "'"):
        node = _Reader(where, base, None, lines=False).document(stripped)
        return node
    _check_unicode(stripped, where)
    try:
        return Node(scalar(stripped), where, base, stripped)
    except ValueError as error:
        raise RecipeError(str(error), where=where) from None


def _check_unicode(text: str, where: str) -> None:
    """Refuse half a character ("\\ud800", or bytes of a command line that are no UTF-8): no file could hold it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecipeError("is not Unicode text: it holds half of a surrogate pair", where=where)


class _Reader:
    """One pass over the events of one text; holds the anchors and counts the values."""

    def __init__(self, label: str, base: Path, environment: Mapping[str, str] | None, *, lines: bool = True) -> None:
        self.label = label
        self.base = base
        self.environment = environment
        self.lines = lines
        self.values = 0
        self.anchors: dict[str, tuple[Node, int]] = {}

    def at(self, mark: Any) -> str:
        return f"{self.label}:{mark.line + 1}" if self.lines else self.label

    def document(self, text: str) -> Node:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        try:
            return self._document(iter(YAML(typ="safe", pure=True).parse(text)))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise RecipeError(*_explain(error.problem or str(error), text, mark), where=self.at(mark)) from None
        except YAMLError as error:  # a character that YAML does not know
            line = text.count("\n", 0, getattr(error, "position", 0)) + 1
            where = f"{self.label}:{line}" if self.lines else self.label
            raise RecipeError(f"is not valid YAML: {str(error).splitlines()[0]}", where=where) from None

    def _document(self, events: Iterator[Any]) -> Node:
        root: Node | None = None
        for event in events:
            kind = type(event).__name__
            if kind == "DocumentStartEvent":
                if root is not None:
                    raise RecipeError(
                        "a second document begins here", where=self.at(event.start_mark), remedy="remove the line ---"
                    )
                root = self._node(next(events), events, 0)
        if root is None or (root.value is None and not root.text):
            raise RecipeError("is empty", where=self.label, remedy="`gptcli recipes show quickstart` shows a recipe")
        return root

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        self._count(1, event)
        kind = type(event).__name__
        where = self.at(event.start_mark)
        if kind == "AliasEvent":
            if event.anchor not in self.anchors:
                raise RecipeError(
                    f"*{event.anchor} has no anchor &{event.anchor} before it",
                    where=where,
                    remedy="a text that begins with * has to stand in quotes",
                )
            node, size = self.anchors[event.anchor]
            self._count(size, event)
            return node
        if event.tag not in (None, "!"):
            raise RecipeError(
                f"the tag {event.tag} is not read", where=where, remedy="write the plain value, without !"
            )
        if depth > MAX_DEPTH:
            raise RecipeError(f"is nested deeper than {MAX_DEPTH} levels", where=where)
        before, anchor = self.values, event.anchor
        if kind == "ScalarEvent":
            node = self._scalar(event, where)
        elif kind == "SequenceStartEvent":
            items = []
            while type(event := next(events)).__name__ != "SequenceEndEvent":
                items.append(self._node(event, events, depth + 1))
            node = Node(items, where, self.base)
        else:
            node = Node(self._mapping(events, depth), where, self.base)
        if anchor:
            self.anchors[anchor] = (node, self.values - before)
        return node

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while type(event := next(events)).__name__ != "MappingEndEvent":
            where = self.at(event.start_mark)
            if type(event).__name__ != "ScalarEvent" or event.tag not in (None, "!"):
                raise RecipeError("a key has to be a plain word", where=where)
            key = event.value
            if key == "<<":
                raise RecipeError("<< is not part of YAML 1.2", where=where, remedy="repeat the keys, or use extends:")
            _check_unicode(key, where)
            if key in found:
                raise RecipeError(
                    f"the key {key} stands here twice, first at {found[key].where}",
                    where=where,
                    remedy="keep one of them",
                )
            child = self._node(next(events), events, depth + 1)
            found[key] = Node(child.value, where, child.base, child.text)
        return found

    def _scalar(self, event: Any, where: str) -> Node:
        text = event.value if self.environment is None else self._substituted(event.value, self.environment, where)
        _check_unicode(text, where)
        if event.style is not None and event.style != "":
            return Node(text, where, self.base, text)
        try:
            return Node(scalar(text), where, self.base, text)
        except ValueError as error:
            raise RecipeError(str(error), where=where) from None

    def _substituted(self, text: str, environment: Mapping[str, str], where: str) -> str:
        def value(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(3)
            if name is None:
                return "${"
            if default is not None:
                return environment.get(name) or default
            if name not in environment:
                raise RecipeError(
                    f"the environment variable {name} is not set",
                    where=where,
                    remedy=f"set it, or give a default: ${{{name}:-default}}; a literal ${{ is written $${{",
                )
            return environment[name]

        return _VARIABLE.sub(value, text)

    def _count(self, values: int, event: Any) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise RecipeError(f"holds more than {MAX_VALUES} values, aliases counted", where=self.at(event.start_mark))


def _explain(problem: str, text: str, mark: Any) -> tuple[str]:
    character = text[mark.index : mark.index + 1]
    if character == "\t":
        return ("a tab where YAML wants spaces",)
    if character in ("@", "`", "%") and "cannot start any token" in problem:
        return (f"a text that begins with {character} has to stand in quotes",)
    if character == ":" or "mapping values are not allowed" in problem:
        return ("is not valid YAML: a colon where none is expected (put the text in quotes, or check the indentation)",)
    return (f"is not valid YAML: {problem}",)


def dump_yaml(value: Mapping[str, Any]) -> str:
    """A recipe's values as YAML that `load_recipe` reads back: keys in the order given, `${` escaped."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 1_000_000
    yaml.sort_base_mapping_type_on_output = False
    yaml.representer.ignore_aliases = lambda _: True
    stream = StringIO()
    yaml.dump(_escaped(value), stream)
    return stream.getvalue()


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, Mapping):
        return {str(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else value
