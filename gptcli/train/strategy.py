"""How several processes share a model: whole in each (DDP), or divided among them (FSDP, DeepSpeed's ZeRO).

`auto` is DDP, which sends least, while the whole model fits one device beside a row's activations; else FSDP.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from gptcli.errors import MissingError, RecipeError
from gptcli.reporting import mebibytes

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Launch
    from gptcli.train.decisions import Hardware
    from gptcli.train.plan import Plan

STRATEGY = "launch.strategy"
# Whose update works on parts of matrices, as tests show.
DIVIDED_OPTIMIZERS = ("adamw", "muon", "sgd")
DIVIDED_PRECISIONS = ("fp32", "bf16")
# Of a device's memory, what a plan leaves: fragments, libraries' workspaces, evaluation.
HEAD_ROOM = 0.05
# accelerate's, where a DeepSpeed configuration does not say which.
ZERO_STAGE = 2


def room(hardware: Hardware) -> int:
    """Bytes that a process may fill: of its GPU; of a CPU's memory its part, as the machine's processes share it."""
    sharing = max(1, hardware.processes // hardware.nodes) if hardware.kind == "cpu" else 1
    return int((1 - HEAD_ROOM) * hardware.memory_bytes) // sharing


def auto_strategy(hardware: Hardware, one_row: int) -> tuple[str, str]:
    """DDP or FSDP, and why; `one_row`: bytes that DDP needs for weights, gradients, optimizer and one row."""
    there, needed = mebibytes(room(hardware)), mebibytes(one_row)
    if one_row <= room(hardware):
        return "ddp", f"the whole model and a row need {needed} of a device's {there}"
    return "fsdp", f"the whole model and a row need {needed}, a device has {there}: divided over the processes"


def is_divided(plan: Plan) -> bool:
    """Whether the processes of a plan hold parts of the model."""
    return plan.world_size > 1 and (plan.strategy == "fsdp" or plan.tensor_parallel > 1)


def by_zero(plan: Plan) -> bool:
    """Whether DeepSpeed divides a plan's work; one process has nothing to divide."""
    return plan.world_size > 1 and plan.strategy == "deepspeed"


def check_strategy(loaded: LoadedRecipe, plan: Plan) -> None:
    """Refuse what does not work on parts of a model.

    Raises:
        RecipeError: with what does.
    """
    train = loaded.recipe.train
    if plan.context_parallel > 1:
        _check_divided_rows(loaded, plan)
    if not is_divided(plan):
        return
    for key, value, known in (
        ("train.optimizer", train.optimizer, DIVIDED_OPTIMIZERS),
        ("train.precision", plan.precision, DIVIDED_PRECISIONS),
    ):
        if value not in known:
            raise RecipeError(
                f"{key}: {value} is not known to work on a model that is divided over processes ({plan.strategy})",
                where=loaded.where(key),
                remedy=f"{' and '.join(known)} are; or set launch.strategy: ddp.",
            )


def check_finetune(loaded: LoadedRecipe, plan: Plan, *, media: bool = False) -> None:
    """Refuse an adapter, frozen modules, or (`media`) images and sounds where they are not known to work.

    Raises:
        RecipeError: with what does.
    """
    finetune = loaded.recipe.finetune
    if finetune.adapter == "none" and not finetune.freeze and not media:
        return
    what = f"finetune.adapter: {finetune.adapter}" if finetune.adapter != "none" else "finetune.freeze"
    what = "a model that sees or hears" if media else what
    for key, value, wrong, right in (
        (STRATEGY, plan.strategy, plan.world_size > 1 and plan.strategy != "ddp", f"{STRATEGY}: ddp"),
        ("launch.parallel", "tp", plan.tensor_parallel > 1, "launch.parallel.tp: 1"),
        ("launch.parallel", "cp", plan.context_parallel > 1, "launch.parallel.cp: 1"),
        ("train.precision", "fp8", plan.precision == "fp8", "train.precision: bf16"),
    ):
        if wrong:
            raise RecipeError(
                f"{what} is not known to work with {key}: {value}", where=loaded.where(key), remedy=f"Set {right}."
            )


def check_quantized(loaded: LoadedRecipe, hardware: Hardware) -> None:
    """Raise `MissingError` for `qlora` without a GPU or without bitsandbytes."""
    if loaded.recipe.finetune.adapter != "qlora":
        return
    lacking = []
    if hardware.here and importlib.util.find_spec("bitsandbytes") is None:
        lacking.append("the package bitsandbytes, which is not installed")
    if hardware.kind != "cuda":
        lacking.append("a GPU with CUDA or ROCm, and there is none here")
    if lacking:
        raise MissingError(
            f"finetune.adapter: qlora needs {', and '.join(lacking)}",
            where=loaded.where("finetune.adapter"),
            remedy="pip install 'gptcli[gpu]'\nWithout it, finetune.adapter: lora is the same with the base in fp32.",
        )


def _check_divided_rows(loaded: LoadedRecipe, plan: Plan) -> None:
    pieces, length = 2 * plan.context_parallel, plan.sequence_length
    if length % pieces:
        down = length // pieces * pieces
        near = f"{down} or {down + pieces}" if down else str(pieces)
        raise RecipeError(
            f"data.sequence_length: {length} tokens are not divided by the {pieces} pieces of launch.parallel.cp",
            where=loaded.where("data.sequence_length"),
            remedy=f"Set it to {near}, or launch.parallel.cp to another number.",
        )
    for key, wrong, right in (
        ("train.attention", plan.attention not in ("sdpa", "auto"), "sdpa"),
        ("train.compile", plan.compile, "off"),
    ):
        if wrong:
            raise RecipeError(
                f"{key}: it does not go with rows that are divided over processes (launch.parallel.cp)",
                where=loaded.where(key),
                remedy=f"Set it to {right}.",
            )


def sharing_of(strategy: str, launch: Launch) -> str:
    """The memory's arithmetic of a strategy: ddp, fsdp, or zero0 to zero3 for DeepSpeed's stage."""
    if strategy != "deepspeed":
        return strategy
    stage = zero_stage(launch.deepspeed)
    return f"zero{stage}" if type(stage) is int and 0 <= stage <= 3 else f"zero{ZERO_STAGE}"


def zero_stage(configuration: dict[str, Any]) -> Any:
    """The stage that a DeepSpeed configuration says, 2 where it says none."""
    zero = configuration.get("zero_optimization")
    stage = zero.get("stage", ZERO_STAGE) if isinstance(zero, dict) else ZERO_STAGE
    return ZERO_STAGE if stage == "auto" else stage
