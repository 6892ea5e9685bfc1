"""The DeepSpeed configuration of a run: the recipe's `launch.deepspeed`, with what the plan decides filled in. Pure.

What is written there may repeat the plan, or say `auto`; what contradicts it is refused, as is what would change how a
step is computed behind our back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError
from gptcli.train.arguments import check_installed
from gptcli.train.strategy import zero_stage

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.train.plan import Plan

KEY = "launch.deepspeed"
# DeepSpeed's own 5e8 is a buffer of 2 GB in fp32, whatever the model.
BUCKET = 50_000_000
# What goes on to DeepSpeed as it is written: how it sends, and what it says of itself.
_PASSED_ON = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# Of `zero_optimization`: other optimizers, other places for the state, or other ways to divide than the three stages.
_REFUSED = ("cpu_offload", "legacy_stage1", "mics_", "offload_", "super_offload", "zenflow")


def check_zero(loaded: LoadedRecipe, plan: Plan, *, here: bool) -> None:
    """Refuse what does not go with DeepSpeed, where it is what the processes of a plan share the model by.

    Args:
        loaded: the recipe.
        plan: its derived numbers.
        here: whether it is for this machine, on which DeepSpeed has to be installed then.

    Raises:
        RecipeError: with what does go with it.
        MissingError: it is not installed.
    """
    if plan.strategy != "deepspeed":
        return
    train, parallel = loaded.recipe.train, loaded.recipe.launch.parallel
    for key, value, known in (
        # Of a flat part of all matrices no other update is the same as of the matrices.
        ("train.optimizer", train.optimizer, ("adamw",)),
        ("train.precision", plan.precision, ("fp32", "bf16")),
        ("train.compile", plan.compile, (False,)),
        ("launch.parallel.tp", parallel.tp, (1,)),
        ("launch.parallel.cp", parallel.cp, (1,)),
        ("launch.parallel.dp_replicate", parallel.dp_replicate, (1,)),
    ):
        if value not in known:
            raise RecipeError(
                f"{key}: {_text(value)} is not known to work with launch.strategy: deepspeed",
                where=loaded.where(key),
                remedy=f"Known to work: {', '.join(map(_text, known))}. Or set launch.strategy: fsdp.",
            )
    zero_settings(loaded, plan)
    if here:
        check_installed(loaded, "launch.strategy", "deepspeed", "deepspeed", "gptcli[deepspeed]")


def zero_settings(loaded: LoadedRecipe, plan: Plan) -> dict[str, Any]:
    """The configuration that DeepSpeed gets.

    Clipping is not among it: norm and clipping are ours (`train.gradients`), the same under every strategy.

    Raises:
        RecipeError: a value that contradicts the plan, or that is not known to go with it.
    """
    written: dict[str, Any] = loaded.recipe.launch.deepspeed
    decided = _decided(loaded, plan)
    for key, value in _flat(written):
        _check(loaded, plan, key, value, decided)
    rest = {key: value for key, value in written.items() if key in _PASSED_ON}
    zero = {"reduce_bucket_size": min(BUCKET, plan.parameters), **written.get("zero_optimization", {})}
    half = plan.precision == "bf16"
    return {
        # As under FSDP, gradients are summed and kept in fp32.
        **({"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}} if half else {}),
        **rest,
        "train_batch_size": plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": half},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**zero, "stage": int(zero_stage(written))},
    }


def _decided(loaded: LoadedRecipe, plan: Plan) -> dict[str, tuple[Any, str]]:
    """Each key that the plan decides: its value, and what in the recipe says so."""
    train = loaded.recipe.train
    return {
        "train_batch_size": (plan.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (plan.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (plan.gradient_accumulation_steps, "train.micro_batch_size"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (plan.precision == "bf16", "train.precision"),
        "fp16.enabled": (False, "train.precision"),
        "optimizer.type": ("AdamW", "train.optimizer"),
        "optimizer.params.lr": (train.learning_rate, "train.learning_rate"),
        "optimizer.params.betas": (list(train.betas), "train.betas"),
        "optimizer.params.eps": (train.adam_epsilon, "train.adam_epsilon"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
    }


def _check(loaded: LoadedRecipe, plan: Plan, key: str, value: Any, decided: dict[str, tuple[Any, str]]) -> None:
    where, first = loaded.where(f"{KEY}.{key}"), key.split(".")[0]
    if key in decided:
        expected, source = decided[key]
        if value != "auto" and value != expected:
            raise RecipeError(
                f"{KEY}.{key}: {value} contradicts {source}, by which it is {expected}",
                where=where,
                remedy=f"Leave it out, it is filled in; {source} decides it.",
            )
    elif key == "zero_optimization.stage":
        _check_stage(value, plan, where)
    elif first == "zero_optimization" and key != first:
        name = key.split(".")[1]
        if name.startswith(_REFUSED) and value not in (None, False, "none"):
            raise RecipeError(
                f"{KEY}.zero_optimization.{name} is not available yet",
                where=where,
                remedy="launch.strategy: fsdp with launch.fsdp.cpu_offload keeps state on the host.",
            )
    elif first not in _PASSED_ON:
        raise RecipeError(
            f"{KEY}.{key} is not known to go with the plan of a run",
            where=where,
            remedy=f"Known beside zero_optimization and what the plan fills in: {', '.join(_PASSED_ON)}.",
        )


def _check_stage(value: Any, plan: Plan, where: str) -> None:
    if value == "auto" or (type(value) is int and 1 <= value <= 3):
        if value == 1 and plan.precision == "bf16":
            raise RecipeError(
                f"{KEY}.zero_optimization.stage: 1 is for fp32 here",
                where=where,
                remedy="Stage 2 trains in bf16, and divides the gradients too.",
            )
        return
    remedy = "1 divides the optimizer's state, 2 the gradients too, 3 the weights too."
    remedy += " Nothing is divided by launch.strategy: ddp." if value == 0 else ""
    raise RecipeError(f"{KEY}.zero_optimization.stage: expected 1, 2 or 3, got {value}", where=where, remedy=remedy)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a configuration, dotted, with their values; an empty section is none."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
