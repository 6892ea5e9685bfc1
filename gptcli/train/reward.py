"""The reward of a completion, for grpo: the reference, a pattern, or a function of the user's own file.

A function is called as trl calls one: `function(prompts, completions, **columns)` with a list under each name, and
gives a number for each completion. It runs with all rights of the command: the recipe that names it is trusted.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError, first_line
from gptcli.recipe.schema import RegexReward

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe

Reward = Callable[..., list[float]]
EXACT = "exact_match"


def check_reward(loaded: LoadedRecipe) -> None:
    """Refuse a reward that cannot be, before anything is read and without running any of it.

    Raises:
        RecipeError: a pattern that is none, or a file that is not there.
    """
    given, where = loaded.recipe.finetune.reward, loaded.where("finetune.reward")
    if isinstance(given, RegexReward):
        _by_pattern(given.regex, loaded.where("finetune.reward.regex"))
    elif given != EXACT:
        file, colon, name = given.rpartition(":")
        if not (colon and file.endswith(".py") and name.isidentifier()):
            raise RecipeError(
                f"finetune.reward: {given!r} is no reward",
                where=where,
                remedy="Rewards are exact_match, {regex: PATTERN} and file.py:FUNCTION.",
            )
        if not Path(file).is_file():
            raise RecipeError(f"finetune.reward: there is no file {file}", where=where)


def reward_of(loaded: LoadedRecipe) -> Reward:
    """The recipe's reward, a function with trl's signature.

    Raises:
        RecipeError: see `check_reward`; or a file that cannot be imported, or has no such function.
    """
    check_reward(loaded)
    given, where = loaded.recipe.finetune.reward, loaded.where("finetune.reward")
    if isinstance(given, RegexReward):
        return _by_pattern(given.regex, loaded.where("finetune.reward.regex"))
    if given == EXACT:
        preference = loaded.recipe.data.preference if loaded.recipe.data else None
        return _by_reference(preference.reference if preference else "reference")
    file, _, name = given.rpartition(":")
    return _checked(_from_file(Path(file), name, where), f"{Path(file).name}:{name}", where)


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or that of the last of its messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _by_pattern(regex: str, where: str) -> Reward:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise RecipeError(f"finetune.reward.regex: {regex!r} is no pattern: {error}", where=where) from None

    def matches(completions: list[Any], **others: Any) -> list[float]:
        del others
        return [float(pattern.search(text_of(each)) is not None) for each in completions]

    return matches


def _by_reference(column: str) -> Reward:
    from gptcli.evaluation.metrics import exact_match

    def is_reference(completions: list[Any], **columns: Any) -> list[float]:
        pairs = zip(completions, columns[column], strict=True)
        return [exact_match(text_of(each), _texts(reference)) for each, reference in pairs]

    return is_reference


def _texts(reference: Any) -> list[str]:
    return [str(each) for each in (reference if isinstance(reference, list) else [reference])]


def _from_file(file: Path, name: str, where: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"gptcli_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(
            f"finetune.reward: {file.name} cannot be imported: {type(error).__name__}: {first_line(error)}", where=where
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"finetune.reward: {file.name} has no function {name!r}", where=where)
    found: Callable[..., Any] = function
    return found


def _checked(function: Callable[..., Any], name: str, where: str) -> Reward:
    """The function, of which every failure is told as the recipe's."""

    def called(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        try:
            given = function(prompts=prompts, completions=completions, **columns)
            values = [float(value) for value in given]
        except Exception as error:
            raise RecipeError(
                f"finetune.reward: {name} failed: {type(error).__name__}: {first_line(error)}", where=where
            ) from error
        if len(values) != len(completions) or not all(map(math.isfinite, values)):
            found = f"{len(values)} values" if len(values) != len(completions) else "a value that is not finite"
            raise RecipeError(
                f"finetune.reward: {name} gave {found} for {len(completions)} completions",
                where=where,
                remedy="It has to give a number for each completion.",
            )
        return values

    return called
