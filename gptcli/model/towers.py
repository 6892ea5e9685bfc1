"""The towers of a model that sees or hears, found by what transformers says of its parts; no family is named here."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from gptcli.recipe.load import LoadedRecipe

FEATURES = "data.cache_features"


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules whose input is images, sounds or videos and no text, by their names in the model."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _hears_or_sees(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def language_model(model: nn.Module) -> str | None:
    """The name of the text model in a model with towers; None for a model without."""
    if not towers(model):
        return None
    text = model.get_decoder()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is text), None) or None


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def check_features(loaded: LoadedRecipe, *, media: bool) -> None:
    """Raise a `RecipeError` where outputs of a tower are to be kept of data without (`media`) images and sounds."""
    if loaded.recipe.data is not None and loaded.recipe.data.cache_features and not media:
        raise RecipeError(
            f"{FEATURES}: no row has an image or a sound", where=loaded.where(FEATURES), remedy="Leave it out."
        )


def frozen_tower(model: nn.Module, loaded: LoadedRecipe) -> tuple[str, nn.Module]:
    """The one tower of a model that is not trained. Raises `RecipeError` where there is none, or several."""
    found = towers(model)
    frozen = {name: module for name, module in found.items() if is_frozen(module)}
    if len(frozen) == 1:
        return next(iter(frozen.items()))
    where, names = loaded.where(FEATURES), ", ".join(name.rpartition(".")[2] for name in found)
    if not found:
        raise RecipeError(
            f"{FEATURES}: {type(model).__name__} has no tower of its own", where=where, remedy="Leave it out."
        )
    if frozen:
        raise RecipeError(
            f"{FEATURES} keeps the outputs of one frozen tower, and there are several: {names}", where=where
        )
    raise RecipeError(
        f"{FEATURES}: the tower ({names}) is trained, so that its outputs change with every step",
        where=where,
        remedy=f"Freeze it, with gptcli finetune: finetune: {{adapter: none, freeze: [{names}]}}\n"
        f"Or leave {FEATURES} out.",
    )


def keep_evaluating(model: nn.Module) -> None:
    """Keep towers that are not trained in evaluation mode for good: what drops out there would only blur a picture."""
    for module in towers(model).values():
        if is_frozen(module):
            module.eval()
            module.train = MethodType(_stays, module)  # type: ignore[method-assign]


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    del mode
    return module


def _hears_or_sees(module: Any) -> bool:
    # Every model of transformers says of itself which kinds of input it has; their common default is text.
    taken = getattr(type(module), "input_modalities", "text")
    return "text" not in ((taken,) if isinstance(taken, str) else taken)
