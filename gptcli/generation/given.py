"""How a run's recipe says to generate, read without the recipe's schema, which takes a quarter of a second to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from gptcli.errors import GptcliError, RecipeError
from gptcli.generation.settings import Settings
from gptcli.recipe.tree import parse, plain, read_text
from gptcli.runs.folder import owner


def recipe_section(folder: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The `generate` section of a model's run, by keys; nothing for any other model.

    One that cannot be read was written by another version: its settings are lost, with a line to `warn`; its model is
    not.
    """
    run = owner(folder)
    if run is None or not run.resolved.is_file():
        return {}
    path = run.resolved
    try:
        recipe = plain(parse(read_text(path, str(path)), str(path), path.parent, {}))
        section = recipe.get("generate") or {} if isinstance(recipe, dict) else None
        return _checked(section, str(path))
    except GptcliError as error:
        warn(f"the run's recipe cannot be read, so the usual settings are taken: {error.lines()[0]}")
        return {}


def _checked(section: Any, where: str) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise RecipeError("generate: expected keys and values", where=where)
    usual = {field.name: field.default for field in fields(Settings)} | {"prompts": ()}
    for key, value in section.items():
        if key in usual and not _is_like(value, usual[key]):
            raise RecipeError(f"generate.{key}: {str(value)[:100]!r} is no value for it", where=where)
    return {key: value for key, value in section.items() if key in usual}


def _is_like(value: Any, usual: Any) -> bool:
    if isinstance(usual, tuple):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if isinstance(usual, bool) or isinstance(value, bool):
        return isinstance(usual, bool) and isinstance(value, bool)
    return isinstance(value, int | float if isinstance(usual, float) else int)
