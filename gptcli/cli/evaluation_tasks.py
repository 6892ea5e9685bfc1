"""The tasks of `gptcli eval`, and their tables: a line a metric, a column a model, and what was taken for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.cli.console import Console
    from gptcli.evaluation.tasks import TaskResult
    from gptcli.recipe.load import LoadedRecipe


def has_tasks(
    folders: list[Path], loaded: LoadedRecipe | None, predictions: Path | None, *, fused: bool = False
) -> bool:
    """Whether the recipe has tasks.

    Raises:
        UsageError: `predictions`, a file, where there is no task, or several models that are not fused.
    """
    from gptcli.errors import UsageError
    from gptcli.evaluation.tasks import task_metrics

    if loaded is None or not task_metrics(loaded):
        if predictions is not None:
            raise UsageError(
                "--predictions writes the answers to tasks, and there are none",
                remedy="Name metrics in a recipe: eval.metrics",
            )
        return False
    if predictions is not None and len(folders) > 1 and not fused:
        raise UsageError("--predictions is a file of one model's answers", remedy="Name one model, or fuse them.")
    if predictions is not None and predictions.is_dir():
        raise UsageError(f"--predictions {predictions} is a folder", remedy="Name a file.")
    return True


def print_tasks(results: list[TaskResult], out: Console) -> None:
    """Print the metrics of all models, then the confusion matrix of each that has one."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics if name != "confusion_matrix"))
    single = len(results) == 1
    rows = [["data", results[0].data]] if single else []
    rows += [["rows", *(f"{result.rows:,}" for result in results)]]
    rows += [[name, *(_shown(result.metrics.get(name)) for result in results)] for name in names]
    out.table(["metric", *(result.model for result in results)], rows, title=None if single else results[0].data)
    for result in results:
        if (matrix := result.metrics.get("confusion_matrix")) is not None:
            title = None if single else result.model
            counts = [[name, *(f"{count:,}" for count in row)] for name, row in _named_rows(matrix)]
            out.table(["right \\ answered", *matrix["labels"]], counts, title=title)


def _named_rows(matrix: dict[str, Any]) -> list[tuple[str, list[int]]]:
    return list(zip(matrix["labels"], matrix["counts"], strict=True))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
