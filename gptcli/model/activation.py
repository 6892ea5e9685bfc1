"""GELU's tanh form for training on a CPU: the derivative comes with the value, and the backward pass is one product.

torch spends most of its time for it in tanh, in both passes. Here a piece that fits in the cache goes through
x * sigmoid(2u), the same function, whose exponential is fast: half of torch's time (benchmarks/activation.py). The
derivative is kept in place of the input, so memory is the same.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# gelu(x) = x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
# (Hendrycks and Gimpel 2016, arXiv:1606.08415).
_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715
# Values at once, for each thread: three arrays of them in fp32 lie in the caches.
PIECE = 1 << 18
# Kept from call to call: new memory costs more than what is done in it.
_kept = threading.local()


def keep_derivatives(model: PreTrainedModel) -> int:
    """Put `TanhGelu` in the place of a model's own modules of the same function; the number of those replaced."""
    from transformers.activations import GELUTanh, NewGELUActivation

    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in (GELUTanh, NewGELUActivation):
                setattr(parent, name, TanhGelu())
                replaced += 1
    return replaced


class TanhGelu(nn.Module):
    """GELU's tanh form, of any shape; without a gradient, and for types other than fp32 and bf16, torch's own."""

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
        found: torch.Tensor = _TanhGelu.apply(values)  # type: ignore[no-untyped-call]
        return found


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        found, derivatives = gelu_with_derivative(values)
        ctx.save_for_backward(derivatives)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        derivatives: torch.Tensor = ctx.saved_tensors[0]
        return outputs[0] * derivatives


def gelu_with_derivative(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU's tanh form and its derivative, of the shape and type of `values`, worked out in fp32."""
    flat = values.contiguous().view(-1)
    found, derivatives = torch.empty_like(flat), torch.empty_like(flat)
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
    return found.view(values.shape), derivatives.view(values.shape)
