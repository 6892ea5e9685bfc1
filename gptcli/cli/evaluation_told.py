"""What `gptcli eval` and `gptcli runs compare` tell of models that were measured: tables, JSON, Markdown, a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli import eval_harness as of_harness

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.evaluation.tasks import TaskResult


def tell(
    folders: list[Path],
    results: list[Evaluation],
    out: Console,
    *,
    tasks: Sequence[TaskResult] = (),
    harness: Sequence[dict[str, Any]] = (),
    markdown: Path | None = None,
    html: Path | None = None,
) -> None:
    """Print the results, of several models each beside the first, and write them as Markdown or a page if asked to.

    What models give together stands at the end of `results` and `tasks`, where it is asked for.

    Raises:
        DivergedError: what was measured is not a finite number; after all is told.
    """
    from gptcli.cli.evaluation_table import print_results, write_markdown
    from gptcli.cli.evaluation_tasks import print_tasks
    from gptcli.errors import DivergedError

    if out.json_output:
        values = _values(folders, results, tasks, harness, curves=html is not None)
        out.print_json(values if len(values) > 1 else values[0])
    else:
        if results:
            print_results(results, out)
        if tasks:
            print_tasks(list(tasks), out)
        of_harness.print_measured(folders, list(harness), out)
    if markdown is not None and results:
        write_markdown(results, markdown)
    if html is not None:
        from gptcli.evaluation.page import write_page

        write_page(html, results, tasks, [(str(folder), each) for folder, each in zip(folders, harness, strict=False)])
        out.say(f"page: {html}")
    bad = [result.model for result in results if not math.isfinite(result.result.loss)]
    if harness:
        from gptcli.evaluation.harness import without_value

        bad += [str(folder) for folder, each in zip(folders, harness, strict=True) if without_value(each)]
    if bad:
        what = "the loss" if results else "what was measured"
        raise DivergedError(
            f"{what} of {', '.join(dict.fromkeys(bad))} is not a finite number",
            remedy="The model gives NaN or infinite logits: its weights are damaged, or --precision is too low.",
        )


def _values(
    folders: list[Path],
    results: list[Evaluation],
    tasks: Sequence[TaskResult],
    harness: Sequence[dict[str, Any]],
    *,
    curves: bool,
) -> list[dict[str, Any]]:
    """What --json prints of each model."""
    from gptcli.evaluation.compare import compare

    names = [each.model for each in results or tasks] or [str(folder) for folder in folders]
    values: list[dict[str, Any]] = [{"model": name} for name in names]
    for index, value in enumerate(values):
        if results:
            value |= results[index].as_dict()
        elif tasks:
            value |= tasks[index].as_dict()
        if tasks:
            value["metrics"] = tasks[index].metrics
        if results and index:
            first = results[0]
            value["compared"] = {"with": first.model, **compare(results[index].scores, first.scores).as_dict()}
        if harness:
            value["harness"] = harness[index]
        if curves:
            collected = results[index].curves if results else None
            sureness = tasks[index].calibration if tasks else None
            value["curves"] = {} if collected is None else collected.as_dict()
            value["curves"] |= {} if sureness is None else {"labels": sureness.as_dict()}
    return values
