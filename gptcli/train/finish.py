"""The end of a run: its result, the trained model, the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.device import peak_resident_bytes
from gptcli.errors import GptcliError, writing
from gptcli.files import committed_folder, system_errors, write_atomic
from gptcli.model.export import merge
from gptcli.reporting import Reporter
from gptcli.runs import metrics
from gptcli.runs.folder import RunFolder
from gptcli.runs.report import write_report
from gptcli.train import group, sharding
from gptcli.train.assemble import Assembly
from gptcli.train.checkpoint import copy_model, verify
from gptcli.train.record import model_card
from gptcli.train.together import Write, write_together

if TYPE_CHECKING:
    from gptcli.train.recorded import RecordedTrainer

# As many processes write `final/` as it has files of this size: one, but for a model of billions of parameters.
FILE_BYTES = 5 * 10**9


def result_of(assembly: Assembly, trainer: RecordedTrainer, step: int, wall_seconds: float) -> dict[str, Any]:
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
        "tokens": trainer.tokens_at(step),
        "loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        "validation": validation and {key: value for key, value in validation.items() if key not in ("tokens", "rows")},
        "tokens_per_second": trainer.meter.tokens_per_second,
        "wall_seconds": round(wall_seconds, 2),
        "peak_bytes": trainer.meter.peak_bytes,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def write_final(assembly: Assembly, trainer: RecordedTrainer, result: dict[str, Any]) -> None:
    """Write `final/`, the trained model: the best checkpoint's where there is a best one. For all processes to call.

    Raises:
        CheckpointError: it cannot be written.
    """
    best = group.from_first(lambda: _good_best(assembly.run, trainer))
    trusted = bool(assembly.loaded.recipe.model and assembly.loaded.recipe.model.trust_remote_code)

    def collect(writers: list[int]) -> Write | None:
        if best is not None:
            return None
        size = sum(sharding.weight_sizes(trainer.plain_model).values())
        return trainer.collect(writers[: 1 + size // FILE_BYTES])

    def rest(work: Path) -> None:
        if best is not None:
            copy_model(best, work)
        else:
            trainer.save_tokenizer(work)
        if assembly.loaded.recipe.finetune.merge:
            merge(work, trust_remote_code=trusted)
        write_atomic(work / "README.md", model_card(assembly.loaded, assembly.plan, result))

    write_together(_committing(assembly.run.final), collect, rest)


def _good_best(run: RunFolder, trainer: RecordedTrainer) -> Path | None:
    best = run.checkpoint(trainer.best.step) if trainer.best else None
    return best if best is not None and verify(best) is None else None


@contextmanager
def _committing(target: Path) -> Iterator[Path]:
    comfort = "The last checkpoint is good."
    with writing(target, "the trained model", comfort), committed_folder(target) as work, system_errors(work):
        yield work


def write_run_report(run: RunFolder, reporter: Reporter) -> None:
    """Write the run's report; one that cannot be written is no failure of the run."""
    try:
        write_report(run)
    except GptcliError as error:
        reporter.warn(f"no report: {error.lines()[0]}")
