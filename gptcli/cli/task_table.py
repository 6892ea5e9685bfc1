"""The tables of `gptcli eval` for tasks: a line a metric, a column a model, and what was taken for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.evaluation.tasks import TaskResult


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
