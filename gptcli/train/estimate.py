"""The dry run behind `gptcli plan`: the plan of a recipe and its cost, on this machine or on one that is not here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.device import CARDS, Card, best_device, card_named, device_name, peak_flops
from gptcli.errors import UsageError
from gptcli.reporting import Reporter, mebibytes
from gptcli.runs.folder import RunFolder
from gptcli.train.assemble import assemble, look_at, padding_text, trained_text
from gptcli.train.decisions import Hardware
from gptcli.train.memory import SHARINGS, memory_estimate
from gptcli.train.modes import AMPERE, PACKAGES
from gptcli.train.plan import Plan, step_of
from gptcli.train.strategy import room

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe

# The share of the peak that training reached where it was measured (benchmarks/RESULTS.md); the estimate's one guess.
_UTILIZATION = {"cpu": 0.75, "cuda": 0.4}
MEDIA_NOTE = "towers by a rule for layers; FLOPs and time as if they worked on every token"
_NAMES = {"ddp": "ddp", "fsdp": "fsdp", "zero1": "deepspeed ZeRO 1", "zero2": "ZeRO 2", "zero3": "ZeRO 3"}


@dataclass(frozen=True)
class Estimate:
    """A plan and what it costs; seconds are None where the device's peak is unknown.

    Attributes:
        plan: the plan.
        device: the name of one device.
        device_memory: its bytes.
        room: what of them a process may fill.
        seconds: of training steps, without waiting for other processes.
        validation_tokens: in the validation data.
        strategies: bytes of memory that each way to share the model needs on a device, by use.
        media: whether rows hold images or sounds, whose part of the costs is rough.
    """

    plan: Plan
    device: str
    device_memory: int
    room: int
    seconds: float | None
    validation_tokens: int
    strategies: dict[str, dict[str, int]]
    media: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **self.plan.as_dict(),
            "device": self.device,
            "device_memory_bytes": self.device_memory,
            "estimated_seconds": self.seconds,
            "validation_tokens": self.validation_tokens,
            "strategies": {
                sharing: {"memory": uses, "memory_bytes": sum(uses.values()), "fits": self._fits(uses)}
                for sharing, uses in self.strategies.items()
            },
        }

    def _fits(self, uses: dict[str, int]) -> bool:
        return sum(uses.values()) <= self.room

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Columns and rows for the terminal."""
        plan = self.plan
        data = f"{plan.rows_per_epoch:,} rows of {plan.sequence_length} tokens" if plan.rows_per_epoch else "unknown"
        epochs = "unknown" if plan.epochs is None else f"{plan.epochs:.2f}"
        size = f"{plan.global_batch_size} rows = {plan.global_batch_size * plan.sequence_length:,} tokens"
        work = [
            ["parameters", f"{plan.parameters:,} ({plan.matrix_parameters:,} in matrix products)"],
            *([["trained", trained_text(plan)]] if plan.trained_parameters < plan.parameters else []),
            ["data", data],
            ["steps", f"{plan.steps:,} (warm-up {plan.warmup_steps:,}, decay {plan.decay_steps:,})"],
            ["a step", size],
            ["at once", self._parts()],
            ["tokens", f"{plan.total_tokens:,} ({epochs} epochs{padding_text(plan)})"],
            ["FLOPs", f"{plan.total_flops:.3g} ({plan.flops_per_token:,} a token)"],
        ]
        many = "" if plan.world_size == 1 else f"{plan.world_size} x "
        costs = [
            ["device", f"{many}{self.device}, {plan.precision}"],
            ["time", "unknown" if self.seconds is None else f"about {_duration(self.seconds)} of training steps"],
            ["memory", f"about {mebibytes(plan.memory_bytes)} of {mebibytes(self.device_memory)}"],
            *[[f"  {name}", mebibytes(count)] for name, count in plan.memory.items()],
            *([["  of media", MEDIA_NOTE]] if self.media else []),
            ["disk", f"{mebibytes(plan.disk_bytes)} ({mebibytes(plan.checkpoint_bytes)} a checkpoint)"],
        ]
        tables = [(["what will be done", ""], work), (["what it costs", ""], costs)]
        if len(self.strategies) > 1:
            tables.append((["strategy", "a device", "of it weights", "gradients", "optimizer", "fits"], self._shared()))
        if plan.decisions:
            tables.append((["decided", "", "because"], [[d.key, d.value, d.reason] for d in plan.decisions]))
        return tables

    def _parts(self) -> str:
        plan = self.plan
        parts = f"{plan.micro_batch_size} rows x {plan.gradient_accumulation_steps}"
        if plan.world_size == 1:
            return f"{parts} x 1 process"
        split = "" if plan.processes == plan.world_size else f" of {plan.world_size // plan.processes} devices a model"
        return f"{parts} x {plan.processes} processes{split}, {plan.strategy}"

    def _shared(self) -> list[list[str]]:
        """One line a way to share the model; `buckets` count as gradients and unsharded layers as weights."""
        rows = []
        for sharing, uses in self.strategies.items():
            name = _NAMES.get(sharing, sharing) + (" (chosen)" if sharing == self.plan.sharing else "")
            weights = uses.get("weights", 0) + uses.get("unsharded layers", 0)
            gradients = uses.get("gradients", 0) + uses.get("buckets", 0)
            sizes = [sum(uses.values()), weights, gradients, uses.get("optimizer", 0)]
            rows.append([name, *map(mebibytes, sizes), "yes" if self._fits(uses) else "no"])
        return rows


def estimate(
    loaded: LoadedRecipe,
    reporter: Reporter,
    *,
    device: str | None = None,
    processes: int | None = None,
    nodes: int | None = None,
) -> Estimate:
    """Plan a recipe. The data is tokenized (and kept in the cache) if it was not.

    Args:
        loaded: the recipe.
        reporter: where to say what is done.
        device: a card (see `device.CARDS`), or cpu for this machine's; None: this machine's best.
        processes: on each machine; None: as the recipe says.
        nodes: machines; None: as the recipe says.

    Raises:
        UsageError: no such card.
    """
    card = None if device in (None, "cpu") else _card(str(device))
    import torch

    launch = loaded.recipe.launch
    nodes = nodes or launch.nodes
    here = best_device() if device is None else torch.device("cpu")
    if processes is None:
        visible = torch.cuda.device_count() if here.type == "cuda" else 1
        processes = visible if launch.processes == "auto" else launch.processes
    hardware = look_at(here) if card is None else _elsewhere(card, loaded)
    hardware = replace(hardware, processes=processes * nodes, nodes=nodes)
    assembly = assemble(
        loaded, RunFolder(Path(loaded.recipe.output_dir) / loaded.recipe.name), reporter, hardware=hardware
    )
    plan, validation = assembly.plan, assembly.prepared.validation
    peak = peak_flops(here, plan.precision) if card is None else card.flops
    # The processes of a machine share its processor, and have a GPU each.
    devices = nodes if hardware.kind == "cpu" else hardware.processes
    share = _UTILIZATION.get(hardware.kind)
    sharings = SHARINGS if hardware.processes > 1 else (plan.sharing,)
    return Estimate(
        plan,
        device_name(here) if card is None else card.name,
        hardware.memory_bytes,
        room(hardware),
        None if peak is None or share is None else plan.total_flops / (peak * share * devices),
        0 if validation is None else validation.tokens,
        {
            sharing: memory_estimate(assembly.counts, loaded.recipe.train, replace(step_of(plan), sharing=sharing))
            for sharing in sharings
        },
        assembly.has_media,
    )


def _card(name: str) -> Card:
    card = card_named(name)
    if card is not None:
        return card
    slugs = [each.slug for each in CARDS]
    near = difflib.get_close_matches(name.lower(), slugs, n=3, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Known: cpu, {', '.join(slugs)}."
    raise UsageError(f"--device {name}: no such card is known", remedy=remedy)


def _elsewhere(card: Card, loaded: LoadedRecipe) -> Hardware:
    """A machine with such a card and what a usual installation has: triton, a compiler, and what the recipe names."""
    train = loaded.recipe.train
    named = {PACKAGES[key][0] for key in (train.attention, train.precision) if key in PACKAGES}
    fast = card.amd or card.capability >= AMPERE
    return Hardware(
        "cuda",
        fast_bf16=fast,
        bf16_reason=f"{card.name} multiplies bf16 fast" if fast else f"{card.name} has no fast bf16",
        processes=1,
        memory_bytes=card.gigabytes * 10**9,
        capability=card.capability,
        rocm=card.amd,
        compiler=True,
        packages=frozenset({"triton"} | named),
        here=False,
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
