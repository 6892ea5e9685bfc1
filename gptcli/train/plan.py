"""Every number that a run derives from its recipe, decided once, with the reason of each. Pure arithmetic.

Training reads a `Plan`, `gptcli plan` prints it, and no second place computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gptcli.reporting import mebibytes
from gptcli.train import modes
from gptcli.train.batches import (
    GPU_MICRO_BATCH_TOKENS,
    check_rows,
    count_of_steps,
    data_parallel,
    divisors,
    global_batch,
    micro_batch,
    share_of_batch,
    steps_and_rows,
)
from gptcli.train.batches import MICRO_BATCH as MICRO_BATCH
from gptcli.train.decisions import Choices, Decision, Hardware
from gptcli.train.memory import Step, memory_estimate, optimizer_bytes
from gptcli.train.strategy import STRATEGY, auto_strategy, room, sharing_of

if TYPE_CHECKING:
    from gptcli.model.build import Counts
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Train

# Whole logits below this, blocks of about as much above (fp32); a GPU's products need more rows to be fast.
LOGIT_BYTES = 32 << 20
GPU_LOGIT_BYTES = 256 << 20
LEAST_BLOCK = 512
# Work of a micro-batch from which two threads with half of its rows each are faster than two threads that share every
# operation (train/halves.py, benchmarks/halves.py). Below, Python's lock is what they wait for.
HALVES_FLOPS = 3e9
HALVES = "micro-batch"


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run. Batches are counted in rows, sizes in bytes, work in FLOPs.

    Attributes:
        processes: those, or groups of them, that split the batch: the world divided by what splits a model (`tp * cp`).
        world_size: all of them, on all machines.
        strategy: ddp, fsdp or deepspeed; `sharing`: what of the model its processes divide (see `memory.Step`).
        parameters, trained_parameters: all of the model's, and those that take gradients.
        dry_step: the micro-batch is an estimate, which a dry step on the device is to put right before training.
        total_tokens: inputs without padding; of rows of documents what so many have on average.
        padding: the share of what is worked on that is filling.
        memory: at the fullest moment of a step on one device, by use (see `memory_estimate`).
    """

    kind: str
    sequence_length: int
    global_batch_size: int
    processes: int
    world_size: int
    tensor_parallel: int
    context_parallel: int
    strategy: str
    sharing: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    dry_step: bool
    steps: int
    total_rows: int
    total_tokens: int
    rows_per_epoch: int | None
    padding: float
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
    trained_parameters: int
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
    def token_parallel(self) -> int:
        """The processes, or groups of them, that work on other tokens than the others."""
        return self.processes * self.context_parallel

    @property
    def decided(self) -> dict[str, str]:
        """Each decided value by its key, as a checkpoint records it."""
        return {decision.key: decision.value for decision in self.decisions}


def make_plan(
    loaded: LoadedRecipe,
    counts: Counts,
    hardware: Hardware,
    *,
    rows_per_epoch: int | None,
    tokens_per_epoch: int | None = None,
    padding: Callable[[int], float] | None = None,
    decided: Mapping[str, str] | None = None,
    usable: Set[str] = frozenset(),
    alone: str | None = None,
) -> Plan:
    """Derive everything.

    Args:
        loaded: the recipe.
        counts: the model's parameters.
        hardware: the device and the number of processes.
        rows_per_epoch: rows of `sequence_length` in the training data; None when the data was not read (then
            `train.epochs` cannot be planned).
        tokens_per_epoch: inputs of these rows; None: `sequence_length` each.
        padding: the share of filling with so many rows at once; None: there is none.
        decided: what `auto` stood for in the checkpoint that the run goes on from: used again, so that a resume on
            another machine does not change the arithmetic.
        usable: the attention implementations that the model's code can use.
        alone: why a micro-batch is one row where the recipe does not say.

    Raises:
        RecipeError: no length of training, batches that do not divide, or what rows of documents do not go with.
    """
    recipe = loaded.recipe
    train, data, parallel = recipe.train, recipe.data, recipe.launch.parallel
    assert data is not None
    length = data.sequence_length
    decisions: list[Decision] = []
    check_rows(loaded)
    processes = data_parallel(loaded, hardware)
    batch = global_batch(loaded, length, decisions)
    share = share_of_batch(loaded, length, batch, processes)
    steps, total_rows = steps_and_rows(loaded, length, batch, rows_per_epoch, decisions)
    warmup = count_of_steps("train.warmup", train.warmup, steps, decisions)
    decay = count_of_steps("train.decay", train.decay, steps, decisions) if train.lr_scheduler == "wsd" else 0
    cut, packing = parallel.cp > 1, data.packing
    row_tokens = Fraction(tokens_per_epoch, rows_per_epoch) if tokens_per_epoch and rows_per_epoch else Fraction(length)
    usual = max(1, round(row_tokens)) if packing == "none" else length
    # Rows that are divided now may not have been when the run began.
    known = {key: value for key, value in (decided or {}).items() if not cut or key not in modes.OF_ROWS}
    choice = Choices(known, decisions)
    precision = choice("train.precision", train.precision, lambda: modes.auto_precision(hardware))
    tf32 = modes.auto_tf32(hardware) and "tf32" not in train.trainer_args
    if tf32 and precision == "fp32":
        reason = "fp32 products rounded to 10 bits of mantissa on this GPU; train.trainer_args={tf32: false}: not"
        decisions.append(Decision("tf32", "on", reason))
    misfit = "rows are divided over processes" if cut else "rows have many lengths" if packing == "none" else ""
    if recipe.launch.strategy == "deepspeed":
        misfit = "not known to work with DeepSpeed"
    compiled = (
        choice(
            "train.compile",
            train.compile,
            lambda: modes.auto_compile(hardware, precision=precision, steps=steps, misfit=misfit),
        )
        == "on"
    )
    attention = choice(
        "train.attention",
        train.attention,
        lambda: modes.auto_attention(
            hardware,
            usable=usable,
            precision=precision,
            length=length,
            packing=packing,
            compiled=compiled,
            divided_rows=cut,
        ),
    )
    logit_bytes = LOGIT_BYTES if hardware.kind == "cpu" else GPU_LOGIT_BYTES

    def needed(rows: int, sharing: str) -> dict[str, int]:
        """Memory of a process with micro-batches of so many rows."""
        step = Step(
            kind=hardware.kind,
            tokens=rows * length // parallel.cp,
            length=length,
            precision=precision,
            attention=attention,
            block=loss_block(rows * length // parallel.cp, counts.vocabulary, logit_bytes=logit_bytes),
            accumulation=share // rows,
            sharing=sharing,
            sharers=processes * parallel.cp,
            tensor_parallel=parallel.tp,
        )
        return memory_estimate(counts, train, step)

    strategy: str = recipe.launch.strategy
    if strategy == "auto" and counts.frozen:
        strategy = "ddp"  # what else there is divides parameters that take gradients
    if strategy == "auto":
        # Not taken from a checkpoint: a resume on other processes is allowed, and the strategy changes no result.
        strategy, why = (
            auto_strategy(hardware, sum(needed(1, "ddp").values())) if hardware.processes > 1 else ("ddp", "")
        )
        decisions += [Decision(STRATEGY, strategy, why)] if why else []
    sharing = sharing_of(strategy, recipe.launch)
    micro, dry_step = micro_batch(
        loaded,
        length,
        share,
        hardware,
        lambda rows: sum(needed(rows, sharing).values()) <= room(hardware),
        decided or {},
        decisions,
        whole=sharing == "ddp" and parallel.tp == 1,
        usual=usual,
        alone=alone,
    )
    # Two multiplications a weight forward and two for each of its gradients; a weight that is not trained has one.
    products = 6 * counts.matrix - 2 * counts.frozen_matrix
    halves = not compiled and _halves(hardware, micro, products * micro * usual, decided or {}, decisions)
    block_kernel = modes.block_kernel(hardware, compiled=compiled, smoothed=train.label_smoothing > 0)
    # A head that is divided gives whole logits: our blocks multiply with its matrix themselves.
    block = None
    if parallel.tp == 1:
        block = _loss(micro * length // parallel.cp, counts, halves, logit_bytes, block_kernel, decisions)
    flops_per_token = products + 12 * counts.layers * counts.width * usual
    filling = padding(micro) if padding is not None else 0.0
    tokens = round(total_rows * row_tokens)
    finetune = recipe.finetune
    saved = 4 * (counts.total if finetune.adapter == "none" else counts.trained)
    checkpoint = saved + optimizer_bytes(counts, train.optimizer)
    final = saved + (4 * counts.total if finetune.merge else 0)
    plan = Plan(
        kind=hardware.kind,
        sequence_length=length,
        global_batch_size=batch,
        processes=processes,
        world_size=hardware.processes,
        tensor_parallel=parallel.tp,
        context_parallel=parallel.cp,
        strategy=strategy,
        sharing=sharing,
        micro_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        dry_step=dry_step,
        steps=steps,
        total_rows=total_rows,
        total_tokens=tokens,
        rows_per_epoch=rows_per_epoch,
        padding=round(filling, 6),
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
        trained_parameters=counts.trained,
        matrix_parameters=counts.matrix,
        flops_per_token=flops_per_token,
        total_flops=round(flops_per_token * tokens / (1 - filling)),
        memory={},
        memory_bytes=0,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (train.save_total_limit + (1 if train.early_stopping_patience is None else 2)) + final,
        decisions=tuple(decisions),
    )
    return _with_memory(plan, train, counts)


def step_of(plan: Plan) -> Step:
    """What of a plan decides the memory of one of its processes."""
    return Step(
        kind=plan.kind,
        tokens=plan.micro_batch_size * plan.sequence_length // plan.context_parallel,
        length=plan.sequence_length,
        precision=plan.precision,
        attention=plan.attention,
        block=plan.loss_block,
        halves=plan.halves,
        accumulation=plan.gradient_accumulation_steps,
        sharing=plan.sharing,
        sharers=plan.token_parallel,
        tensor_parallel=plan.tensor_parallel,
    )


def _with_memory(plan: Plan, train: Train, counts: Counts) -> Plan:
    memory = memory_estimate(counts, train, step_of(plan))
    return replace(plan, memory=memory, memory_bytes=sum(memory.values()))


def with_micro_batch(plan: Plan, train: Train, counts: Counts, rows: int, reason: str) -> Plan:
    """The same plan with micro-batches of `rows`, and `reason` as that of the decision; the global batch stays."""
    decisions = [decision for decision in plan.decisions if decision.key not in (MICRO_BATCH, "loss")]
    decisions.append(Decision(MICRO_BATCH, str(rows), reason))
    tokens = rows * plan.sequence_length // plan.context_parallel
    halves = plan.halves and rows > 1
    block = _loss(tokens, counts, halves, plan.logit_bytes, plan.block_kernel, decisions)
    accumulation = plan.micro_batch_size * plan.gradient_accumulation_steps // rows
    changed = replace(
        plan,
        micro_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        dry_step=False,
        loss_block=block,
        halves=halves,
        decisions=tuple(decisions),
    )
    return _with_memory(changed, train, counts)


def without_compiler(plan: Plan) -> Plan:
    """A plan that was made not to compile, with that as a decision, so that a resume does not compile either."""
    return replace(plan, decisions=(*plan.decisions, Decision("train.compile", "off", "the compiler failed")))


def dry_step_sizes(plan: Plan) -> list[int]:
    """The micro-batches that a dry step chooses from, in rows, ascending: what divides a process's share."""
    share = plan.micro_batch_size * plan.gradient_accumulation_steps
    sizes = [size for size in divisors(share) if size * plan.sequence_length <= GPU_MICRO_BATCH_TOKENS]
    return sizes or [1]


def loss_block(micro_tokens: int, vocabulary: int, parts: int = 1, logit_bytes: int | None = None) -> int | None:
    """Positions whose logits are made at once, a power of two; None: all of them.

    `parts` of the micro-batch are worked on at once, each in blocks of its own.
    """
    limit = logit_bytes or LOGIT_BYTES
    if 4 * vocabulary * micro_tokens <= limit:
        return None
    block = max(LEAST_BLOCK, 1 << (limit // parts // (4 * vocabulary)).bit_length() - 1)
    return block if block < micro_tokens // parts else None


def _loss(
    micro_tokens: int, counts: Counts, halves: bool, logit_bytes: int, kernel: str, decisions: list[Decision]
) -> int | None:
    block = loss_block(micro_tokens, counts.vocabulary, 2 if halves else 1, logit_bytes)
    if block is not None:
        whole = mebibytes(4 * counts.vocabulary * micro_tokens)
        value = f"in blocks of {block:,} positions" if kernel == "blocks" else "Liger's fused kernel"
        decisions.append(Decision("loss", value, f"whole logits are {whole}"))
    return block


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
