"""From a recipe's argument to a checked recipe: find it, read it, lay its layers over each other, validate.

Every error names the file and line (or the override) and what to do. Nothing here imports torch, and a broken recipe
costs about 0.1 s: pydantic and ruamel.yaml are all that is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptcli.errors import RecipeError, UsageError
from gptcli.recipe import layers, paths, problems, tree
from gptcli.recipe.catalog import find_builtin, not_found, recipes_root
from gptcli.recipe.schema import Recipe
from gptcli.recipe.sections_train import FLOOR_SCHEDULERS, Finetune
from gptcli.recipe.tree import Node, dump_yaml, plain

__all__ = ["LoadedRecipe", "dump_yaml", "load_recipe", "resolved"]

MAX_EXTENDS = 16

EXAMPLES = {
    "tokenizer": "tokenizer:\n  train: {algorithm: bpe, vocab_size: 8192}",
    "data": "data:\n  train: builtin:pydocs",
    "data.train": "data:\n  train: builtin:pydocs",
    "model": "model:\n  type: llama\n  preset: 10m",
    "model.from": "model:\n  from: runs/base/final",
    "train": "train:\n  max_tokens: 20M",
    "train.max_tokens": "train:\n  max_tokens: 20M     # or max_steps, or epochs",
    "eval.data": "eval:\n  data: {path: test.jsonl}",
}
LENGTHS = ("max_tokens", "max_steps", "epochs")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that passed every check, and where its keys were written.

    Attributes:
        recipe: the checked values, every default filled in, paths absolute.
        path: the file.
        text: the file as given.
        overrides: KEY=VALUE, as given.
        written: what the layers say, without defaults, units read and paths absolute.
        label: the file's name in messages.
    """

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...]
    written: dict[str, Any]
    label: str
    root: Node = field(repr=False, compare=False)

    def where(self, key: str) -> str:
        """Where a dotted key was written: "file:line", "override KEY=VALUE", or the file's name if it was not."""
        node, _ = problems.find(self.root, key.split("."))
        return node.where if node is not None else self.label

    def used_by(self, command: str) -> LoadedRecipe:
        """The recipe as a training command uses it: `pretrain`, and a plan of a new model, leave `finetune` aside."""
        model = self.recipe.model
        if command == "finetune" or (command == "plan" and model is not None and model.from_ is not None):
            return self
        written = {key: value for key, value in self.written.items() if key != "finetune"}
        recipe = self.recipe.model_copy(update={"finetune": Finetune.model_construct()})
        return replace(self, recipe=recipe, written=written)

    def require(self, command: str, *sections: str) -> None:
        """Raise a `RecipeError` for a section or dotted key that a command needs and the recipe lacks.

        `train.max_tokens` stands for its group: `max_steps` and `epochs` do as well.
        """
        for section in sections:
            keys = section.split(".")
            names = [[*keys[:-1], name] for name in LENGTHS] if keys[-1] in LENGTHS and keys[0] == "train" else [keys]
            if any(_has(self.written, name) for name in names):
                continue
            wanted = " or ".join(".".join(name) for name in names)
            raise RecipeError(
                f"{command} needs {wanted}, which the recipe does not have",
                where=self.label,
                remedy=f"add, for example:\n{EXAMPLES.get(section, f'{section}: ...')}",
            )


def _has(value: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(value, dict) or value.get(key) in (None, {}, []):
            return False
        value = value[key]
    return True


def load_recipe(argument: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe by its path or built-in name, with `KEY=VALUE` overrides.

    Raises:
        UsageError: there is no such recipe, or an override is not KEY=VALUE.
        RecipeError: anything that is wrong in it.
    """
    path = find_recipe(argument)
    current = Path.cwd()
    text = tree.read_text(path, _label(path))
    chain = _read_layers(path, text, os.environ)
    given = layers.override_layer(list(overrides), current)
    _check_keys(chain, given)
    root = layers.clean(chain[0])
    for layer in chain[1:]:
        root = layers.merge(root, layer)
    root = layers.with_source_lists(layers.apply_overrides(root, given))
    root = paths.with_absolute_paths(root, current)
    root, written = _named(root, path, current)
    try:
        recipe = Recipe.model_validate(plain(root))
    except ValidationError as error:
        problems.raise_problems(problems.from_validation(error, root, _label(path), Recipe))
        raise
    dumped = recipe.model_dump(mode="json", by_alias=True)
    return LoadedRecipe(
        recipe=recipe,
        path=path,
        text=text,
        overrides=tuple(overrides),
        written=_pruned(dumped, written),
        label=_label(path),
        root=root,
    )


def resolved(loaded: LoadedRecipe) -> dict[str, Any]:
    """The whole recipe with every default, by the names a recipe uses; it loads again to the same recipe."""
    values: dict[str, Any] = _compact(loaded.recipe.model_dump(mode="json", by_alias=True, exclude={"extends"}))
    if loaded.recipe.train.lr_scheduler not in FLOOR_SCHEDULERS:
        values["train"].pop("min_lr_ratio", None)
    return values


def find_recipe(argument: str) -> Path:
    """The file of a recipe's argument: a path, or the name of a built-in recipe."""
    path = Path(argument).expanduser()
    try:
        if path.is_file():
            return Path(os.path.abspath(path))
        builtin = find_builtin(argument)
        if builtin is not None:
            return builtin
        if path.is_dir():
            raise UsageError(
                f"{argument} is a folder, not a recipe", remedy=f"name a file in it, such as {path / 'recipe.yaml'}"
            )
        if path.exists():
            raise UsageError(f"{argument} is not a regular file")
    except (OSError, ValueError):
        raise not_found(argument[:100]) from None
    raise not_found(argument)


def _label(path: Path) -> str:
    """A file's name in messages: short where that is clear."""
    root = recipes_root()
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    current = Path.cwd()
    return path.relative_to(current).as_posix() if path.is_relative_to(current) else os.fspath(path)


def _read_layers(path: Path, text: str, environment: Mapping[str, str]) -> list[Node]:
    """The recipe and what it extends, the farthest first."""
    chain: list[Node] = []
    seen: list[Path] = []
    while True:
        label = _label(path)
        layer = tree.parse(text, label, path.parent, environment)
        if not isinstance(layer.value, dict):
            kind = "a list" if isinstance(layer.value, list) else "a single value"
            raise RecipeError(f"is {kind}, not keys and values", where=label, remedy="`gptcli recipes show quickstart`")
        layers.check_groups(layer)
        extends = layer.value.get("extends")
        chain.insert(0, replace(layer, value={key: node for key, node in layer.value.items() if key != "extends"}))
        seen.append(path)
        if extends is None or extends.value is None:
            return chain
        path = _extended(extends, path)
        if path in seen or len(seen) >= MAX_EXTENDS:
            circle = path in seen
            raise RecipeError(
                "extends goes round in a circle" if circle else f"extends goes deeper than {MAX_EXTENDS} files",
                where=extends.where,
                remedy=" -> ".join(_label(file) for file in [*seen, path][:6]),
            )
        text = tree.read_text(path, _label(path))


def _extended(extends: Node, path: Path) -> Path:
    if not isinstance(extends.value, str):
        raise RecipeError("extends: expected one file or built-in name", where=extends.where)
    try:
        file = Path(paths.absolute(extends.value, path.parent))
        if file.is_file():
            return file
        found = find_builtin(extends.value)
    except (OSError, ValueError):
        found = None
    if found is None:
        missing = not_found(extends.value)
        raise RecipeError(f"extends: {missing.what}", where=extends.where, remedy=missing.remedy)
    return found


def _check_keys(chain: list[Node], given: list[tuple[layers.Keys, Node]]) -> None:
    found = [problem for layer in reversed(chain) for problem in problems.unknown_keys(layer, [Recipe], Recipe)]
    for keys, value in given:
        named = tuple(key for key in keys if not key.isdigit())
        found += problems.unknown_keys(layers.nested(named, value), [Recipe], Recipe)
    problems.raise_problems(found)


def _named(root: Node, path: Path, current: Path) -> tuple[Node, dict[str, Any]]:
    """The tree with the name and the output folder that it has anyway, and what was written."""
    values = root.value if isinstance(root.value, dict) else {}
    written = plain(root)
    name = values.get("name")
    if name is not None and isinstance(name.value, int | float) and not isinstance(name.value, bool):
        values = {**values, "name": replace(name, value=name.text)}
    defaults = {"name": path.stem, "output_dir": paths.absolute("runs", current)}
    added = {key: Node(value, _label(path), current, value) for key, value in defaults.items() if key not in values}
    return replace(root, value={**values, **added}), written


def _pruned(dumped: Any, written: Any) -> Any:
    """`dumped`, only where `written` has something."""
    if isinstance(dumped, dict) and isinstance(written, dict):
        return {key: _pruned(dumped[key], item) for key, item in written.items() if key in dumped}
    if isinstance(dumped, list) and isinstance(written, list) and len(dumped) == len(written):
        return [_pruned(item, shape) for item, shape in zip(dumped, written, strict=True)]
    return dumped


def _compact(value: Any) -> Any:
    """Without the keys that hold nothing: null is no value in a recipe."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items() if item is not None}
    return [_compact(item) for item in value] if isinstance(value, list) else value
