"""The plan of preference tuning: the plan of rows as long as the longest pair, and what trl's trainers need beside it.

What preference tuning cannot do so far is refused here, by the key that asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.contents import content_hashes
from gptcli.errors import RecipeError
from gptcli.files import fingerprint, sha256_file
from gptcli.recipe.load import LoadedRecipe
from gptcli.train.plan import HALVES, Plan, make_plan

if TYPE_CHECKING:
    from gptcli.model.build import Counts
    from gptcli.train.decisions import Hardware
    from gptcli.train.pairs import PreparedPairs

# Work of a step in forward passes of a row's sequences: training is 3 of them (forward, and backward at twice that).
# The reference model is 1; kto runs both models on the mismatched answers too; grpo generates, at 1 a token.
_PASSES = {"dpo": 4, "kto": 3, "orpo": 3, "grpo": 4}
# Sequences that are in a pass at once for a row: of kto the answer and, in a pass of its own, another's.
_SEQUENCES = {"dpo": 2, "kto": 1, "orpo": 2, "grpo": 1}
NAMES = {"dpo": "pairs", "kto": "answers", "orpo": "pairs", "grpo": "completions"}
GENERATIONS = 8  # trl's own number of completions of a prompt


def has_reference(loaded: LoadedRecipe) -> bool:
    """Whether the method measures how far the model is from the one that it started as."""
    method = loaded.recipe.finetune.method
    return method in ("dpo", "kto") or (method == "grpo" and bool(loaded.recipe.train.trainer_args.get("beta")))


def generations(loaded: LoadedRecipe) -> int:
    """Completions of a prompt in a step of grpo; 1 for the methods that read their answers."""
    if loaded.recipe.finetune.method != "grpo":
        return 1
    return int(loaded.recipe.train.trainer_args.get("num_generations", GENERATIONS))


def check_preference(loaded: LoadedRecipe, hardware: Hardware) -> None:
    """Refuse by name what preference tuning does not do.

    Raises:
        RecipeError: with what to do instead.
    """
    recipe = loaded.recipe
    train, method = recipe.train, recipe.finetune.method
    parallel = recipe.launch.parallel
    one = "launch.processes=1 (the one GPU: CUDA_VISIBLE_DEVICES)"
    differ = "its rows differ in length"
    refused = (
        ("launch.processes", hardware.processes > 1, "it trains in one process so far", one),
        ("launch.parallel", parallel.tp * parallel.cp > 1, "it trains in one process so far", "leave it out"),
        (
            "finetune.adapter",
            recipe.finetune.adapter == "qlora",
            "the reference model is not quantized",
            "adapter: lora",
        ),
        (
            "finetune.adapter_from",
            recipe.finetune.adapter_from is not None and method in ("dpo", "kto"),
            "the reference model is the one without the adapter",
            "the merged model as model.from",
        ),
        ("train.compile", train.compile is True, "trl's trainers are not compiled", "compile: auto"),
        ("train.precision", train.precision == "fp8", "trl's trainers have no fp8", "precision: auto"),
        ("train.z_loss", train.z_loss != 0.0, "its losses have no softmax of their own", "leave it out"),
        ("train.max_tokens", train.max_tokens is not None, differ, "max_steps or epochs"),
        (
            "train.global_batch_tokens",
            train.global_batch_tokens is not None,
            differ,
            "global_batch_size",
        ),
        (
            "train.best_metric",
            train.early_stopping_patience is not None and (method == "grpo" or train.best_metric != "validation.loss"),
            "there is validation.loss, and none for grpo",
            "best_metric: validation.loss, or leave out early_stopping_patience",
        ),
    )
    for key, wrong, what, remedy in refused:
        if wrong:
            raise RecipeError(
                f"{key}: not with preference tuning: {what}", where=loaded.where(key), remedy=f"Use {remedy}."
            )
    if method == "grpo":
        _check_generations(loaded)


def _check_generations(loaded: LoadedRecipe) -> None:
    each, batch = generations(loaded), loaded.recipe.train.global_batch_size or 1
    key = "train.trainer_args.num_generations"
    if each < 2:
        raise RecipeError(f"{key}: grpo compares at least 2 completions of a prompt", where=loaded.where(key))
    if batch % each:
        raise RecipeError(
            f"train.global_batch_size: {batch} completions a step are no multiple of the {each} of a prompt",
            where=loaded.where("train.global_batch_size"),
            remedy=f"Set it to {max(1, batch // each) * each}, or {key} (now {each}) to a divisor of it.",
        )


def plan_preference(
    loaded: LoadedRecipe,
    prepared: PreparedPairs,
    counts: Counts,
    *,
    hardware: Hardware,
    decided: Mapping[str, str] | None,
    usable: Set[str],
) -> Plan:
    """Derive everything, as `make_plan` does. A row is a pair (kto: an answer, grpo: a completion).

    `sequence_length` is that of a row with its longest answers; steps are always full, so the last epoch may end with
    rows of the next one. Memory and FLOPs count the reference model.

    Raises:
        RecipeError: what is refused, or batches that do not divide.
    """
    check_preference(loaded, hardware)
    recipe, method, train_side = loaded.recipe, loaded.recipe.finetune.method, prepared.train
    each = generations(loaded)
    longest = train_side.longest + (recipe.generate.max_new_tokens if method == "grpo" else 0)
    rows = len(train_side) * each
    plan = make_plan(
        _as_rows(loaded, longest * _SEQUENCES[method]),
        counts,
        hardware,
        rows_per_epoch=rows,
        decided=decided,
        usable=usable,
    )
    if method == "kto" and plan.micro_batch_size < 2:
        raise RecipeError(
            "train.micro_batch_size: kto pairs each prompt with another's answer, so it needs 2 at once",
            where=loaded.where("train.micro_batch_size"),
            remedy="Set it, or train.global_batch_size, to 2 or more.",
        )
    total = plan.steps * plan.global_batch_size
    mean = train_side.tokens / len(train_side) + (recipe.generate.max_new_tokens if method == "grpo" else 0)
    passes = _PASSES[method] + (3 if method == "kto" else 0) + (1 if method == "grpo" and has_reference(loaded) else 0)
    memory = {**plan.memory, **_more_memory(loaded, counts, plan)}
    return replace(
        plan,
        halves=False,
        loss_block=None,
        dry_step=False,
        total_rows=total,
        total_tokens=round(total * mean),
        epochs=total / rows,
        total_flops=round(plan.flops_per_token / 3 * passes * total * mean),
        memory=memory,
        memory_bytes=sum(memory.values()),
        decisions=tuple(each for each in plan.decisions if each.key not in (HALVES, "loss")),
    )


def _more_memory(loaded: LoadedRecipe, counts: Counts, plan: Plan) -> dict[str, int]:
    """Bytes beside a training step's: the reference model in fp32, whole logits, the keys and values of generating."""
    found: dict[str, int] = {}
    if has_reference(loaded):
        found["reference model"] = 4 * counts.total
    if loaded.recipe.finetune.method == "orpo":  # trl makes all logits, of which the loss keeps two more
        found["logits"] = 3 * 4 * counts.vocabulary * plan.micro_batch_size * plan.sequence_length
    if loaded.recipe.finetune.method == "grpo":
        cache = 2 * 4 * counts.layers * counts.width * plan.global_batch_size * plan.sequence_length
        found["generation"] = max(0, cache - plan.memory.get("activations", 0) - plan.memory.get("logits", 0))
    return {use: size for use, size in found.items() if size}


def _as_rows(loaded: LoadedRecipe, length: int) -> LoadedRecipe:
    """The recipe of rows of `length`, without what goes with packed rows alone."""
    recipe = loaded.recipe
    assert recipe.data is not None
    train: dict[str, Any] = {"compile": False}
    if recipe.train.attention == "auto":
        train["attention"] = "sdpa"
    changed = {
        "data": recipe.data.model_copy(update={"sequence_length": length}),
        "train": recipe.train.model_copy(update=train),
    }
    return replace(loaded, recipe=recipe.model_copy(update=changed))


def preference_fingerprints(loaded: LoadedRecipe) -> dict[str, str]:
    """Hashes of the files that a run reads beside its data: the reference model's weights, and the reward's file."""
    found: dict[str, str] = {}
    assert loaded.recipe.model is not None and loaded.recipe.model.from_ is not None
    folder = Path(loaded.recipe.model.from_)
    if has_reference(loaded) and folder.is_dir():  # what a Hub id names is told by its revision
        names = sorted(str(path) for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
        found["reference"] = fingerprint(list(content_hashes(names)))
    reward = loaded.recipe.finetune.reward
    if loaded.recipe.finetune.method == "grpo" and isinstance(reward, str) and ".py:" in reward:
        file = Path(reward.rpartition(":")[0])
        if file.is_file():
            found["reward"] = sha256_file(file)
    return found
