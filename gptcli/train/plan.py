"""Every number that a run derives from its recipe, decided once, with the reason of each. Pure arithmetic.

Training reads a `Plan`, `gptcli plan` prints it, and no second place computes the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError, UsageError
from gptcli.train import modes

if TYPE_CHECKING:
    from gptcli.model.build import Counts
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Train

CPU_MICRO_BATCH_TOKENS = 8 * 1024
GPU_MICRO_BATCH_TOKENS = 32 * 1024
# Whole logits below this, blocks of about as much above (fp32); a GPU's products need more rows to be fast.
LOGIT_BYTES = 32 << 20
GPU_LOGIT_BYTES = 256 << 20
LEAST_BLOCK = 256
# Work of a micro-batch from which two threads with half of its rows each are faster than two threads that share every
# operation (train/halves.py, benchmarks/halves.py). Below, Python's lock is what they wait for.
HALVES_FLOPS = 2e9
HALVES = "micro-batch"
_LENGTH_KEYS = ("max_tokens", "max_steps", "epochs")


@dataclass(frozen=True)
class Hardware:
    """What a plan needs to know of the machine.

    Attributes:
        kind: cpu, cuda or mps.
        fast_bf16: whether this model trains faster in bf16 than in fp32.
        bf16_reason: how that is known.
        processes: the number of training processes (the world size).
        memory_bytes: of one device.
        capability: a GPU's compute capability, (8, 0) for an A100; None without one.
        rocm: whether the GPU is AMD's.
        compiler: whether torch.compile has a compiler to build with.
        packages: those of triton, torchao, liger_kernel, flash_attn and flash_attn_interface that can be used.
        threads: that an operation on a CPU is shared by.
    """

    kind: str
    fast_bf16: bool
    processes: int
    memory_bytes: int
    bf16_reason: str = ""
    capability: tuple[int, int] | None = None
    rocm: bool = False
    compiler: bool = False
    packages: frozenset[str] = frozenset()
    threads: int = 1


@dataclass(frozen=True)
class Decision:
    """A value that `auto` (or a share, or another unit) stood for, and why."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run. Batches are counted in rows, sizes in bytes, work in FLOPs."""

    sequence_length: int
    global_batch_size: int
    processes: int
    micro_batch_size: int
    gradient_accumulation_steps: int
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
    loss_kernel: str
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
    micro, accumulation = _micro_batch(loaded, length, batch, hardware, decisions)
    steps, total_rows = _steps(loaded, length, batch, rows_per_epoch, decisions)
    warmup = _count("train.warmup", train.warmup, steps, decisions)
    decay = _count("train.decay", train.decay, steps, decisions) if train.lr_scheduler == "wsd" else 0
    choice, packing = _Choices(decided or {}, decisions), data.packing or "concat"
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
    block = loss_block(micro * length, counts.vocabulary, 2 if halves else 1, logit_bytes)
    kernel = modes.loss_kernel(hardware, block=block, compiled=compiled)
    if block is not None:
        whole = mebibytes(4 * counts.vocabulary * micro * length)
        value = f"in blocks of {block:,} positions" if kernel != "liger" else "Liger's fused kernel"
        decisions.append(Decision("loss", value, f"whole logits are {whole}"))
    flops_per_token = 6 * counts.matrix + 12 * counts.layers * counts.width * length
    memory = memory_estimate(counts, train, micro * length, block)
    checkpoint = 4 * counts.total + memory["optimizer"]
    return Plan(
        sequence_length=length,
        global_batch_size=batch,
        processes=hardware.processes,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
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
        loss_kernel=kernel,
        halves=halves,
        parameters=counts.total,
        matrix_parameters=counts.matrix,
        flops_per_token=flops_per_token,
        total_flops=flops_per_token * total_rows * length,
        memory=memory,
        memory_bytes=sum(memory.values()),
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * ((train.save_total_limit or math.ceil(steps / max(1, train.save_every))) + 1)
        + 4 * counts.total,
        decisions=tuple(decisions),
    )


def loss_block(micro_tokens: int, vocabulary: int, parts: int = 1, logit_bytes: int | None = None) -> int | None:
    """Positions whose logits are made at once, a power of two; None: all of them.

    `parts` of the micro-batch are worked on at once, each in blocks of its own.
    """
    limit = logit_bytes or LOGIT_BYTES
    if 4 * vocabulary * micro_tokens <= limit:
        return None
    block = max(LEAST_BLOCK, 1 << (limit // parts // (4 * vocabulary)).bit_length() - 1)
    return block if block < micro_tokens // parts else None


def memory_estimate(counts: Counts, train: Train, micro_tokens: int, block: int | None = None) -> dict[str, int]:
    """Bytes that training needs on one device, by use, in fp32 master weights.

    Activations: about 34 values of the model's width a layer and token are kept for the backward pass (Korthikanti
    et al. 2022, arXiv:2205.05198, without the attention matrix, which sdpa does not keep), 4 bytes each, or 2 with
    activation checkpointing; the logits, their gradient and the softmax 4 bytes each, of `block` positions.
    """
    if train.optimizer == "muon":
        optimizer = 4 * counts.hidden_matrices + 8 * (counts.total - counts.hidden_matrices)
    elif train.optimizer in {"sgd", "lion"}:
        optimizer = 4 * counts.total
    else:
        optimizer = 8 * counts.total
    kept = 2 if train.activation_checkpointing else 34
    return {
        "weights": 4 * counts.total,
        "gradients": 4 * counts.total,
        "optimizer": optimizer,
        "activations": 4 * kept * counts.layers * counts.width * micro_tokens,
        "logits": 3 * 4 * counts.vocabulary * (block or micro_tokens),
    }


def mebibytes(count: int) -> str:
    """Bytes as estimates show them: MiB, or GiB from one on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


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


def _micro_batch(
    loaded: LoadedRecipe, length: int, batch: int, hardware: Hardware, decisions: list[Decision]
) -> tuple[int, int]:
    given, processes = loaded.recipe.train.micro_batch_size, hardware.processes
    if batch % processes:
        near = sorted({max(1, batch // processes) * processes, (batch // processes + 1) * processes})
        raise RecipeError(
            f"train.global_batch_size: {batch} rows do not divide over {processes} processes",
            where=loaded.where("train.global_batch_size"),
            remedy=f"The nearest that do: {' and '.join(map(str, near))}.",
        )
    share = batch // processes
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if isinstance(given, int):
        if given not in divisors:
            near = [
                max((d for d in divisors if d < given), default=1),
                min((d for d in divisors if d > given), default=share),
            ]
            raise RecipeError(
                f"train.micro_batch_size: {given} does not divide the {share} rows of a process",
                where=loaded.where("train.micro_batch_size"),
                remedy=f"The nearest that do: {' and '.join(map(str, dict.fromkeys(near)))}; or auto.",
            )
        micro = given
    elif hardware.kind == "cpu":
        micro = next((size for size in divisors if size * length >= CPU_MICRO_BATCH_TOKENS), share)
        reason = f"CPU: the smallest that holds {CPU_MICRO_BATCH_TOKENS // 1024}K tokens"
        reason += "" if micro * length >= CPU_MICRO_BATCH_TOKENS else ", at most the global batch"
        decisions.append(Decision("train.micro_batch_size", str(micro), reason))
    else:
        micro = max((size for size in divisors if size * length <= GPU_MICRO_BATCH_TOKENS), default=1)
        reason = f"the largest within {GPU_MICRO_BATCH_TOKENS // 1024}K tokens that divides the batch"
        decisions.append(Decision("train.micro_batch_size", str(micro), reason))
    return micro, share // micro


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


class _Choices:
    """What the recipe says, else what the run began with, else a choice, which is written down with its reason."""

    def __init__(self, decided: Mapping[str, str], decisions: list[Decision]) -> None:
        self._decided = decided
        self._decisions = decisions

    def __call__(self, key: str, given: str | bool, choose: Callable[[], tuple[str | bool, str]]) -> str:
        if given != "auto":
            return _text(given)
        before = self._decided.get(key)
        value, reason = (before, "as this run began") if before else choose()
        self._decisions.append(Decision(key, _text(value), reason))
        return _text(value)


def _text(value: str | bool) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else value


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
