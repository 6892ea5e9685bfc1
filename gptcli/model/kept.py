"""What a forward pass keeps for the backward pass, counted on torch's meta device: no memory, and no rule a family.

The model's own code runs on tensors without values, and every tensor that autograd saves is counted once. A twelfth of
a second for six layers.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gptcli.model.kernels import attend_in_place_of_sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gptcli_counted"
# Any number does: without a matrix of attention, what is kept grows with the tokens alone.
TOKENS = 64
# What autocast rounds to half precision, on a CPU as on a GPU (torch/amp's list of eligible operations).
_ROUNDED = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        functional.conv1d,
    }
)


@dataclass(frozen=True)
class Kept:
    """Bytes that the layers of a model keep for the backward pass, the output head and its logits aside.

    Attributes:
        token: for each token; with an attention that keeps no matrix of probabilities.
        fixed: whatever the tokens: weights rounded to half precision.
    """

    token: float
    fixed: int


def kept_bytes(model: PreTrainedModel, *, half: bool) -> Kept | None:
    """Count for a model on the meta device; None for one that cannot run there (it looks at values, as routers do).

    Args:
        model: one without values; it is as before afterwards, in training mode.
        half: under autocast to bf16 or fp16, else in fp32.
    """
    rounding = _Rounding() if half else None
    counted = attend_in_place_of_sdpa(model, NAME, partial(_forward, rounding), _no_mask)
    model.train()
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    # One that is there already, so that no model looks for documents in the rows, which takes values.
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), rounding or nullcontext():
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception:  # each model's code has its own way of not running without values
        return None
    finally:
        if counted:
            model.set_attn_implementation("sdpa")
    rounded = [] if rounding is None else [copy.untyped_storage() for copy in rounding.copies.values()]
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    weights |= {storage._cdata for storage in rounded}
    tokens = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    return Kept(tokens / TOKENS, sum(storage.nbytes() for storage in rounded))


class _Rounding(TorchFunctionMode):
    """Autocast, which torch does not have for the meta device; a weight is rounded once."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ROUNDED:
            args = tuple(map(self.rounded, args))
            kwargs = {name: self.rounded(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def rounded(self, value: Any) -> Any:
        """A tensor of fp32 in bf16, anything else as it is."""
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, torch.nn.Parameter):
            return value.to(torch.bfloat16)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(torch.bfloat16)
        return self.copies[id(value)]


def _forward(
    rounding: _Rounding | None, module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Stands for a fused attention: [batch, heads, time, width] to [batch, time, heads, width]."""
    del module
    if rounding is not None:  # sdpa is on autocast's list as well
        query, key, value = map(rounding.rounded, (query, key, value))
    found: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2).contiguous(), None


def _no_mask(**_: Any) -> None:
    return None


class _Fused(torch.autograd.Function):
    """Keeps what FlashAttention keeps: its inputs, its output and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # In the memory order of torch's kernel, whose output needs no copy to be [batch, time, heads, width].
        out = query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out
