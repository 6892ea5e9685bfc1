"""The dry step: the largest micro-batch that fits a device, found by running it before training.

A forward and backward pass of full rows, beside all that is there in a step of training: weights, gradients and room
for the optimizer's state. Compiled models are tried as they are before compiling, which needs more. If the answer is
too large all the same, the first steps of training halve it (train/backoff.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from gptcli.device import free_memory, is_out_of_memory, total_memory
from gptcli.train.batches import GPU_MICRO_BATCH_TOKENS
from gptcli.train.loss import TrainingLoss
from gptcli.train.plan import dry_step_sizes, loss_block
from gptcli.train.strategy import HEAD_ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.schema import Train
    from gptcli.train.plan import Plan


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool], *, first: int) -> int | None:
    """The largest of ascending sizes that fits, or None; by halving, so with a logarithm of their number in tries.

    Args:
        sizes: ascending; whatever is smaller than one that fits has to fit as well.
        fits: tries a size.
        first: the size to try first, one of `sizes`.
    """
    fit, beyond = 0, len(sizes)  # sizes[:fit] do, sizes[beyond:] do not
    at = sizes.index(first)
    while fit < beyond:
        if fits(sizes[at]):
            fit = at + 1
        else:
            beyond = at
        at = (fit + beyond) // 2
    return sizes[fit - 1] if fit else None


def dry_step(model: PreTrainedModel, plan: Plan, train: Train) -> tuple[int | None, str]:
    """The largest micro-batch whose pass fits, in rows (None: not one row does), and how that is known.

    Afterwards nothing is left of it: random state, gradients, settings and the allocator's peak are as before.

    Args:
        model: the model in fp32, on its device.
        plan: says which sizes there are, the first to try, the precision and the optimizer's size.
        train: the recipe's section.
    """
    sizes, spare = dry_step_sizes(plan), int(HEAD_ROOM * total_memory(model.device))
    rows = largest_micro_batch(model, plan, train, sizes=sizes, spare_bytes=spare)
    if rows is None:
        return None, "dry step"
    fits = f"dry step: it fits beside the optimizer's state with {HEAD_ROOM:.0%} of the memory to spare"
    if rows < sizes[-1]:
        return rows, f"{fits}, {sizes[sizes.index(rows) + 1]} do not"
    share = rows == plan.micro_batch_size * plan.gradient_accumulation_steps
    return rows, f"{fits}; {'the whole batch' if share else f'within {GPU_MICRO_BATCH_TOKENS // 1024}K tokens'}"


def largest_micro_batch(
    model: PreTrainedModel, plan: Plan, train: Train, *, sizes: Sequence[int], spare_bytes: int
) -> int | None:
    """The largest of `sizes` whose pass fits beside the optimizer's state and `spare_bytes`; see `dry_step`."""
    cuda = model.device.type == "cuda"
    with torch.random.fork_rng([model.device] if cuda else []), _as_in_training(model, train):
        try:
            held = _hold(model, plan.memory.get("optimizer", 0) + spare_bytes)
            if held is None:
                return None
            return largest_that_fits(sizes, lambda rows: _fits(model, plan, train, rows), first=plan.micro_batch_size)
        finally:
            model.zero_grad(set_to_none=True)
            held = None
            free_memory()
            if cuda:
                torch.cuda.reset_peak_memory_stats(model.device)


def _hold(model: PreTrainedModel, size: int) -> torch.Tensor | None:
    """Allocate the gradients, and bytes that stand for the optimizer's state; None when there is no room for them."""
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        return torch.empty(size, dtype=torch.uint8, device=model.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _fits(model: PreTrainedModel, plan: Plan, train: Train, rows: int) -> bool:
    failed: BaseException | None = None
    try:
        _pass(model, plan, train, rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = error
    free_memory(failed)
    return failed is None


def _pass(model: PreTrainedModel, plan: Plan, train: Train, rows: int) -> None:
    """Forward and backward of `rows` full rows, as in a step of training."""
    device, length = model.device, plan.sequence_length
    vocabulary = int(model.config.get_text_config().vocab_size)
    block = loss_block(rows * length, vocabulary, logit_bytes=plan.logit_bytes)
    ids = (torch.arange(rows * length, device=device) % vocabulary).view(rows, length)
    loss = TrainingLoss(model, block=block, z_loss=train.z_loss, smoothing=train.label_smoothing)
    half = torch.float16 if plan.precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=half, enabled=plan.precision != "fp32"):
        objective = loss(model, {"input_ids": ids}, ids)[2]
    objective.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _as_in_training(model: PreTrainedModel, train: Train) -> Iterator[None]:
    training, cache = model.training, getattr(model.config, "use_cache", None)
    model.train()
    if cache is not None:
        model.config.use_cache = False
    if train.activation_checkpointing:
        model.activation_checkpointing_enable()
    try:
        yield
    finally:
        if train.activation_checkpointing:
            model.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
        if cache is not None:
            model.config.use_cache = cache
        model.train(training)
