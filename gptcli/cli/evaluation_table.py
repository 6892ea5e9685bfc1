"""Evaluations as tables on the screen or in Markdown: one model as a list of figures, several beside the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcli.errors import writing
from gptcli.evaluation.tables import SOURCES, change, figures, source_rows, with_interval
from gptcli.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.cli.console import Console
    from gptcli.evaluation.evaluate import Evaluation

Table = tuple[list[str], list[list[str]]]
FIGURES = 4  # columns of a table of several models before those that compare


def print_results(results: list[Evaluation], out: Console) -> None:
    """Print one model's figures (and those of each source), or a table of several."""
    if len(results) == 1:
        for title, (columns, rows) in _tables(results):
            out.table(columns, rows, title=title)
        return
    [(title, (columns, rows))] = _tables(results)  # which is too wide for a terminal of 80 columns
    out.table(columns[:FIGURES], [row[:FIGURES] for row in rows], title=title)
    beside = [[row[0], *row[FIGURES:]] for row in rows[1:]]
    out.table([columns[0], *columns[FIGURES:]], beside, title=f"beside {rows[0][0]} (below 0 is better)")


def write_markdown(results: list[Evaluation], path: Path) -> None:
    """Write the same tables as a Markdown file.

    Raises:
        CheckpointError: it cannot be written.
    """
    texts = []
    for title, (columns, rows) in _tables(results):
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        texts.append(f"{title}\n\n{table}\n" if title else f"{table}\n")
    with writing(path, "the table", "The results were printed."):
        write_atomic(path, "\n".join(texts))


def _cell(text: str) -> str:
    from gptcli.reporting import one_line

    return one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _tables(results: list[Evaluation]) -> list[tuple[str | None, Table]]:
    first = results[0]
    if len(results) > 1:
        return [(f"{first.data}: {first.result.documents:,} documents, {first.result.bytes:,} bytes", _many(results))]
    tables: list[tuple[str | None, Table]] = [(None, _one(first))]
    if len(sources := source_rows(first)) > 1:
        tables.append(("by source", (SOURCES, sources)))
    return tables


def _one(evaluation: Evaluation) -> Table:
    return ["model", evaluation.model], [["data", evaluation.data], *map(list, figures(evaluation.scores).items())]


def _many(results: list[Evaluation]) -> Table:
    from gptcli.evaluation.compare import compare

    columns = ["model", "loss", "perplexity", "bits/byte", "difference", "95%", "p", "verdict"]
    assert columns[FIGURES] == "difference"
    rows = []
    for number, evaluation in enumerate(results):
        perplexity = figures(evaluation.scores)["perplexity"]
        row = [evaluation.model, f"{evaluation.result.loss:.4f}", perplexity]
        row.append(with_interval(evaluation.result.bits_per_byte, None))
        if number == 0:
            rows.append([*row, "-", "-", "-", "the baseline"])
            continue
        found = compare(evaluation.scores, results[0].scores)
        verdict = found.verdict + ("" if found.by == "loss" else " (bits/byte)")
        p = "-" if found.found is None else f"{found.found.p:.4f}"
        interval = "-" if found.found is None else f"{change(found.found.low)} to {change(found.found.high)}"
        rows.append([*row, change(found.difference), interval, p, verdict])
    return columns, rows
