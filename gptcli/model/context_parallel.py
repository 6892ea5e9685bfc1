"""Rows divided along their length over processes: each has the queries of its tokens, and the keys and values of all.

Keys and values are gathered before attention, which with grouped queries are small (Dubey et al. 2024,
arXiv:2407.21783, section 3.3.2). Of n processes process i takes pieces i and 2n - 1 - i of a row's 2n: as much causal
work as each other. torch's ring attention (2.13) knows kernels of GPUs alone; on a CPU each process would see its own
tokens only, and nothing would say so. What a model does with a row beside attention is tried (`check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gptcli.errors import RecipeError, first_line
from gptcli.launch import rank
from gptcli.model.kernels import attend_in_place_of_sdpa
from gptcli.model.load import evaluating
from gptcli.model.outputs import first_apart, module_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "gptcli_context_parallel"
_INSTEAD = "Set launch.parallel.cp: 1."
# torch 2.13 has new names for these, and warns of the old ones.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Cut:
    """How a row is divided: over whom, which of them this process is, and how many they are."""

    group: Any
    index: int
    parts: int

    @property
    def pieces(self) -> tuple[int, int]:
        """The numbers, of 2 * parts, of the pieces that this process takes."""
        return self.index, 2 * self.parts - 1 - self.index

    def of_row(self, values: torch.Tensor) -> torch.Tensor:
        """What this process takes of values [batch, length]: [batch, length / parts]."""
        pieces = values.chunk(2 * self.parts, dim=1)
        return torch.cat([pieces[number] for number in self.pieces], dim=1)

    def inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's inputs [batch, length] of this process, with the positions that they have in the whole row."""
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return {name: self.of_row(values) for name, values in {"position_ids": positions, **inputs}.items()}


_active: Cut | None = None


def prepare(model: PreTrainedModel, parts: int, tensor_parallel: int, processes: int) -> Cut:
    """Let a model attend to rows that are divided into so many parts, and say how; for all processes to call.

    Raises:
        RecipeError: the model has an attention of its own.
    """
    if not attend_in_place_of_sdpa(model, NAME, _attend, _mask):
        raise RecipeError(
            f"launch.parallel.cp: {type(model).__name__} has an attention of its own, which sees one process's tokens",
            remedy=_INSTEAD,
        )
    shape = (processes // parts // tensor_parallel, parts, tensor_parallel)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("rows", "cp", "tp"))
    return Cut(mesh["cp"].get_group(), rank() // tensor_parallel % parts, parts)


@contextmanager
def attending(cut: Cut | None) -> Iterator[None]:
    """Inside, forward and backward passes are those of divided rows."""
    global _active
    _active = cut
    try:
        yield
    finally:
        _active = None


def check(model: PreTrainedModel, cut: Cut, length: int) -> None:
    """Refuse a model that does something else where rows are divided; for all processes to call.

    The output of every module is compared, since a convolution that sees too little hardly changes the logits of a
    model that has not learnt yet.

    Args:
        model: on its device, in the precision of training.
        cut: how rows are divided.
        length: of a row. What is tried is as short as goes, but longer than a sliding window that rows are longer than.

    Raises:
        RecipeError: it does something else with a row than attention (a convolution, a recurrence).
    """
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    least = 8 * cut.parts
    tried = min(length, -(-2 * window // least) * least) if window < length else least
    device = next(model.parameters()).device
    ids = (torch.arange(max(tried, least), device=device) * 7919 % min(997, text.vocab_size))[None]
    half = model.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    with torch.no_grad(), evaluating(model):
        expected = {name: cut.of_row(output) for name, output in module_outputs(model, {"input_ids": ids}).items()}
        try:
            with attending(cut):
                found = module_outputs(model, cut.inputs({"input_ids": ids}))
            why = first_apart(found, expected, 0.1 if half else 1e-3)
        except (TypeError, ValueError, RuntimeError) as error:
            why = first_line(error)
    # The same on all processes of a row, so that none goes on alone.
    refused = torch.tensor(why is not None, dtype=torch.int32, device=device)
    dist.all_reduce(refused, dist.ReduceOp.MAX)
    if refused:
        raise RecipeError(
            f"launch.parallel.cp: {type(model).__name__} cannot take divided rows ({why or 'as others found'})",
            remedy=_INSTEAD,
        )


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """See transformers' `sdpa_attention_forward`: [batch, heads, time, width] to [batch, time, heads, width]."""
    from torch.nn.attention.bias import causal_lower_right
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    cut = _active
    if cut is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    every_key, every_value = _whole_row(key, cut), _whole_row(value, cut)
    window = options.get("sliding_window")
    outputs = []
    for number, queries in zip(cut.pieces, query.chunk(2, dim=2), strict=True):
        size = queries.shape[2]
        end = (number + 1) * size
        start = 0 if window is None else max(0, end - size - window + 1)
        bias: Any = causal_lower_right(size, end - start)
        if window is not None and window < end:
            bias = _windowed(size, end - start, window, queries.device)
        keys, values = (every[:, :, start:end] for every in (every_key, every_value))
        groups = queries.shape[1] // keys.shape[1]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                queries,
                repeat_kv(keys, groups),
                repeat_kv(values, groups),
                attn_mask=bias,
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _windowed(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of the keys each of the last positions sees, itself and the `window` - 1 before: bool [queries, keys]."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) & (back < window)


def _mask(**options: Any) -> torch.Tensor | None:
    """transformers' `sdpa_mask`; none where rows are divided, which `_attend` sees to itself."""
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = None if _active is not None else sdpa_mask(**options)
    return mask


def _whole_row(part: torch.Tensor, cut: Cut) -> torch.Tensor:
    """[batch, heads, length, width] of every process's [batch, heads, length / parts, width], in the row's order."""
    halves = _Gathered.apply(part.contiguous(), cut.group, cut.parts).chunk(2, dim=3)  # type: ignore[no-untyped-call]
    first, second = (half.unbind() for half in halves)
    return torch.cat([*first, *reversed(second)], dim=2)


class _Gathered(torch.autograd.Function):
    """The tensors of all processes, [parts, ...]; backward, the sum of what all have for this one's."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any, parts: int) -> torch.Tensor:
        ctx.group = group
        every = part.new_empty(parts * part.shape[0], *part.shape[1:])
        _gather(every, part, group=group)
        return every.view(parts, *part.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        slopes = outputs[0]
        own = slopes.new_empty(slopes.shape[1:])
        _reduce_scatter(own, slopes.flatten(0, 1).contiguous(), group=ctx.group)
        return own, None, None
