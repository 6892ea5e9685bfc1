"""The dry run behind `gptcli plan`: the plan of a recipe with the time that it will take here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.device import best_device, device_name, peak_flops, total_memory
from gptcli.reporting import Reporter
from gptcli.runs.folder import RunFolder
from gptcli.train.assemble import assemble
from gptcli.train.memory import mebibytes
from gptcli.train.plan import Plan

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe

# The share of the peak that training reached where it was measured (benchmarks/RESULTS.md); the estimate's one guess.
_UTILIZATION = {"cpu": 0.75, "cuda": 0.4}


@dataclass(frozen=True)
class Estimate:
    """A plan and what it costs on this machine; seconds are None where the device's peak is unknown."""

    plan: Plan
    device: str
    device_memory: int
    seconds: float | None
    validation_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **self.plan.as_dict(),
            "device": self.device,
            "device_memory_bytes": self.device_memory,
            "estimated_seconds": self.seconds,
            "validation_tokens": self.validation_tokens,
        }

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Titles and rows for the terminal."""
        plan = self.plan
        data = f"{plan.rows_per_epoch:,} rows of {plan.sequence_length} tokens" if plan.rows_per_epoch else "unknown"
        epochs = "unknown" if plan.epochs is None else f"{plan.epochs:.2f}"
        size = f"{plan.global_batch_size} rows = {plan.global_batch_size * plan.sequence_length:,} tokens"
        parts = f"{plan.micro_batch_size} rows x {plan.gradient_accumulation_steps} x {plan.processes} process"
        work = [
            ["parameters", f"{plan.parameters:,} ({plan.matrix_parameters:,} in matrix products)"],
            ["data", data],
            ["steps", f"{plan.steps:,} (warm-up {plan.warmup_steps:,}, decay {plan.decay_steps:,})"],
            ["a step", size],
            ["at once", parts],
            ["tokens", f"{plan.total_tokens:,} ({epochs} epochs)"],
            ["FLOPs", f"{plan.total_flops:.3g} ({plan.flops_per_token:,} a token)"],
        ]
        costs = [
            ["device", f"{self.device}, {plan.precision}"],
            ["time", "unknown" if self.seconds is None else f"about {_duration(self.seconds)} of training steps"],
            ["memory", f"about {mebibytes(plan.memory_bytes)} of {mebibytes(self.device_memory)}"],
            *[[f"  {name}", mebibytes(count)] for name, count in plan.memory.items()],
            ["disk", f"{mebibytes(plan.disk_bytes)} ({mebibytes(plan.checkpoint_bytes)} a checkpoint)"],
        ]
        tables = [("what will be done", work), ("what it costs", costs)]
        if plan.decisions:
            tables.append(("decided", [[d.key, d.value, d.reason] for d in plan.decisions]))
        return tables


def estimate(loaded: LoadedRecipe, reporter: Reporter) -> Estimate:
    """Plan a recipe on this machine. The data is tokenized (and kept in the cache) if it was not."""
    run = RunFolder(Path(loaded.recipe.output_dir) / loaded.recipe.name)
    assembly = assemble(loaded, run, reporter)
    device = best_device()
    peak = peak_flops(device, assembly.plan.precision)
    share = _UTILIZATION.get(device.type)
    seconds = None if peak is None or share is None else assembly.plan.total_flops / (peak * share)
    validation = assembly.prepared.validation
    return Estimate(
        assembly.plan,
        device_name(device),
        total_memory(device),
        seconds,
        0 if validation is None else validation.tokens,
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
