"""The end of a run: its result, the trained model, the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptcli.device import peak_resident_bytes
from gptcli.errors import GptcliError, writing
from gptcli.files import committed_folder, write_atomic
from gptcli.reporting import Reporter
from gptcli.runs import metrics
from gptcli.runs.folder import RunFolder
from gptcli.runs.report import write_report
from gptcli.train import group
from gptcli.train.assemble import Assembly
from gptcli.train.checkpoint import copy_model, system_errors, verify
from gptcli.train.record import model_card

if TYPE_CHECKING:
    import torch

    from gptcli.train.trainer import CausalTrainer


def result_of(assembly: Assembly, trainer: CausalTrainer, step: int, wall_seconds: float) -> dict[str, Any]:
    """What a run came to: printed by `--json`, kept in run.json; its validation is that of the weights in `final/`."""
    # From the file, not from this process: a resume may have had nothing left to do but `final/`.
    lines = metrics.read(assembly.run.metrics)
    best = trainer.best.step if trainer.best else None
    validation = next(
        (line["validation"] for line in reversed(lines) if "validation" in line and best in (None, line["step"])), None
    )
    return {
        "run": str(assembly.run.path),
        "status": "done",
        "step": step,
        **({"best_step": best} if best else {}),
        "tokens": assembly.plan.tokens_at(step),
        "loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        "validation": validation and {key: validation[key] for key in ("loss", "bits_per_byte")},
        "tokens_per_second": trainer.meter.tokens_per_second,
        "wall_seconds": round(wall_seconds, 2),
        "peak_bytes": trainer.meter.peak_bytes,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def write_final(assembly: Assembly, trainer: CausalTrainer, result: dict[str, Any]) -> None:
    """Write `final/`, the trained model: the best checkpoint's where there is a best one. For all processes to call.

    Raises:
        CheckpointError: it cannot be written.
    """
    weights = trainer.whole_weights()
    group.from_first(lambda: _write_final(assembly, trainer, result, weights))


def _write_final(
    assembly: Assembly, trainer: CausalTrainer, result: dict[str, Any], weights: dict[str, torch.Tensor] | None
) -> None:
    target, comfort = assembly.run.final, "The last checkpoint is good."
    with writing(target, "the trained model", comfort), committed_folder(target) as work, system_errors(work):
        best = trainer.best and assembly.run.checkpoint(trainer.best.step)
        if best and verify(best) is None:
            copy_model(best, work)
        else:
            trainer.write_model(work, weights)
        write_atomic(work / "README.md", model_card(assembly.loaded, assembly.plan, result))


def write_run_report(run: RunFolder, reporter: Reporter) -> None:
    """Write the run's report; one that cannot be written is no failure of the run."""
    try:
        write_report(run)
    except GptcliError as error:
        reporter.warn(f"no report: {error.lines()[0]}")
