"""GELU's tanh form for training on a CPU: the derivative comes with the value, and the backward pass is one product.

torch spends most of its time for it in tanh, in both passes. Here a piece that fits in the cache goes through
x * sigmoid(2u), the same function, whose exponential is fast: half of torch's time (benchmarks/activation.py). The
derivative is kept in place of the input, and the values take the input's own memory.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from gptcli.model.load import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# gelu(x) = x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
# (Hendrycks and Gimpel 2016, arXiv:1606.08415).
_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715
# Values at once, for each thread: three arrays of them in fp32 lie in the caches.
PIECE = 1 << 18
PROBE_TOKENS = 8
# Kept from call to call: new memory costs more than what is done in it.
_kept = threading.local()


def keep_derivatives(model: PreTrainedModel) -> int:
    """Put `TanhGelu` in the place of a model's own modules of the same function; the number of those replaced.

    The values take the place of their inputs where the model does not look at these again. That is tried.
    """
    from transformers.activations import GELUTanh, NewGELUActivation

    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (GELUTanh, NewGELUActivation)
    ]
    if not places:
        return 0
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % 2
    with torch.no_grad(), evaluating(model):
        expected = model(input_ids=ids).logits
    ours = [TanhGelu(in_place=True) for _ in places]
    for (parent, name), module in zip(places, ours, strict=True):
        setattr(parent, name, module)
    if not _gives(model, ids, expected):
        for module in ours:
            module.in_place = False
    return len(places)


def _gives(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a pass with a gradient gives these logits, and its backward pass finds all that it needs unchanged."""
    table: Any = model.get_input_embeddings().weight
    wanted = table.requires_grad
    table.requires_grad_(True)
    try:
        with torch.enable_grad(), evaluating(model):
            logits = model(input_ids=ids).logits
            torch.autograd.grad(logits.sum(), table)
    except RuntimeError:  # "modified by an inplace operation"
        return False
    finally:
        table.requires_grad_(wanted)
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


class TanhGelu(nn.Module):
    """GELU's tanh form, of any shape; without a gradient, and for types other than fp32 and bf16, torch's own.

    Args:
        in_place: whether the values may take the place of the inputs where there is a gradient.
    """

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Each value's GELU."""
        ours = (
            torch.is_grad_enabled()
            and values.requires_grad
            and values.device.type == "cpu"
            and values.dtype in (torch.float32, torch.bfloat16)
        )
        if not ours:
            return nn.functional.gelu(values, approximate="tanh")
        in_place = self.in_place and not values.is_leaf and values.is_contiguous()
        found: torch.Tensor = _TanhGelu.apply(values, in_place)  # type: ignore[no-untyped-call]
        return found


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, in_place: bool) -> torch.Tensor:
        # Detached, so that autograd takes it for another tensor; it still counts as a change of `values`, and whoever
        # kept these for the backward pass is told there.
        out = values.detach() if in_place else torch.empty_like(values, memory_format=torch.contiguous_format)
        ctx.save_for_backward(gelu_with_derivative(values.detach(), out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        derivatives: torch.Tensor = ctx.saved_tensors[0]
        # In place, as the graph is gone after this.
        return derivatives.mul_(outputs[0]), None


def gelu_with_derivative(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form into `out`, which may be `values` themselves; the derivative. Worked out in fp32."""
    flat, found = values.contiguous().view(-1), out.view(-1)
    derivatives = torch.empty_like(flat)
    size = PIECE * torch.get_num_threads()
    buffers = getattr(_kept, "buffers", None)
    if buffers is None or buffers.shape[1] < size:
        buffers = _kept.buffers = torch.empty(3, size, dtype=torch.float32)
    for start in range(0, len(flat), size):
        piece = slice(start, start + size)
        x, factor, gate = buffers[:, : len(flat[piece])]
        x.copy_(flat[piece])
        factor.fill_(_SLOPE).addcmul_(x, x, value=_SLOPE * _CUBIC)  # 2u = x * factor
        torch.mul(factor, x, out=gate).sigmoid_()
        found[piece] = x.mul_(gate)
        # The derivative of x s(2u) is s + x s (1 - s) (2u)', and (2u)' = 3 factor - 2 slope.
        x.addcmul_(x, gate, value=-1)
        derivatives[piece] = gate.addcmul_(x, factor, value=3).add_(x, alpha=-2 * _SLOPE)
    return derivatives.view(values.shape)
