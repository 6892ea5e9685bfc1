"""The recipe and the plan as transformers' TrainingArguments, and names checked against the installed version."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import MissingError, RecipeError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Recipe
    from gptcli.train.plan import Plan

# Recipe names whose optimizer or schedule transformers knows under another one.
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "muon": "adamw_torch_fused", "lion": "lion_32bit"}
_SCHEDULERS = {"wsd": "warmup_stable_decay"}
# The first part that an optimizer's name contains tells the package behind it and how to get it.
_OPTIMIZER_PACKAGES = {
    "torch_8bit": ("torchao", "gptcli[gpu]"),
    "torch_4bit": ("torchao", "gptcli[gpu]"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "bnb": ("bitsandbytes", "gptcli[gpu]"),
    "8bit": ("bitsandbytes", "gptcli[gpu]"),
    "paged": ("bitsandbytes", "gptcli[gpu]"),
    "lion": ("bitsandbytes", "gptcli[gpu]"),
    "ademamix": ("bitsandbytes", "gptcli[gpu]"),
}
# Fields of trl's arguments that keys of the recipe set, and those that our order of rows and our resume do not know.
_TRL_OF_RECIPE = {
    "beta": "finetune.beta",
    "max_length": "data.sequence_length",
    "max_completion_length": "generate.max_new_tokens",
    "truncation_mode": "data.overlong",
    "shuffle_dataset": "data.shuffle",
}
_TRL_REFUSED = (
    "generation_batch_size",
    "steps_per_generation",
    "num_iterations",
    "precompute_ref_log_probs",
    "sync_ref_model",
    "use_adaptive_entropy",
    "use_vllm",
    "use_transformers_continuous_batching",
)
MOST_WORKERS = 4
_TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}


def check_names(loaded: LoadedRecipe) -> None:
    """Check optimizer, schedule, trackers and `trainer_args` against what is installed, before anything is spent.

    Raises:
        RecipeError: a name that the installed transformers does not know.
        MissingError: a package that is not there, with the command that installs it.
    """
    from transformers import SchedulerType, TrainingArguments
    from transformers.training_args import OptimizerNames

    train = loaded.recipe.train
    optimizers = {*(name.value for name in OptimizerNames), *_OPTIMIZERS}
    _known(loaded, "train.optimizer", train.optimizer, optimizers)
    schedulers = {*(name.value for name in SchedulerType), *_SCHEDULERS}
    _known(loaded, "train.lr_scheduler", train.lr_scheduler, schedulers)
    arguments = config_class(loaded)
    fields = {field.name for field in dataclasses.fields(arguments) if field.init}
    for name in train.trainer_args:
        key = f"train.trainer_args.{name}"
        _known(loaded, key, name, fields)
        if arguments is not TrainingArguments and (why := _not_of_trl(loaded, name)) is not None:
            raise RecipeError(f"{key}: {why}", where=loaded.where(key), remedy="Leave it out.")
    behind = next((found for part, found in _OPTIMIZER_PACKAGES.items() if part in train.optimizer), None)
    if behind is not None:
        check_installed(loaded, "train.optimizer", train.optimizer, *behind)
    for tracker in loaded.recipe.tracking.to:
        check_installed(
            loaded, "tracking.to", tracker, _TRACKERS[tracker], "gptcli[track]" if tracker != "mlflow" else tracker
        )


def check_trl(loaded: LoadedRecipe) -> None:
    """Raise a `MissingError`, with the command that installs it, where trl is not there."""
    check_installed(loaded, "finetune.method", loaded.recipe.finetune.method, "trl", "gptcli[rl]")


def config_class(loaded: LoadedRecipe) -> type[TrainingArguments]:
    """The class of the Trainer's arguments: transformers' own, or trl's for a method that learns preferences."""
    from transformers import TrainingArguments

    method = loaded.recipe.finetune.method
    if loaded.recipe.data is None or loaded.recipe.data.format != "preference":
        return TrainingArguments
    if method == "orpo":
        module, name = importlib.import_module("trl.experimental.orpo"), "ORPOConfig"
    else:
        module, name = importlib.import_module("trl"), f"{method.upper()}Config"
    found: type[TrainingArguments] = getattr(module, name)
    return found


def _not_of_trl(loaded: LoadedRecipe, name: str) -> str | None:
    """Why a field of trl's arguments is not the recipe's to set; None: it is."""
    key = _TRL_OF_RECIPE.get(name)
    if key is not None and (name, loaded.recipe.finetune.method) != ("beta", "grpo"):
        return f"it is set by {key}; use that instead"
    return "not available yet: a run with it would not resume exactly" if name in _TRL_REFUSED else None


def check_installed(loaded: LoadedRecipe, key: str, value: str, package: str, requirement: str) -> None:
    """Raise a `MissingError`, with the command that installs it, where a package that a value needs is not there."""
    if importlib.util.find_spec(package) is None:
        raise MissingError(
            f"{key}: {value} needs the package {package}, which is not installed",
            where=loaded.where(key),
            remedy=f"{Path(sys.executable).name} -m pip install '{requirement}'",
        )


def workers_of(recipe: Recipe, processes: int, *, media: bool) -> int:
    """Processes that prepare batches, for each of so many that train on this machine.

    Rows of tokens are copied in no time; images and sounds are decoded, ahead of the step that takes them.
    """
    workers = recipe.data.workers if recipe.data is not None else 0
    if isinstance(workers, int):
        return workers
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // (2 * max(1, processes)))) if media else 0


def training_arguments(
    loaded: LoadedRecipe,
    plan: Plan,
    run: Path,
    device_kind: str,
    more: dict[str, Any] | None = None,
    *,
    media: bool = False,
) -> TrainingArguments:
    """The Trainer's arguments; its own logging, evaluation and saving strategies are off (see `callbacks`).

    `more`: fields of the class that `config_class` gives. `media`: rows hold images or sounds.
    """
    recipe = loaded.recipe
    train = recipe.train
    _tracker_environment(loaded, run)
    if device_kind == "cpu":
        # accelerate imports DeepSpeed where it is installed, which says on standard output that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    given: dict[str, Any] = {
        "output_dir": str(run),
        "run_name": recipe.tracking.name or recipe.name,
        "seed": recipe.seed,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "optim": _OPTIMIZERS.get(train.optimizer, train.optimizer),
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": _SCHEDULERS.get(train.lr_scheduler, train.lr_scheduler),
        "warmup_steps": plan.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "activation_checkpointing": train.activation_checkpointing,
        "use_cpu": device_kind == "cpu",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": list(recipe.tracking.to),
        **({"project": recipe.tracking.project} if recipe.tracking.project else {}),
        "remove_unused_columns": False,
        "dataloader_num_workers": workers_of(recipe, plan.world_size // recipe.launch.nodes, media=media),
        "dataloader_pin_memory": device_kind == "cuda",
        # All of a model's parameters take part in every pass, but for towers where no row of a micro-batch has media;
        # its buffers are the same everywhere.
        "ddp_find_unused_parameters": media,
        "ddp_broadcast_buffers": False,
        "log_level": "error",
    }
    if device_kind == "cuda" and "accelerator_config" not in train.trainer_args:
        given["accelerator_config"] = {"non_blocking": True}
    try:
        arguments = config_class(loaded)(**given, **(more or {}), **train.trainer_args)
        if plan.precision == "fp8":
            arguments.mixed_precision = "fp8"
        # With several GPUs in sight the Trainer would split each batch over them (DataParallel).
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments
    except (ValueError, TypeError, ImportError) as error:
        library = config_class(loaded).__module__.partition(".")[0]
        raise RecipeError(
            f"{library} refuses the settings: {str(error).splitlines()[0][:300]}", where=loaded.where("train")
        ) from error


def _known(loaded: LoadedRecipe, key: str, value: str, known: set[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, sorted(known), n=3, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(known)[:12])}, ..."
    raise RecipeError(f"{key}: the installed transformers knows no {value!r}", where=loaded.where(key), remedy=remedy)


def _tracker_environment(loaded: LoadedRecipe, run: Path) -> None:
    # transformers' callbacks read where to write, and under which project, from the environment.
    tracking = loaded.recipe.tracking
    if "tensorboard" in tracking.to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    if tracking.project is not None:
        os.environ["WANDB_PROJECT"] = os.environ["MLFLOW_EXPERIMENT_NAME"] = tracking.project
    if tracking.tags:
        os.environ["WANDB_TAGS"] = ",".join(tracking.tags)
        os.environ["MLFLOW_TAGS"] = json.dumps(dict.fromkeys(tracking.tags, "true"))
