"""Training in fp8: linear layers turned into torchao's by accelerate, under autocast to bf16 for all else.

transformers 5.23 has no field for it; its TrainingArguments hand accelerate what stands in `mixed_precision`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.load import LoadedRecipe


def handler() -> Any:
    """accelerate's settings for torchao.

    Without its default of FSDP's fp8 all-gather: that puts other parameters in the place of those that the optimizer
    was made with, which then would never be trained.
    """
    from accelerate.utils import AORecipeKwargs

    return AORecipeKwargs(enable_fsdp_float8_all_gather=False)


def layers(model: PreTrainedModel) -> list[str]:
    """The layers that accelerate turns to fp8: linear, of sizes in multiples of 16, neither the first nor the last."""
    import torch
    from accelerate.utils.ao import filter_linear_layers, find_first_last_linear_layers

    ends = list(find_first_last_linear_layers(model))
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name, module in linear if filter_linear_layers(module, name, layers_to_filter=ends)]


def check_layers(loaded: LoadedRecipe, model: PreTrainedModel) -> int:
    """How many layers fp8 has in a model.

    Raises:
        RecipeError: none, so that the run would be one in bf16 without saying so.
    """
    count = len(layers(model))
    if count == 0:
        raise RecipeError(
            f"train.precision: {model.config.model_type} has no layer that fp8 can take",
            where=loaded.where("train.precision"),
            remedy="It takes torch.nn.Linear in sizes of multiples of 16, which llama has and gpt2 has not.\n"
            "train.precision=bf16 trains this model.",
        )
    return count
