"""What is said when memory runs out: the keys to change and what each of them saves, by the plan's own estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptcli.device import free_memory, is_out_of_memory, total_memory
from gptcli.errors import OutOfMemoryError, RecipeError
from gptcli.recipe.presets import PRESETS
from gptcli.reporting import mebibytes
from gptcli.train.batches import next_smaller
from gptcli.train.memory import memory_estimate
from gptcli.train.plan import loss_block, step_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from gptcli.model.build import Counts
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Train
    from gptcli.train.plan import Plan

SHOWN = 6  # with the two lines above them, what an error may print
OTHER_OPTIMIZERS = ("muon", "adafactor")


@dataclass(frozen=True)
class Saving:
    """A change of the recipe, the bytes that it saves by estimate, and what there is to know of it."""

    change: str
    saved_bytes: int
    note: str


@contextmanager
def explained(explain: Callable[[], OutOfMemoryError]) -> Iterator[None]:
    """Turn running out of memory into the error that `explain` makes, once what filled the memory is freed."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        free_memory(error)
        raise explain() from error


def out_of_memory(
    what: str, loaded: LoadedRecipe, config: PreTrainedConfig, counts: Counts, plan: Plan, device: torch.device
) -> OutOfMemoryError:
    """The error that says what did not fit, and what would save memory, the most first."""
    found = sorted(savings(loaded, config, counts, plan), key=lambda saving: -saving.saved_bytes)
    there = f"{device.type} has {mebibytes(total_memory(device))}"
    lines = [f"Training needs about {mebibytes(plan.memory_bytes)}; {there}. What saves memory, by estimate:"]
    lines += [f"{each.change} saves about {mebibytes(each.saved_bytes)} ({each.note})" for each in found[:SHOWN]]
    return OutOfMemoryError(what, remedy="\n".join(lines))


def savings(loaded: LoadedRecipe, config: PreTrainedConfig, counts: Counts, plan: Plan) -> list[Saving]:
    """The changes of a recipe that need less memory than its plan, in no order.

    Args:
        loaded: the recipe.
        config: its model's configuration.
        counts: its model's parameters.
        plan: its plan.
    """
    train, rows, length = loaded.recipe.train, plan.micro_batch_size, plan.sequence_length
    share = rows * plan.gradient_accumulation_steps

    def needed(counts: Counts = counts, train: Train = train, rows: int = rows, length: int = length) -> int:
        halves, accumulation = plan.halves and rows > 1, share // rows
        block = loss_block(rows * length, counts.vocabulary, 2 if halves else 1, logit_bytes=plan.logit_bytes)
        step = replace(
            step_of(plan),
            tokens=rows * length // plan.context_parallel,
            length=length,
            block=block,
            halves=halves,
            accumulation=accumulation,
        )
        return sum(memory_estimate(counts, train, step).values())

    options: list[tuple[str, int, str]] = []
    if rows > 1:
        fewer = next_smaller(rows)
        note = f"now {rows}; the global batch stays"
        options.append((f"train.micro_batch_size={fewer}", needed(rows=fewer), note))
    if not train.activation_checkpointing:
        checkpointing = train.model_copy(update={"activation_checkpointing": True})
        options.append(("train.activation_checkpointing=true", needed(train=checkpointing), "about a third slower"))
    if length > 1:
        options.append((f"data.sequence_length={length // 2}", needed(length=length // 2), f"now {length:,}"))
    for name in OTHER_OPTIMIZERS:
        changed = train.model_copy(update={"optimizer": name})
        note = f"now {train.optimizer}; it wants its own learning rate"
        options.append((f"train.optimizer={name}", needed(train=changed), note))
    if (smaller := _smaller_model(loaded, config, counts)) is not None:
        change, fewer_counts, note = smaller
        options.append((change, needed(counts=fewer_counts), note))
    now = needed()
    return [Saving(change, now - then, note) for change, then, note in options if then < now]


def _smaller_model(loaded: LoadedRecipe, config: PreTrainedConfig, counts: Counts) -> tuple[str, Counts, str] | None:
    """The next smaller preset, or half the layers: the change, the parameters then, and what it is now."""
    from gptcli.model.build import TokenIds, build_config, count_parameters

    model = loaded.recipe.model
    if model is None or model.type is None:
        return None
    given = dict(model.config or {})
    own = config.attribute_map.get("num_hidden_layers", "")  # GPT-2's is n_layer
    key = own if own in given else "num_hidden_layers"
    names = list(PRESETS)
    update: dict[str, Any]
    if model.preset in PRESETS and key not in given:
        at = names.index(model.preset)
        if at == 0:
            return None
        change, now, update = f"model.preset={names[at - 1]}", names[at], {"preset": names[at - 1]}
    else:
        layers = counts.layers // 2
        if layers == 0:
            return None
        change, now = f"model.config.{key}={layers}", str(counts.layers)
        update = {"config": {**given, key: layers}}
    recipe = loaded.recipe.model_copy(update={"model": model.model_copy(update=update)})
    ids = TokenIds(config.get_text_config().vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id)
    try:
        made, _ = build_config(replace(loaded, recipe=recipe), ids)
        return change, count_parameters(made), f"now {now}"
    except (RecipeError, MemoryError):
        return None  # fields that only fit together, or nothing left to count in: the other changes are named
