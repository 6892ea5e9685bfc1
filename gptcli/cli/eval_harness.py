"""The face of lm-evaluation-harness in `gptcli eval`: which tasks, and their table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.cli.console import Console
    from gptcli.evaluation.task_files import Asked
    from gptcli.recipe.load import LoadedRecipe

TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAME|FILE.yaml,...",
        help="Tasks of lm-evaluation-harness, by name or as files (repeatable).",
    ),
]
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before a task's questions.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of what the tasks draw; default: lm-eval's seeds.")]
TrustTasks = Annotated[bool, typer.Option("--trust-tasks", help="Run the Python code that task files bring.")]


def asked_tasks(names: list[str] | None, loaded: LoadedRecipe | None) -> list[Asked]:
    """The tasks of a command line (with commas), else of a recipe; each once."""
    from gptcli.evaluation.task_files import Asked

    if names:
        given = [Asked(name.strip()) for part in names for name in part.split(",") if name.strip()]
    else:
        listed = [] if loaded is None else loaded.recipe.eval.tasks
        given = [Asked(name, loaded.where(f"eval.tasks.{i}")) for i, name in enumerate(listed) if loaded is not None]
    return list(dict.fromkeys(given))


def find(
    folders: list[Path],
    asked: list[Asked],
    loaded: LoadedRecipe | None,
    out: Console,
    *,
    num_fewshot: int | None,
    seed: int | None,
    trusted: bool,
    limit: int | None,
    sequence_length: int | None,
    precision: str,
) -> Callable[[Path, Callable[[], PreTrainedModel]], dict[str, Any]] | None:
    """What gives lm-eval's results of a model's folder and its model; None where no tasks are asked for."""
    if not asked:
        return None
    from gptcli.evaluation import harness

    section = None if loaded is None else loaded.recipe.eval
    options = harness.HarnessOptions(
        num_fewshot if num_fewshot is not None or section is None else section.num_fewshot,
        limit if limit is not None or section is None else section.limit,
        seed,
        sequence_length,
        precision,  # type: ignore[arg-type]
        shown=out.is_terminal and not out.quiet,
    )
    found = harness.find_tasks(asked, str(folders[0]), trusted=trusted, reporter=out)
    return lambda folder, load: harness.run_tasks(folder, found, options, out, load)


def print_measured(folders: list[Path], measured: list[dict[str, Any]], out: Console) -> None:
    """A table a model, of tasks and their figures."""
    from gptcli.evaluation.harness import rows

    for folder, results in zip(folders, measured, strict=False):
        out.table(["task", "filter", "shots", "metric", "value", "stderr"], rows(results), title=str(folder))
