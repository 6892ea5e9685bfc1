"""Every number that a run derives from its recipe, decided once, with the reason of each. Pure arithmetic.

Training reads a `Plan`, `gptcli plan` prints it, and no second place computes the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError, UsageError
from gptcli.train import modes
from gptcli.train.decisions import Choices, Decision, Hardware
from gptcli.train.memory import mebibytes, memory_estimate

if TYPE_CHECKING:
    from gptcli.model.build import Counts
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Train

CPU_MICRO_BATCH_TOKENS = 8 * 1024
# More at once gains nothing on a GPU: n tokens by a w x w matrix are n w / (2 n + w) operations a byte in bf16, for 64K
# tokens and w = 1024 within 1% of the most that it can be, and a pass of 64K tokens through 124 M parameters is 5e13
# FLOPs, a tenth of a second on an H100, beside which launching some thousand kernels is little.
GPU_MICRO_BATCH_TOKENS = 64 * 1024
# Of a GPU's memory, what a dry step leaves: fragments, libraries' workspaces, evaluation.
HEAD_ROOM = 0.05
# Whole logits below this, blocks of about as much above (fp32); a GPU's products need more rows to be fast.
LOGIT_BYTES = 32 << 20
GPU_LOGIT_BYTES = 256 << 20
LEAST_BLOCK = 512
# Work of a micro-batch from which two threads with half of its rows each are faster than two threads that share every
# operation (train/halves.py, benchmarks/halves.py). Below, Python's lock is what they wait for.
HALVES_FLOPS = 3e9
HALVES = "micro-batch"
MICRO_BATCH = "train.micro_batch_size"
_LENGTH_KEYS = ("max_tokens", "max_steps", "epochs")


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run. Batches are counted in rows, sizes in bytes, work in FLOPs.

    `dry_step`: the micro-batch is an estimate, which a dry step on the device is to put right before training.
    """

    sequence_length: int
    global_batch_size: int
    processes: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    dry_step: bool
    steps: int
    total_rows: int
    total_tokens: int
    rows_per_epoch: int | None
    epochs: float | None
    warmup_steps: int
    decay_steps: int
    log_every: int
    eval_every: int
    save_every: int
    precision: str
    tf32: bool
    compile: bool
    attention: str
    loss_block: int | None
    logit_bytes: int
    block_kernel: str
    halves: bool
    parameters: int
    matrix_parameters: int
    flops_per_token: int
    total_flops: int
    memory: dict[str, int]
    memory_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    decisions: tuple[Decision, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return asdict(self)

    @property
    def decided(self) -> dict[str, str]:
        """Each decided value by its key, as a checkpoint records it."""
        return {decision.key: decision.value for decision in self.decisions}

    def tokens_at(self, step: int) -> int:
        """Input tokens consumed after `step` steps."""
        return min(step * self.global_batch_size, self.total_rows) * self.sequence_length


def make_plan(
    loaded: LoadedRecipe,
    counts: Counts,
    hardware: Hardware,
    *,
    rows_per_epoch: int | None,
    decided: Mapping[str, str] | None = None,
    usable: Set[str] = frozenset(),
) -> Plan:
    """Derive everything.

    Args:
        loaded: the recipe.
        counts: the model's parameters.
        hardware: the device and the number of processes.
        rows_per_epoch: rows of `sequence_length` in the training data; None when the data was not read (then
            `train.epochs` cannot be planned).
        decided: what `auto` stood for in the checkpoint that the run goes on from: used again, so that a resume on
            another machine does not change the arithmetic.
        usable: the attention implementations that the model's code can use.

    Raises:
        RecipeError: no length of training, or batches that do not divide.
    """
    recipe = loaded.recipe
    train, data = recipe.train, recipe.data
    assert data is not None
    length = data.sequence_length
    decisions: list[Decision] = []
    batch = _global_batch(loaded, length, decisions)
    micro, dry_step = _micro_batch(loaded, counts, batch, hardware, decided or {}, decisions)
    accumulation = batch // hardware.processes // micro
    steps, total_rows = _steps(loaded, length, batch, rows_per_epoch, decisions)
    warmup = _count("train.warmup", train.warmup, steps, decisions)
    decay = _count("train.decay", train.decay, steps, decisions) if train.lr_scheduler == "wsd" else 0
    choice, packing = Choices(decided or {}, decisions), data.packing or "concat"
    precision = choice("train.precision", train.precision, lambda: modes.auto_precision(hardware))
    tf32 = modes.auto_tf32(hardware) and "tf32" not in train.trainer_args
    if tf32 and precision == "fp32":
        reason = "fp32 products rounded to 10 bits of mantissa on this GPU; train.trainer_args={tf32: false}: not"
        decisions.append(Decision("tf32", "on", reason))
    compiled = (
        choice("train.compile", train.compile, lambda: modes.auto_compile(hardware, precision=precision, steps=steps))
        == "on"
    )
    attention = choice(
        "train.attention",
        train.attention,
        lambda: modes.auto_attention(
            hardware, usable=usable, precision=precision, length=length, packing=packing, compiled=compiled
        ),
    )
    logit_bytes = LOGIT_BYTES if hardware.kind == "cpu" else GPU_LOGIT_BYTES
    halves = not compiled and _halves(hardware, micro, 6 * counts.matrix * micro * length, decided or {}, decisions)
    block_kernel = modes.block_kernel(hardware, compiled=compiled)
    block = _loss(micro * length, counts, halves, logit_bytes, block_kernel, decisions)
    flops_per_token = 6 * counts.matrix + 12 * counts.layers * counts.width * length
    memory = planned_memory(counts, train, micro * length, block, halves=halves, accumulation=accumulation)
    checkpoint = 4 * counts.total + memory["optimizer"]
    return Plan(
        sequence_length=length,
        global_batch_size=batch,
        processes=hardware.processes,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        dry_step=dry_step,
        steps=steps,
        total_rows=total_rows,
        total_tokens=total_rows * length,
        rows_per_epoch=rows_per_epoch,
        epochs=total_rows / rows_per_epoch if rows_per_epoch else None,
        warmup_steps=warmup,
        decay_steps=decay,
        log_every=train.log_every,
        eval_every=train.eval_every,
        save_every=train.save_every,
        precision=precision,
        tf32=tf32,
        compile=compiled,
        attention=attention,
        loss_block=block,
        logit_bytes=logit_bytes,
        block_kernel=block_kernel,
        halves=halves,
        parameters=counts.total,
        matrix_parameters=counts.matrix,
        flops_per_token=flops_per_token,
        total_flops=flops_per_token * total_rows * length,
        memory=memory,
        memory_bytes=sum(memory.values()),
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (train.save_total_limit + (1 if train.early_stopping_patience is None else 2))
        + 4 * counts.total,
        decisions=tuple(decisions),
    )


def with_micro_batch(plan: Plan, train: Train, counts: Counts, rows: int, reason: str) -> Plan:
    """The same plan with micro-batches of `rows`, and `reason` as that of the decision; the global batch stays."""
    decisions = [decision for decision in plan.decisions if decision.key not in (MICRO_BATCH, "loss")]
    decisions.append(Decision(MICRO_BATCH, str(rows), reason))
    tokens = rows * plan.sequence_length
    halves = plan.halves and rows > 1
    block = _loss(tokens, counts, halves, plan.logit_bytes, plan.block_kernel, decisions)
    accumulation = plan.micro_batch_size * plan.gradient_accumulation_steps // rows
    memory = planned_memory(counts, train, tokens, block, halves=halves, accumulation=accumulation)
    return replace(
        plan,
        micro_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        dry_step=False,
        loss_block=block,
        halves=halves,
        memory=memory,
        memory_bytes=sum(memory.values()),
        decisions=tuple(decisions),
    )


def without_compiler(plan: Plan) -> Plan:
    """A plan that was made not to compile, with that as a decision, so that a resume does not compile either."""
    return replace(plan, decisions=(*plan.decisions, Decision("train.compile", "off", "the compiler failed")))


def dry_step_sizes(plan: Plan) -> list[int]:
    """The micro-batches that a dry step chooses from, in rows, ascending: what divides a process's share."""
    share = plan.micro_batch_size * plan.gradient_accumulation_steps
    sizes = [size for size in _divisors(share) if size * plan.sequence_length <= GPU_MICRO_BATCH_TOKENS]
    return sizes or [1]


def next_smaller(rows: int) -> int:
    """The largest divisor of a micro-batch that is at most half of it."""
    return max(size for size in _divisors(rows) if size <= max(1, rows // 2))


def loss_block(micro_tokens: int, vocabulary: int, parts: int = 1, logit_bytes: int | None = None) -> int | None:
    """Positions whose logits are made at once, a power of two; None: all of them.

    `parts` of the micro-batch are worked on at once, each in blocks of its own.
    """
    limit = logit_bytes or LOGIT_BYTES
    if 4 * vocabulary * micro_tokens <= limit:
        return None
    block = max(LEAST_BLOCK, 1 << (limit // parts // (4 * vocabulary)).bit_length() - 1)
    return block if block < micro_tokens // parts else None


def _global_batch(loaded: LoadedRecipe, length: int, decisions: list[Decision]) -> int:
    train = loaded.recipe.train
    if train.global_batch_tokens is None:
        assert train.global_batch_size is not None  # the schema has one of the two
        return train.global_batch_size
    batch = train.global_batch_tokens // length
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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _loss(
    micro_tokens: int, counts: Counts, halves: bool, logit_bytes: int, kernel: str, decisions: list[Decision]
) -> int | None:
    block = loss_block(micro_tokens, counts.vocabulary, 2 if halves else 1, logit_bytes)
    if block is not None:
        whole = mebibytes(4 * counts.vocabulary * micro_tokens)
        value = f"in blocks of {block:,} positions" if kernel == "blocks" else "Liger's fused kernel"
        decisions.append(Decision("loss", value, f"whole logits are {whole}"))
    return block


def planned_memory(
    counts: Counts, train: Train, micro_tokens: int, block: int | None, *, halves: bool, accumulation: int
) -> dict[str, int]:
    """`memory_estimate`, with what halves hold twice: blocks of logits, and gradients that were there before."""
    memory = memory_estimate(counts, train, micro_tokens, 2 * block if block and halves else block)
    if halves and accumulation > 1:
        memory["gradients"] *= 2
    return memory


def _micro_batch(
    loaded: LoadedRecipe,
    counts: Counts,
    batch: int,
    hardware: Hardware,
    decided: Mapping[str, str],
    decisions: list[Decision],
) -> tuple[int, bool]:
    """Rows of a micro-batch, and whether a dry step is to find them."""
    train, processes = loaded.recipe.train, hardware.processes
    given = train.micro_batch_size
    assert loaded.recipe.data is not None
    length = loaded.recipe.data.sequence_length
    if batch % processes:
        near = sorted({max(1, batch // processes) * processes, (batch // processes + 1) * processes})
        raise RecipeError(
            f"train.global_batch_size: {batch} rows do not divide over {processes} processes",
            where=loaded.where("train.global_batch_size"),
            remedy=f"The nearest that do: {' and '.join(map(str, near))}.",
        )
    share = batch // processes
    divisors = _divisors(share)
    if isinstance(given, int) and given not in divisors:
        near = [
            max((d for d in divisors if d < given), default=1),
            min((d for d in divisors if d > given), default=share),
        ]
        raise RecipeError(
            f"train.micro_batch_size: {given} does not divide the {share} rows of a process",
            where=loaded.where("train.micro_batch_size"),
            remedy=f"The nearest that do: {' and '.join(map(str, dict.fromkeys(near)))}; or auto.",
        )
    before = decided.get(MICRO_BATCH, "")
    if before in [str(size) for size in divisors]:
        decisions.append(Decision(MICRO_BATCH, before, "as at the checkpoint"))
        return int(before), False
    if isinstance(given, int):
        return given, False
    if hardware.kind == "cpu":
        micro = next((size for size in divisors if size * length >= CPU_MICRO_BATCH_TOKENS), share)
        reason = f"CPU: the smallest that holds {CPU_MICRO_BATCH_TOKENS // 1024}K tokens"
        reason += "" if micro * length >= CPU_MICRO_BATCH_TOKENS else ", at most the global batch"
        decisions.append(Decision(MICRO_BATCH, str(micro), reason))
        return micro, False

    def fits(rows: int) -> bool:
        tokens = rows * length
        needed = memory_estimate(counts, train, tokens, loss_block(tokens, counts.vocabulary))
        return tokens <= GPU_MICRO_BATCH_TOKENS and sum(needed.values()) <= (1 - HEAD_ROOM) * hardware.memory_bytes

    micro = max(filter(fits, divisors), default=1)
    dry_step = hardware.kind == "cuda"
    reason = f"the largest that is estimated to fit, within {GPU_MICRO_BATCH_TOKENS // 1024}K tokens"
    reason += "; a dry step before training decides" if dry_step else ""
    decisions.append(Decision(MICRO_BATCH, str(micro), reason))
    return micro, dry_step


def _steps(
    loaded: LoadedRecipe, length: int, batch: int, rows: int | None, decisions: list[Decision]
) -> tuple[int, int]:
    """Steps and rows of the whole run. With `epochs` the last step may be smaller."""
    train = loaded.recipe.train
    if train.max_steps is not None:
        return train.max_steps, train.max_steps * batch
    if train.max_tokens is not None:
        steps = math.ceil(train.max_tokens / (batch * length))
        reason = f"{train.max_tokens:,} tokens / ({batch} rows x {length})"
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


def _count(key: str, value: int | float, steps: int, decisions: list[Decision]) -> int:
    """A number of steps from an int (steps) or a float (share of all steps)."""
    if isinstance(value, int):
        return min(value, steps)
    count = round(value * steps)
    decisions.append(Decision(key, f"{count} steps", f"{value:.3%} of {steps:,}".replace(".000%", "%")))
    return count


def _halves(
    hardware: Hardware, micro: int, flops: float, decided: Mapping[str, str], decisions: list[Decision]
) -> bool:
    """Whether two threads take half of the rows of a micro-batch each; `flops`: of its matrix products."""
    if hardware.kind != "cpu" or hardware.processes > 1 or micro < 2:
        return False
    if decided:
        if halves := HALVES in decided:
            decisions.append(Decision(HALVES, decided[HALVES], "as this run began"))
        return halves
    if hardware.threads < 2 or flops < HALVES_FLOPS:
        return False
    decisions.append(
        Decision(HALVES, "two threads, half of the rows each", "they wait once a pass, not at each operation")
    )
    return True
