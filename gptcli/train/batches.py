"""How a step is divided: the global batch over processes, micro-batches and accumulation, and steps over the run.

Only whole divisors are taken, so that the global batch is what the recipe says on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from gptcli.errors import RecipeError, UsageError
from gptcli.train.decisions import Decision, Hardware

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe

CPU_MICRO_BATCH_TOKENS = 8 * 1024
# More at once gains nothing on a GPU: n tokens by a w x w matrix are n w / (2 n + w) operations a byte in bf16, for 64K
# tokens and w = 1024 within 1% of the most that it can be, and a pass of 64K tokens through 124 M parameters is 5e13
# FLOPs, a tenth of a second on an H100, beside which launching some thousand kernels is little.
GPU_MICRO_BATCH_TOKENS = 64 * 1024
# Where rows are of many lengths, a micro-batch of the longest may hold so many times that.
CPU_LONGEST = 4
MICRO_BATCH = "train.micro_batch_size"
_LENGTH_KEYS = ("max_tokens", "max_steps", "epochs")


def check_rows(loaded: LoadedRecipe) -> None:
    """Refuse what rows of whole documents do not go with.

    Raises:
        RecipeError: rows that are divided over processes, or compiling for rows of many lengths.
    """
    recipe = loaded.recipe
    packing = recipe.data.packing if recipe.data else "concat"
    if packing != "concat" and recipe.launch.parallel.cp > 1:
        raise RecipeError(
            f"launch.parallel.cp: {recipe.launch.parallel.cp} divides rows of one text, and data.packing is {packing}",
            where=loaded.where("launch.parallel.cp"),
            remedy="Set launch.parallel.cp: 1, or data.packing: concat for format text.",
        )
    if packing == "none" and recipe.train.compile is True:
        raise RecipeError(
            "train.compile: true compiles for one length of rows, and data.packing: none has many",
            where=loaded.where("train.compile"),
            remedy="Set data.packing: isolated, or leave train.compile to auto.",
        )


def data_parallel(loaded: LoadedRecipe, hardware: Hardware) -> int:
    """The processes, or groups of them, that split a batch: all, divided by those that split a model.

    Raises:
        RecipeError: the processes are no multiple of `launch.parallel`'s.
    """
    parallel, world = loaded.recipe.launch.parallel, hardware.processes
    group = parallel.tp * parallel.cp
    if world % group:
        raise RecipeError(
            f"launch.parallel: {parallel.tp} x {parallel.cp} devices a model do not divide {world} processes",
            where=loaded.where("launch.parallel"),
            remedy=f"The nearest numbers of processes that they divide: {_both(_multiples(world, group))}.",
        )
    return world // group


def global_batch(loaded: LoadedRecipe, length: int, decisions: list[Decision]) -> int:
    """Rows of a step over all processes.

    Raises:
        RecipeError: `global_batch_tokens` are less than a row.
    """
    train = loaded.recipe.train
    batch = train.rows_of_step(length)
    if train.global_batch_tokens is None:
        return batch
    if batch < 1:
        raise RecipeError(
            f"train.global_batch_tokens: {train.global_batch_tokens:,} tokens are less than one row of {length:,}",
            where=loaded.where("train.global_batch_tokens"),
            remedy=f"Set it to at least {length}, or use train.global_batch_size (rows).",
        )
    rest = train.global_batch_tokens - batch * length
    reason = f"{train.global_batch_tokens:,} tokens / {length:,}" + (f", {rest:,} left over" if rest else "")
    decisions.append(Decision("train.global_batch_size", f"{batch:,}", reason))
    return batch


def share_of_batch(loaded: LoadedRecipe, length: int, batch: int, processes: int) -> int:
    """The rows of a step that are one process's.

    Raises:
        RecipeError: the rows do not divide; the nearest that do are named, in tokens where the recipe has tokens.
    """
    if batch % processes == 0:
        return batch // processes
    near, tokens = _multiples(batch, processes), loaded.recipe.train.global_batch_tokens
    key, size = "train.global_batch_size", f"{batch} rows"
    if tokens is not None:
        key, size = "train.global_batch_tokens", f"{tokens:,} tokens are {batch} rows, which"
        near = [rows * length for rows in near]
    raise RecipeError(
        f"{key}: {size} do not divide over {processes} processes",
        where=loaded.where(key),
        remedy=f"The nearest that do: {_both(near)}.",
    )


def micro_batch(
    loaded: LoadedRecipe,
    length: int,
    share: int,
    hardware: Hardware,
    fits: Callable[[int], bool],
    decided: Mapping[str, str],
    decisions: list[Decision],
    *,
    whole: bool = True,
    usual: int | None = None,
    alone: str | None = None,
) -> tuple[int, bool]:
    """Rows of a micro-batch, and whether a dry step is to find them.

    Args:
        loaded: the recipe.
        length: tokens of a row.
        share: rows of a step that are one process's.
        hardware: the device.
        fits: whether so many rows are estimated to fit a GPU.
        decided, decisions: see `make_plan`.
        whole: whether a process holds the whole model, which one process can try on its device then.
        usual: tokens that rows have on average, where they are of any length up to `length`.
        alone: as in `make_plan`.

    Raises:
        RecipeError: the recipe's own micro-batch does not divide the share.
    """
    given, sizes = loaded.recipe.train.micro_batch_size, divisors(share)
    if isinstance(given, int) and given not in sizes:
        near = [max((d for d in sizes if d < given), default=1), min((d for d in sizes if d > given), default=share)]
        raise RecipeError(
            f"train.micro_batch_size: {given} does not divide the {share} rows of a process",
            where=loaded.where("train.micro_batch_size"),
            remedy=f"The nearest that do: {_both(near)}; or auto.",
        )
    before = decided.get(MICRO_BATCH, "")
    if before in [str(size) for size in sizes]:
        decisions.append(Decision(MICRO_BATCH, before, "as at the checkpoint"))
        return int(before), False
    if isinstance(given, int):
        return given, False
    if alone is not None:
        decisions.append(Decision(MICRO_BATCH, "1", alone))
        return 1, False
    if hardware.kind == "cpu":
        size = usual or length
        micro = next((rows for rows in sizes if rows * size >= CPU_MICRO_BATCH_TOKENS), share)
        reason = f"CPU: the smallest that holds {CPU_MICRO_BATCH_TOKENS // 1024}K tokens"
        reason += "" if micro * size >= CPU_MICRO_BATCH_TOKENS else ", at most the global batch"
        if micro * length > (most := CPU_LONGEST * max(CPU_MICRO_BATCH_TOKENS, length)) and usual:
            micro = max(rows for rows in sizes if rows * length <= most)
            reason = f"CPU: the largest whose longest rows have at most {most // 1024}K tokens"
        decisions.append(Decision(MICRO_BATCH, str(micro), reason))
        return micro, False
    micro = max((rows for rows in sizes if rows * length <= GPU_MICRO_BATCH_TOKENS and fits(rows)), default=1)
    dry_step = whole and hardware.kind == "cuda"
    reason = f"the largest that is estimated to fit, within {GPU_MICRO_BATCH_TOKENS // 1024}K tokens"
    reason += "; a dry step before training decides" if dry_step else ""
    decisions.append(Decision(MICRO_BATCH, str(micro), reason))
    return micro, dry_step


def steps_and_rows(
    loaded: LoadedRecipe, length: int, batch: int, rows: int | None, decisions: list[Decision]
) -> tuple[int, int]:
    """Steps and rows of the whole run. With `epochs` the last step may be smaller.

    Raises:
        RecipeError: nothing says how long to train.
    """
    train = loaded.recipe.train
    if train.max_steps is not None:
        return train.max_steps, train.max_steps * batch
    if train.max_tokens is not None:
        steps = math.ceil(train.max_tokens / (batch * length))
        full = "" if loaded.recipe.data is None or loaded.recipe.data.packing == "concat" else ", padding counted"
        reason = f"{train.max_tokens:,} tokens / ({batch} rows x {length}{full})"
        decisions.append(Decision("train.max_steps", f"{steps:,}", reason))
        return steps, steps * batch
    if train.epochs is not None:
        if rows is None:
            raise UsageError("train.epochs cannot be planned before the data is tokenized")
        # The recipe's decimal number, not its binary neighbour: 1.1 epochs of 10 rows are 11 rows.
        total = math.ceil(Fraction(str(train.epochs)) * rows)
        steps = math.ceil(total / batch)
        decisions.append(
            Decision("train.max_steps", f"{steps:,}", f"{train.epochs:g} epochs x {rows:,} rows / {batch}")
        )
        return steps, total
    raise RecipeError(
        f"train: one of {', '.join(_LENGTH_KEYS)} must say how long to train",
        where=loaded.where("train"),
        remedy="For example: train: {max_tokens: 20M}",
    )


def count_of_steps(key: str, value: int | float, steps: int, decisions: list[Decision]) -> int:
    """A number of steps from an int (steps) or a float (share of all steps)."""
    if isinstance(value, int):
        return min(value, steps)
    count = round(value * steps)
    decisions.append(Decision(key, f"{count} steps", f"{value:.3%} of {steps:,}".replace(".000%", "%")))
    return count


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def next_smaller(rows: int) -> int:
    """The largest divisor of a micro-batch that is at most half of it."""
    return max(size for size in divisors(rows) if size <= max(1, rows // 2))


def _multiples(number: int, of: int) -> list[int]:
    return [max(1, number // of) * of, (number // of + 1) * of]


def _both(near: list[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(near)))
