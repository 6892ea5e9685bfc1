"""What each module of a model makes of a batch, to see where two ways to compute it come apart.

All of them are compared and not the logits alone: a convolution that sees too little, or a token of another document,
hardly changes those of a model that has not learnt yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def module_outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each module makes of a batch, by its name, in their order: where that is a tensor [batch, time, ...]."""
    shape, outputs, hooks = inputs["input_ids"].shape, {}, []

    def keep(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, torch.Tensor) and first.ndim > 2 and first.shape[:2] == shape:
            outputs[name] = first.detach().clone()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda _, __, output, name=name: keep(name, output)))
    try:
        # With a cache of keys nothing looks for the documents of a row; in training there is none.
        keep("the logits", model(**inputs, use_cache=False).logits)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def first_apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], most: float) -> str | None:
    """The first module whose output is another, relative to its size."""
    for name, wanted in expected.items():
        output = found.get(name)
        if output is None or output.shape != wanted.shape:
            return f"{name} gives another shape"
        if not (output.float() - wanted.float()).norm() <= most * wanted.float().norm():
            return f"{name} gives something else"
    return None
