"""Which values of a recipe are paths, and what they are relative to.

A path is relative to the file it stands in; in an override to the current folder; `output_dir` always to the current
folder. `builtin:`, `hub:` and Hub ids are left alone. The result is absolute, without looking through links.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gptcli.recipe.tree import Node

MAGIC = frozenset("*?[")


def absolute(path: str, base: Path) -> str:
    """A path, possibly a glob, as an absolute one; the characters of `base` are never taken for a glob's."""
    expanded = os.path.expanduser(path)
    if os.path.isabs(expanded):
        return os.path.normpath(expanded)
    if MAGIC.intersection(expanded) and not os.path.lexists(base / expanded):
        return os.path.normpath(os.path.join(glob.escape(os.fspath(base)), expanded))
    return os.path.normpath(base / expanded)


def source_path(path: str, base: Path) -> str:
    """The path of a source; `builtin:`, `hub:` and URLs stay as they are."""
    return path if path.startswith(("builtin:", "hub:")) or "://" in path else absolute(path, base)


def file_or_id(value: str, base: Path, current: Path) -> str:
    """A value that is a path or a Hub id: a path if it looks like one, or exists beside the recipe or here."""
    if value.startswith(("./", "../", "/", "~")) or value in (".", ".."):
        return absolute(value, base)
    for folder in (base, current):
        if value and (folder / value).exists():
            return absolute(value, folder)
    return value


def with_absolute_paths(root: Node, current: Path) -> Node:
    """The same tree with every path absolute. `root` has its sources as lists."""

    def source(node: Node) -> Node:
        node = _changed(node, ("tokens",), lambda text, base: absolute(text, base))
        inner = node.value.get("path") if isinstance(node.value, dict) else None
        if inner is not None and isinstance(inner.value, dict):
            for column in inner.value:
                node = _changed(node, ("path", column), source_path)
            return node
        return _changed(node, ("path",), source_path)

    for keys in (("data", "train"), ("data", "validation"), ("eval", "data")):
        root = _at(root, keys, lambda node: _items(node, source))
    for keys in (("tokenizer", "from"), ("model", "from"), ("finetune", "adapter_from")):
        root = _changed(root, keys, lambda text, base: file_or_id(text, base, current))
    root = _changed(root, ("tokenizer", "chat_template"), lambda text, base: file_or_id(text, base, current))
    root = _changed(root, ("finetune", "reward"), _reward)
    root = _at(root, ("eval", "tasks"), lambda node: _items(node, _task))
    return _changed(root, ("output_dir",), lambda text, _: absolute(text, current))


def _reward(text: str, base: Path) -> str:
    file, colon, function = text.rpartition(":")
    return f"{absolute(file, base)}:{function}" if colon and file.endswith(".py") else text


def _task(node: Node) -> Node:
    if isinstance(node.value, str) and node.value.endswith((".yaml", ".yml")):
        return replace(node, value=absolute(node.value, node.base))
    return node


def _items(node: Node, change: Callable[[Node], Node]) -> Node:
    return replace(node, value=[change(item) for item in node.value]) if isinstance(node.value, list) else node


def _changed(root: Node, keys: tuple[str, ...], change: Callable[[str, Path], str]) -> Node:
    def text(node: Node) -> Node:
        is_text = isinstance(node.value, str) and node.value != ""
        return replace(node, value=change(str(node.value), node.base)) if is_text else node

    return _at(root, keys, text)


def _at(node: Node, keys: tuple[str, ...], change: Callable[[Node], Node]) -> Node:
    if not keys:
        return change(node)
    if not isinstance(node.value, dict) or keys[0] not in node.value:
        return node
    child = _at(node.value[keys[0]], keys[1:], change)
    return replace(node, value={**node.value, keys[0]: child})
