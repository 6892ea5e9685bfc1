"""Causal attention in blocks for training in bf16 on a CPU, where torch's own kernel is slow on short rows.

The probabilities of a block of queries fit in the cache and, but for short rows, are computed again in the backward
pass, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135); here a block is a few batched products, which oneDNN
multiplies with the hardware's bf16. Everything that is not plain causal attention under a gradient goes to
transformers' sdpa.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptcli.model.kernels import attend_in_place_of_sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gptcli_blocks"
BLOCK_QUERIES = 128
# Scores that are there at once, for each thread: what its cache holds.
BLOCK_BYTES = 1 << 20
# Rows up to here keep their probabilities: at this length they are about a seventh of a layer's activations, and to
# compute them again is 3% of a step.
KEPT_LENGTH = 256


def attend_in_blocks(model: PreTrainedModel) -> bool:
    """Let a model use these blocks in place of sdpa; False where it uses another attention, which then stays."""
    from transformers.masking_utils import sdpa_mask

    return attend_in_place_of_sdpa(model, NAME, _forward, sdpa_mask)


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """See transformers' `sdpa_attention_forward`: [batch, heads, time, width] to [batch, time, heads, width]."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = (
        causal
        and attention_mask is None
        and dropout == 0.0
        and dtype == torch.bfloat16
        and query.device.type == "cpu"
        and torch.is_grad_enabled()
        and 1 < query.shape[2] == key.shape[2]
        and query.shape[3] == value.shape[3]
    )
    if not plain:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return whole
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (tensor.to(dtype).flatten(0, 1) for tensor in (query, key, value))
    out = causal_attention(queries, keys, values, scale).view(*query.shape)
    return out.transpose(1, 2).contiguous(), None


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale query keyᵀ, earlier positions only) value; all of them [batch * heads, time, width]."""
    attended: torch.Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return attended


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
        out = torch.empty_like(query)
        blocks, kept = _blocks(query), []
        with torch.autocast("cpu", enabled=False):
            for heads, at, seen in blocks:
                weights = _weights(query[heads, at], key[heads, seen], scale)
                out[heads, at] = torch.bmm(weights, value[heads, seen])
                if query.shape[1] <= KEPT_LENGTH:
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        slopes = outputs[0]
        for_query, for_key, for_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        with torch.autocast("cpu", enabled=False):
            for number, (heads, at, seen) in enumerate(ctx.blocks):
                queries, keys, slope = query[heads, at], key[heads, seen], slopes[heads, at]
                weights = kept[number] if kept else _weights(queries, keys, ctx.scale)
                for_scores = torch._softmax_backward_data(
                    torch.bmm(slope, value[heads, seen].mT), weights, -1, weights.dtype
                )
                for_query[heads, at] = _scaled_bmm(for_scores, keys, ctx.scale)
                for_key[heads, seen] += _scaled_bmm(for_scores.mT, queries, ctx.scale)
                for_value[heads, seen] += torch.bmm(weights.mT, slope)
        return for_query, for_key, for_value, None


def _blocks(query: torch.Tensor) -> list[tuple[slice, slice, slice]]:
    """Heads, queries and the keys that they may see, block by block."""
    count, length, _ = query.shape
    width = min(length, BLOCK_QUERIES)
    heads = max(1, BLOCK_BYTES * torch.get_num_threads() // (length * width * query.element_size()))
    return [
        (slice(head, head + heads), slice(at, min(at + width, length)), slice(0, min(at + width, length)))
        for head in range(0, count, heads)
        for at in range(0, length, width)
    ]


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """The probabilities [heads, queries, keys]; the last key is that of the last query."""
    scores = _scaled_bmm(query, key.mT, scale)
    size = query.shape[1]
    scores[:, :, -size:] += scores.new_full((size, size), float("-inf")).triu_(1)
    return scores.softmax(-1)


def _scaled_bmm(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    # The product's own factor: one pass over the scores less than multiplying them afterwards.
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)
