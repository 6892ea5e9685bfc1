"""What this release does not have: keys and values of the contract that are refused with "not available yet".

The table is plain data; the work that brings a feature deletes its rows. A value that equals the default is never
refused, and a command looks only at the sections it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError
from gptcli.recipe import problems
from gptcli.recipe.measures import check_best_metric
from gptcli.recipe.problems import Problem
from gptcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class Row:
    """A key and its values that exist already; `feature` names what is missing when no value does.

    Attributes:
        key: dotted; `*` is any item of a list.
        allowed: the values that are available (lists: each item has to be one of them).
        feature: what the key is for, in the message.
        commands: the row is for these alone; without any: for all.
    """

    key: str
    allowed: tuple[Any, ...] = ()
    feature: str = ""
    commands: tuple[str, ...] = ()


TABLE: tuple[Row, ...] = (
    Row("eval.data.*.tokens", feature="evaluation on tokens made before"),
    Row("data.format", ("text", "prompt", "chat", "preference")),
    Row("data.format", ("text", "prompt", "chat"), commands=("tokenize", "pretrain", "eval")),
    Row("model.rope_scaling", feature="a longer context by rope_scaling"),
    Row("train.objective", ("causal", "fim")),
    Row("train.profile", feature="a profile"),
)

_TRAINING = ("tokenizer", "data", "model", "train", "launch", "tokenize", "tracking", "generate")
SECTIONS: dict[str, tuple[str, ...]] = {
    "tokenize": ("tokenizer", "data", "tokenize"),
    "pretrain": _TRAINING,
    "finetune": (*_TRAINING, "finetune"),
    "plan": (*_TRAINING, "finetune"),
    "generate": ("generate",),
    "eval": ("data.validation", "data.format", "eval"),
}


def check_available(loaded: LoadedRecipe, command: str) -> None:
    """Raise a `RecipeError` (code 2) when the sections that a command uses ask for what there is not."""
    sections = SECTIONS[command]
    rows = [
        row
        for row in TABLE
        if any(f"{row.key}.".startswith(f"{section}.") for section in sections)
        and (not row.commands or command in row.commands)
    ]
    defaults = Recipe.model_validate({"data": {"train": "-"}}).model_dump(mode="json", by_alias=True)
    found = []
    for row in rows:
        default = _value(defaults, row.key.split("."))
        for location, value in _written(loaded.written, row.key.split("."), ()):
            refused = _refused(row, value, default)
            if refused is not None:
                node, name = problems.find(loaded.root, location)
                here = f" to {command}" if row.commands else ""
                remedy = (
                    f"available: {', '.join(_text(item) for item in row.allowed)}" if row.allowed else "leave it out"
                )
                where = node.where if node is not None else loaded.label
                found.append(Problem(where, f"{name}: {refused} is not available{here} yet", remedy))
    problems.raise_problems(found)
    if "train" in sections:
        check_best_metric(loaded)
    method, data = loaded.recipe.finetune.method, loaded.recipe.data
    if command == "finetune" and method != "sft" and data is not None and data.format != "preference":
        raise RecipeError(
            f"finetune.method: {method} learns from preference data, and data.format is {data.format}",
            where=loaded.where("finetune.method"),
            remedy="data: {format: preference, preference: {prompt: ..., chosen: ..., rejected: ...}}",
        )


def usable_by(loaded: LoadedRecipe) -> dict[str, str | None]:
    """For each command that takes a recipe: None, or the one line that says why it cannot use this one."""
    needs = {
        "tokenize": ("data",),
        "pretrain": ("data", "model", "train.max_tokens"),
        "finetune": ("data", "model.from", "train.max_tokens"),
        "eval": () if loaded.recipe.eval.data else ("data",),
    }
    reasons: dict[str, str | None] = {}
    for command, sections in needs.items():
        reasons[command] = None
        try:
            loaded.require(command, *sections)
            if command != "eval" and not (
                loaded.recipe.tokenizer or (loaded.recipe.model and loaded.recipe.model.from_)
            ):
                loaded.require(command, "tokenizer")
            check_available(loaded, command)
        except RecipeError as error:
            reasons[command] = error.what
    return reasons


def is_available(key: str) -> bool:
    """Whether a key (dotted, `*` for items) can be used at all in this release; for the documentation."""
    return not any(row.key == key and not row.allowed for row in TABLE)


def unavailable_values(key: str, values: list[str]) -> list[str]:
    """Those of a key's values that are refused; for the documentation."""
    allowed = next((row.allowed for row in TABLE if row.key == key and row.allowed), None)
    return [value for value in values if allowed is not None and value not in [_text(item) for item in allowed]]


def _refused(row: Row, value: Any, default: Any) -> str | None:
    """What to call the part of a written value that is refused; None: nothing is."""
    if value == default or value in (None, [], {}) or _is_part_of(value, default):
        return None
    if not row.allowed:
        return row.feature
    items = value if isinstance(value, list) else [value]
    return next((_text(item) for item in items if item not in row.allowed), None)


def _is_part_of(value: Any, default: Any) -> bool:
    """Whether a mapping writes out only defaults."""
    if not isinstance(value, dict) or not isinstance(default, dict):
        return False
    return all(key in default and default[key] == item for key, item in value.items())


def _text(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _value(values: Any, keys: list[str]) -> Any:
    for key in keys:
        if key == "*":
            return None
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _written(value: Any, keys: list[str], at: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """Every place that a dotted key matches, with what is written there."""
    if not keys:
        return [(at, value)]
    key, rest = keys[0], keys[1:]
    if key == "*":
        items = value if isinstance(value, list) else []
        return [match for index, item in enumerate(items) for match in _written(item, rest, (*at, str(index)))]
    if not isinstance(value, dict) or key not in value:
        return []
    return _written(value[key], rest, (*at, key))
