"""The training loss: summed natural-log cross entropy, in fp32 whatever the precision of the logits.

The model's own loss is not used: rows already hold their next tokens as labels, and the sum is divided by the count
of tokens over the whole global batch, so that accumulation and processes do not change the result.

With many tokens and a large vocabulary the logits are the largest tensor of a step, and three of its size are needed.
There the output head takes a block of positions at a time and works out the gradient while the block's logits are
there, so that they are never whole and nothing is computed twice (as in Liger's fused linear cross entropy, Hsu et al.
2024, arXiv:2410.10989).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from gptcli.model.build import is_product, output_head
from gptcli.model.load import evaluating
from gptcli.train import liger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.schema import Train
    from gptcli.reporting import Reporter
    from gptcli.train.plan import Plan

IGNORED = -100
PROBE_TOKENS = 8
# Values that a CPU works on at once, for each thread: in fp32 they fit in its cache.
CACHED = 1 << 18
# logits [n, vocabulary], bias, targets [n], z_loss, dtype, smoothing -> [nats, objective], the gradient and the bias's.
Slopes = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, float, torch.dtype, float],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats summed over the labels that are not -100.

    Args:
        logits: [batch, time, vocabulary], any float type.
        labels: [batch, time], the next token of each position (already shifted), -100 where there is none.
    """
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def summed_squares(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The squared log of the softmax's normaliser, summed over the labels that are not -100; shapes as `summed_loss`.

    `z_loss` times it keeps the logits from drifting (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """
    normalisers = logits.float().logsumexp(-1)
    return (normalisers.square() * labels.ne(IGNORED)).sum()


def summed_gaps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A label's logit above the mean of all logits, summed over the labels that are not -100; shapes as `summed_loss`.

    `smoothing` times it is what label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7) adds to the cross
    entropy, since the normaliser is that of all tokens: the loss of torch's `cross_entropy(label_smoothing=...)`.
    """
    logits = logits.float()
    own = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return ((own - logits.mean(-1)) * labels.ne(IGNORED)).sum()


class TrainingLoss:
    """The loss of a model, with whole logits or in blocks.

    Args:
        model: the model itself, without wrappers.
        block: positions whose logits are there at once; None: all.
        z_loss: weight of `summed_squares`.
        smoothing: that of `summed_gaps`.
        kernel: blocks, or liger for its fused kernel (see `liger.py`) where that gives the same loss.
        compiled: whether the arithmetic between a block's products is one compiled kernel.

    Attributes:
        kernel: the one that is used where logits are not whole.
        in_blocks: whether the logits are made in blocks: a model whose head is no plain matrix, or which does more with
            what the head returns, gets whole ones. That is not looked up but tried, on a few tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        block: int | None,
        z_loss: float,
        smoothing: float = 0.0,
        kernel: str = "blocks",
        compiled: bool = False,
    ) -> None:
        head = output_head(model)
        self._head: Any = head if is_product(head) else None
        self._block = block
        self._z_loss, self._smoothing = z_loss, smoothing
        self._labels = threading.local()
        self._taking_lock = threading.Lock()
        self._takers = 0
        self._slopes: Slopes = torch.compile(block_slopes, dynamic=False) if compiled else slopes_in_pieces
        self.in_blocks, self.kernel = False, kernel
        if block is not None and self._head is not None:
            self.in_blocks = self._is_exact(model)
            if not self.in_blocks and kernel != "blocks":
                self.kernel = "blocks"
                self.in_blocks = self._is_exact(model)

    def use_block(self, block: int | None) -> None:
        """Take another block, or whole logits (None): for smaller micro-batches. What was tried of the model holds."""
        self._block, self.in_blocks = block, self.in_blocks and block is not None

    def __call__(
        self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The model's outputs, the nats (without gradient) and what is to be minimised, both summed over labels."""
        # `use_cache`: transformers turns it off in the configuration of the whole model alone. The text model in one
        # that sees or hears would keep a cache, and with one it does not look for the documents of a row.
        if self.in_blocks:
            with self._taking(labels):
                outputs = model(**inputs, use_cache=False)
            nats, objective = outputs.logits.unbind()
            return outputs, nats.detach(), objective
        outputs = model(**inputs, use_cache=False)
        nats = summed_loss(outputs.logits, labels)
        objective = nats
        if self._z_loss:
            objective = objective + self._z_loss * summed_squares(outputs.logits, labels)
        if self._smoothing:
            objective = objective + self._smoothing * summed_gaps(outputs.logits, labels)
        return outputs, nats.detach(), objective

    @contextmanager
    def _taking(self, labels: torch.Tensor) -> Iterator[None]:
        """Inside, the head takes hidden states to [nats, objective]; what the head returns is the model's `logits`.

        In the head's own forward, since that is where wrappers (DDP, FSDP) have its weights ready. Several threads may
        be inside, each with its own labels.
        """
        head = self._head
        assert head is not None
        self._labels.flat = labels.flatten()
        with self._taking_lock:
            self._takers += 1
            head.forward = self._take
        try:
            yield
        finally:
            with self._taking_lock:
                self._takers -= 1
                if not self._takers:
                    del head.forward

    def _take(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self._head
        assert head is not None and self._block is not None
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        rows = hidden.flatten(0, -2).to(dtype)
        bias = getattr(head, "bias", None)
        if self.kernel == "liger":
            return liger.losses(rows, head.weight, bias, self._labels.flat, self._z_loss)
        extras = self._z_loss, self._smoothing
        values: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, head.weight, bias, self._labels.flat, self._block, extras, self._slopes
        )
        return values

    def _is_exact(self, model: PreTrainedModel) -> bool:
        """Whether the loss through the head is that of the model's own logits."""
        assert self._head is not None
        ids = (torch.arange(PROBE_TOKENS, device=self._head.weight.device) % 2)[None]
        with torch.no_grad(), evaluating(model):
            expected = summed_loss(model(input_ids=ids).logits, ids)
            try:
                with self._taking(ids):
                    found = model(input_ids=ids).logits
            except (RuntimeError, IndexError, TypeError, ValueError, ImportError):  # something else is done with them
                return False
        return found.shape == (2,) and torch.allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def build_loss(model: PreTrainedModel, plan: Plan, train: Train, reporter: Reporter) -> TrainingLoss:
    """The loss that a plan has for a model, or the next best one that is exact, which is said."""
    loss = TrainingLoss(
        model,
        block=plan.loss_block,
        z_loss=train.z_loss,
        smoothing=train.label_smoothing,
        kernel=plan.block_kernel,
        compiled=plan.compile,
    )
    if plan.loss_block is not None and not loss.in_blocks:
        reporter.say("loss: this model does more than multiply in its head: the logits of a micro-batch are whole")
    elif loss.in_blocks and loss.kernel != plan.block_kernel:
        reporter.say(f"loss: {plan.block_kernel} does not give this model's loss here: in blocks of our own")
    return loss


def block_slopes(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    z_loss: float,
    dtype: torch.dtype,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """[nats, objective] of a block, the objective's gradient by its logits in `dtype`, and by the bias in fp32.

    Args:
        logits: [n, vocabulary] without the bias; fp32 ones are overwritten.
        bias: [vocabulary] or None.
        targets: [n], -100 where there is none.
        z_loss: weight of `summed_squares`.
        dtype: of the gradient.
        smoothing: weight of `summed_gaps`.
    """
    logits = logits.float()
    if bias is not None:
        logits += bias
    known = targets.ne(IGNORED)
    picked = targets.clamp(min=0)[:, None]
    own = logits.gather(1, picked)[:, 0]
    gaps = (own - logits.mean(-1)) * known if smoothing else None
    # One exponential for the loss and its gradient, in the logits' own memory: logsumexp would be one more, and a copy.
    largest = logits.amax(-1, keepdim=True)
    slopes = logits.sub_(largest).exp_()
    total = slopes.sum(-1)
    normalisers = total.log() + largest[:, 0]
    nats = ((normalisers - own) * known).sum()
    objective = nats + z_loss * (normalisers.square() * known).sum()
    # The gradient of the objective: softmax * (1 + 2 z normaliser), less one at the label; of one that is smoothed
    # less its share there, and the rest at all.
    slopes *= (known * (1 + 2 * z_loss * normalisers) / total)[:, None]
    if gaps is not None:
        objective = objective + smoothing * gaps.sum()
        slopes -= (known * (smoothing / slopes.shape[1]))[:, None]
    sums, share = torch.stack([nats, objective]), 1.0 - smoothing
    if torch.compiler.is_compiling():
        # Pointwise, so that the compiler makes one pass of all of it; a scatter would be passes of its own.
        here = torch.arange(slopes.shape[1], device=slopes.device).eq(picked) & known[:, None]
        slopes = slopes - share * here.float()
    else:
        slopes.scatter_add_(1, picked, -share * known[:, None].float())
    return sums, slopes.to(dtype), None if bias is None else slopes.sum(0)


def slopes_in_pieces(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    z_loss: float,
    dtype: torch.dtype,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`block_slopes` as it is fast without a compiler: on a CPU by rows that fit in its cache, in the logits' place."""
    if logits.device.type != "cpu" or logits.dtype != dtype:
        return block_slopes(logits, bias, targets, z_loss, dtype, smoothing)
    size = _cached_rows(logits)
    sums, for_bias = torch.zeros(2), None if bias is None else torch.zeros(len(bias))
    for rows, wanted in zip(torch.split(logits, size), torch.split(targets, size), strict=True):
        values, slopes, bias_slopes = block_slopes(rows, bias, wanted, z_loss, torch.float32, smoothing)
        sums += values
        if for_bias is not None and bias_slopes is not None:
            for_bias += bias_slopes
        if slopes.data_ptr() != rows.data_ptr():
            rows.copy_(slopes)
    return sums, logits, for_bias


def _cached_rows(matrix: torch.Tensor) -> int:
    return max(1, CACHED * torch.get_num_threads() // matrix.shape[1])


def _add(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part, of another type; a CPU would convert all of the part first."""
    size = _cached_rows(total) if total.device.type == "cpu" else len(total)
    for sums, values in zip(torch.split(total, size), torch.split(part, size), strict=True):
        sums += values


class _LinearCrossEntropy(torch.autograd.Function):
    """[nats, objective] of hidden [n, width], weight [vocabulary, width], bias and labels [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        bias: Any,
        labels: Any,
        block: int,
        extras: tuple[float, float],
        slopes_of: Slopes,
    ) -> torch.Tensor:
        z_loss, smoothing = extras
        with torch.autocast(hidden.device.type, enabled=False):
            wanted = ctx.needs_input_grad[:3]
            matrix = weight.to(hidden.dtype)
            for_hidden = torch.empty_like(hidden) if wanted[0] else None
            for_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
            for_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
            sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
            logits = hidden.new_empty(min(block, len(hidden)), len(weight))
            product: torch.Tensor | None = None
            for rows, targets, at in zip(
                hidden.split(block), labels.split(block), range(0, len(hidden), block), strict=True
            ):
                # A last block of another size is not worth compiling for.
                make = slopes_of if len(rows) == block else slopes_in_pieces
                made = torch.mm(rows, matrix.mT, out=logits[: len(rows)])
                values, slopes, bias_slopes = make(made, bias, targets, z_loss, hidden.dtype, smoothing)
                sums += values
                if for_bias is not None and bias_slopes is not None:
                    for_bias += bias_slopes
                if for_hidden is not None:
                    torch.mm(slopes, matrix, out=for_hidden[at : at + block])
                if for_weight is not None and hidden.dtype == torch.float32:
                    for_weight.addmm_(slopes.mT, rows)
                elif for_weight is not None:
                    product = slopes.mT @ rows if product is None else torch.mm(slopes.mT, rows, out=product)
                    _add(for_weight, product)
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return sums

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        slope = outputs[0][1]  # of the objective; the nats are only looked at
        for_hidden, for_weight, for_bias = ctx.saved_tensors
        dtypes = (None if for_hidden is None else for_hidden.dtype, *ctx.dtypes)
        # In place: a second tensor of the weight's size is what this class is to save. The graph is gone after this.
        scaled = [
            None if values is None else values.mul_(slope).to(dtype)
            for values, dtype in zip((for_hidden, for_weight, for_bias), dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)
