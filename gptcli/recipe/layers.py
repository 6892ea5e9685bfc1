"""How the layers of a recipe become one: extends < recipe < KEY=VALUE.

Mappings are merged, lists are replaced, null removes a key. In a group of alternatives the nearer layer's choice
removes the farther one's, and what belongs to it (`model.from` removes `type`, `preset` and `config`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from gptcli.errors import RecipeError, UsageError
from gptcli.recipe import tree
from gptcli.recipe.tree import Node
from gptcli.recipe.units import is_share

Keys: TypeAlias = tuple[str, ...]

SOURCE: Keys = ("<source>",)

# Members of a group of alternatives, each with the keys that go with it.
GROUPS: dict[Keys, list[dict[str, Keys]]] = {
    ("tokenizer",): [{"from": (), "train": ()}],
    ("model",): [{"from": ("revision", "rope_scaling"), "type": ("preset", "config")}],
    ("train",): [
        {"max_tokens": (), "max_steps": (), "epochs": ()},
        {"global_batch_size": (), "global_batch_tokens": ()},
    ],
    SOURCE: [{"path": (), "tokens": ("dtype",)}],
}
SOURCES: tuple[Keys, ...] = (("data", "train"), ("data", "validation"), ("eval", "data"))


def merge(far: Node, near: Node, keys: Keys = ()) -> Node:
    """`near` laid over `far`; `keys` is where both stand."""
    if keys in SOURCES:
        sole = _sole_source(far, keys)
        if sole is not None and isinstance(near.value, dict) and "tail" not in near.value:
            return merge(sole, near, SOURCE)
    if not isinstance(far.value, dict) or not isinstance(near.value, dict):
        return _without_nulls(near)
    if keys in SOURCES and ("tail" in far.value) != ("tail" in near.value):
        return _without_nulls(near)
    merged = dict(far.value)
    for key in _superseded(near.value, keys):
        merged.pop(key, None)
    for key, child in near.value.items():
        if child.value is None:
            merged.pop(key, None)
        elif key in merged:
            merged[key] = merge(merged[key], child, (*keys, key))
        else:
            merged[key] = _without_nulls(child)
    return replace(near, value=merged)


def _superseded(near: dict[str, Node], keys: Keys) -> list[str]:
    """The keys of the farther layer that the nearer one's choices remove."""
    removed: list[str] = []
    for group in GROUPS.get(keys, []):
        chosen = [name for name in group if name in near and near[name].value is not None]
        if chosen:
            for name, companions in group.items():
                if name not in chosen:
                    removed += [name, *companions]
    if keys == ("tokenizer", "train") and "algorithm" in near and near["algorithm"].value == "bytes":
        removed += ["vocab_size", "pattern"]
    return removed


def check_groups(layer: Node) -> None:
    """Raise a `RecipeError` when one layer chooses two of a group."""
    places = [(keys, groups) for keys, groups in GROUPS.items() if keys != SOURCE]
    places += [(keys, GROUPS[SOURCE]) for keys in SOURCES]
    for keys, groups in places:
        section = _at(layer, keys)
        if section is None or not isinstance(section.value, dict):
            continue
        for group in groups:
            chosen = [name for name in group if name in section.value and section.value[name].value is not None]
            if len(chosen) > 1:
                first, second = (section.value[name] for name in chosen[:2])
                path = ".".join(keys)
                raise RecipeError(
                    f"{path}.{chosen[0]} and {path}.{chosen[1]} exclude each other",
                    where=second.where,
                    remedy=f"keep one of {', '.join(group)} (the other stands at {first.where})",
                )


def _at(node: Node | None, keys: Keys) -> Node | None:
    for key in keys:
        node = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
    return node


def _without_nulls(node: Node) -> Node:
    if isinstance(node.value, dict):
        kept = {key: _without_nulls(child) for key, child in node.value.items() if child.value is not None}
        emptied = {key for key, child in kept.items() if child.value == {} and _holds_something(node.value[key])}
        return replace(node, value={key: child for key, child in kept.items() if key not in emptied})
    if isinstance(node.value, list):
        return replace(node, value=[_without_nulls(item) for item in node.value])
    return node


def _holds_something(node: Node) -> bool:
    return isinstance(node.value, dict) and bool(node.value)


def clean(layer: Node) -> Node:
    """A first layer: without its null keys."""
    return _without_nulls(layer)


def _sole_source(node: Node, keys: Keys) -> Node | None:
    """The one source that a node at a place of sources stands for; None for several, a share or a tail."""
    if isinstance(node.value, dict):
        return None if "tail" in node.value else node
    if isinstance(node.value, str):
        return None if keys[-1] == "validation" and is_share(node.value) else _item(node)
    if isinstance(node.value, list):
        return _item(node.value[0]) if len(node.value) == 1 else None
    return None


def _item(node: Node) -> Node:
    return replace(node, value={"path": node}) if isinstance(node.value, str) else node


def with_source_lists(root: Node) -> Node:
    """The same tree with every place of sources as a list of mappings (a share and a tail stay as they are)."""

    def listed(keys: Keys, node: Node) -> Node:
        if isinstance(node.value, list):
            return replace(node, value=[_item(item) for item in node.value])
        sole = _sole_source(node, keys)
        if sole is not None:
            return replace(node, value=[sole], sole=True)
        return node

    top = root.value if isinstance(root.value, dict) else {}
    for section, key in SOURCES:
        child = top.get(section)
        if child is not None and isinstance(child.value, dict) and key in child.value:
            inner = {**child.value, key: listed((section, key), child.value[key])}
            top = {**top, section: replace(child, value=inner)}
    return replace(root, value=top)


def split_override(override: str) -> tuple[Keys, str, str]:
    """The dotted keys, the text of the value and the name of an override `KEY=VALUE`."""
    key, equals, value = override.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    where = f"override {override if len(override) <= 60 else override[:57] + '...'}"
    if not equals or not all(keys):
        raise UsageError(f"{override!r} is not KEY=VALUE", remedy="for example train.learning_rate=1e-3")
    if keys[0] == "extends":
        raise UsageError("extends is read from the recipe's file only", where=where, remedy="name that recipe instead")
    return keys, value, where


def apply_overrides(root: Node, overrides: list[tuple[Keys, Node]]) -> Node:
    """The recipe with the overrides on top; they are one layer."""
    together = replace(root, value={})
    for keys, value in overrides:
        if not any(part.isdigit() for part in keys):
            together = _overlay(together, nested(keys, value))
    check_groups(together)
    for keys, value in overrides:
        root = merge(root, _reach(root, keys, value, ()))
    return root


def _overlay(far: Node, near: Node) -> Node:
    """Both, without any rule: to see what one layer says."""
    if not isinstance(far.value, dict) or not isinstance(near.value, dict):
        return near
    merged = dict(far.value)
    for key, child in near.value.items():
        merged[key] = _overlay(merged[key], child) if key in merged else child
    return replace(near, value=merged)


def nested(keys: Keys, value: Node) -> Node:
    """The layer that says only `keys: value`."""
    for key in reversed(keys):
        value = replace(value, value={key: value}, text="")
    return value


def _reach(node: Node | None, keys: Keys, value: Node, at: Keys) -> Node:
    """The layer that, merged over `node`, sets `keys` to `value`; a list on the way comes back whole."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    sole = _sole_source(node, at) if node is not None and at in SOURCES else None
    if sole is not None:
        return _reach(sole, rest if key == "0" else keys, value, SOURCE)
    if node is not None and isinstance(node.value, list):
        items = list(node.value)
        if not key.isdigit() or int(key) >= len(items):
            name = ".".join(at)
            raise RecipeError(
                f"{name} holds {len(items)} items; {key} is none of them",
                where=value.where,
                remedy=f"say which one: {name}.0" + (f" to {name}.{len(items) - 1}" if len(items) > 1 else ""),
            )
        place = SOURCE if at in SOURCES else (*at, key)
        item = _item(items[int(key)]) if at in SOURCES and rest else items[int(key)]
        near = _reach(item, rest, value, place)
        items[int(key)] = merge(item, near, place)
        return replace(value, value=list(items), text="")
    if at in SOURCES and key.isdigit():
        raise RecipeError(
            f"{'.'.join(at)} has no item {key}", where=value.where, remedy=f"say {'.'.join((*at, *rest)) or key}=..."
        )
    child = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
    return replace(value, value={key: _reach(child, rest, value, (*at, key))}, text="")


def override_layer(overrides: list[str], base: Path) -> list[tuple[Keys, Node]]:
    """The parsed overrides, in the order given."""
    parsed = []
    for override in overrides:
        keys, text, where = split_override(override)
        parsed.append((keys, tree.parse_inline(text, where, base)))
    return parsed
