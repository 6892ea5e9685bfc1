"""The numbers that evaluations during training give, by the names that `train.best_metric` has for them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from gptcli.errors import RecipeError

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Recipe

OF_TEXTS = ("loss", "bits_per_byte", "perplexity")
# What the metrics give that are more than one number, or one of another name.
_SEVERAL = {
    "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "quality": ("distinct_1", "distinct_2", "distinct_3", "repetition", "ended"),
}
_OF_LABELS = {name: (f"{name}_macro", f"{name}_micro") for name in ("precision", "recall", "f1")}
# All others are better the higher they are.
LOWER_IS_BETTER = frozenset({*OF_TEXTS, "wer", "cer", "repetition"})
PREFIX = "validation."


def numbers_of(recipe: Recipe) -> list[str]:
    """The names of the numbers that an evaluation during training gives, `accuracy` for `validation.accuracy`."""
    section = recipe.eval
    several = _SEVERAL | (_OF_LABELS if section.labels is not None else {})
    data = recipe.data
    rows = section.data or recipe.validation_rows
    tasks = [metric for metric in dict.fromkeys(section.metrics) if metric != "perplexity"] if rows else []
    held_out = OF_TEXTS if data is None or data.validation != 0 else ()
    return [*held_out, *(name for metric in tasks for name in several.get(metric, (metric,)))]


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a value of `train.best_metric` is better than another one; NaN is never."""
    return value < than if metric.removeprefix(PREFIX) in LOWER_IS_BETTER else value > than


def check_best_metric(loaded: LoadedRecipe) -> None:
    """Raise a `RecipeError` where `train.best_metric` is written and no evaluation of the recipe gives it."""
    chosen, known = loaded.recipe.train.best_metric, numbers_of(loaded.recipe)
    name = chosen.removeprefix(PREFIX)
    if chosen in [PREFIX + each for each in known] or "best_metric" not in (loaded.written.get("train") or {}):
        return
    near = [each for each in known if each.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    mean = f"Did you mean {PREFIX}{near[0]}? " if near else ""
    every = f"This recipe measures {', '.join(known) or 'nothing'}"
    raise RecipeError(
        f"train.best_metric: {chosen} is not measured",
        where=loaded.where("train.best_metric"),
        remedy=f"{mean}{every}; eval.data with eval.metrics adds more.",
    )
