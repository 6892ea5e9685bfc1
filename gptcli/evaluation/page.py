"""Evaluations as one HTML page with pictures, for any browser: nothing but the file is needed.

Each chart has its numbers in a table below it, for those who cannot see it and for those who want them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gptcli.data.tokenizer import load_fast
from gptcli.errors import writing
from gptcli.evaluation import heat
from gptcli.evaluation.compare import compare
from gptcli.evaluation.curves import TEXT_TOKENS, Calibration
from gptcli.evaluation.evaluate import Evaluation
from gptcli.evaluation.harness import rows as harness_rows
from gptcli.evaluation.surprise import changes, pieces
from gptcli.evaluation.tables import SOURCES, change, figures, source_rows
from gptcli.evaluation.tasks import TaskResult
from gptcli.files import write_atomic
from gptcli.reporting import one_line
from gptcli.runs.chart import Axis, Line, svg
from gptcli.runs.html import document, legend, plain, steady, table

STYLES = ("main", "second", "third", "fourth", "fifth", "sixth")
WIDTH, HEIGHT = 460, 300
SHADES = 8  # of a confusion matrix
MAPS = 3  # of two models, of the whole text; of more models there is less of it


def write_page(
    path: Path,
    results: Sequence[Evaluation] = (),
    tasks: Sequence[TaskResult] = (),
    harness: Sequence[tuple[str, dict[str, Any]]] = (),
) -> None:
    """Write the page.

    Args:
        path: the file.
        results: the losses of each model, with their curves.
        tasks: the tasks of each model.
        harness: the name of each model and its results of lm-evaluation-harness.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(path, "the page", "The results were printed."):
        write_atomic(path, page(results, tasks, harness))


def page(
    results: Sequence[Evaluation] = (),
    tasks: Sequence[TaskResult] = (),
    harness: Sequence[tuple[str, dict[str, Any]]] = (),
) -> str:
    """The page as a text."""
    models = [each.model for each in results or tasks] or [name for name, _ in harness]
    title = models[0] if len(models) == 1 else f"{len(models)} models"
    sections = [_header(title, models, results, tasks)]
    if results:
        sections += [_figures(results), _comparison(results), _sources(results), _curves(results)]
    sections += [_tasks(tasks), _harness(harness)]
    if results:
        sections.append(_surprise(results))
    style = resources.files("gptcli.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    return document(steady(one_line(title)), sections, style)


def _header(title: str, models: list[str], results: Sequence[Evaluation], tasks: Sequence[TaskResult]) -> str:
    facts: list[str] = []
    if results:
        result = results[0].result
        facts = [results[0].data, f"{result.documents:,} documents", f"{result.bytes:,} bytes"]
    elif tasks:
        facts = [tasks[0].data, f"{tasks[0].rows:,} rows"]
    line = '<span class="dot">·</span>'.join(f"<span>{plain(fact)}</span>" for fact in facts)
    names = f'<p class="facts">{plain(", ".join(models))}</p>' if len(models) > 1 else ""
    return f'<header><div class="title"><h1>{plain(title)}</h1></div><p class="facts">{line}</p>{names}</header>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _figures(results: Sequence[Evaluation]) -> str:
    every = [figures(each.scores) for each in results]
    rows = [[name, *(each[name] for each in every)] for name in every[0]]
    return _section("Figures", table(["", *(each.model for each in results)], rows))


def _comparison(results: Sequence[Evaluation]) -> str:
    if len(results) < 2:
        return ""
    rows = []
    for each in results[1:]:
        found = compare(each.scores, results[0].scores)
        ratio = found.found
        drawn = ("-", "-", "-")
        if ratio is not None:
            drawn = (f"{change(ratio.low)} to {change(ratio.high)}", f"{ratio.p:.4f}", f"{ratio.share:.1%}")
        rows.append([each.model, found.by.replace("_per_", "/"), change(found.difference), *drawn, found.verdict])
    first = plain(results[0].model)
    return _section(
        "Comparison",
        _note(
            f"Beside {first} on the same documents: below 0 is better. The interval, p and the share of draws in which "
            "the difference had this sign are of a paired bootstrap over documents."
        ),
        table(["model", "by", "difference", "95%", "p", "probability", "verdict"], rows),
    )


def _sources(results: Sequence[Evaluation]) -> str:
    if len(results[0].scores.sources) < 2:
        return ""
    named = [(each.model if len(results) > 1 else "", source_rows(each)) for each in results]
    return _section("By source", *(table(SOURCES, rows, caption=name) for name, rows in named))


def _curves(results: Sequence[Evaluation]) -> str:
    parts = [_positions(results)]
    named = [(each.model, each.curves.calibration) for each in results if each.curves is not None]
    parts.append(_calibration(named, "Calibration of the next token", "tokens"))
    charts = "".join(part for part in parts if part)
    return _section("Curves", f'<div class="charts">{charts}</div>') if charts else ""


def _positions(results: Sequence[Evaluation]) -> str:
    """Mean nats by how many tokens stood before, those of a bin at its geometric middle."""
    named = [(each, each.curves.positions()) for each in results if each.curves is not None]
    named = [(each, rows) for each, rows in named if rows]
    if not named:
        return ""
    longest = max(rows[-1][1] for _, rows in named)
    places = [2**power for power in range(longest.bit_length())]
    spans = {math.sqrt(begin * end): _span(begin, end) for _, rows in named for begin, end, _, _ in rows}
    axis = Axis(
        1.0,
        max(2.0, float(longest)),
        [(place, f"{place:,}") for place in places[:: math.ceil(len(places) / 7)]],
        lambda at: f"{spans[at]} tokens of context",
        log=True,
    )
    lines = [
        Line(
            [(math.sqrt(begin * end), loss) for begin, end, _, loss in rows],
            STYLES[number % len(STYLES)],
            steady(one_line(each.model)),
            dots=True,
            tips=[f"{loss:.4f} nats, {count:,} tokens" for _, _, count, loss in rows],
        )
        for number, (each, rows) in enumerate(named)
    ]
    label = "Loss by position in context"
    picture = svg(lines, label, lambda value: f"{value:.4f}", axis=axis, width=WIDTH, height=HEIGHT)
    tables = [
        table(
            ["tokens of context", "tokens scored", "loss"],
            [[_span(begin, end), f"{count:,}", f"{loss:.4f}"] for begin, end, count, loss in rows],
            caption=each.model,
        )
        for each, rows in named
    ]
    left_out = [
        f"{each.result.tokens - scored:,} tokens of {plain(each.model)} without a finite loss are left out."
        for each, rows in named
        if (scored := sum(count for _, _, count, _ in rows)) < each.result.tokens
    ]
    note = "Mean nats a token, by how many tokens of its window stood before it, BOS among them."
    return _figure(label, lines, picture, " ".join([note, *left_out]), tables)


def _span(begin: int, end: int) -> str:
    return f"{begin:,}" if begin == end else f"{begin:,} to {end:,}"


def _calibration(named: Sequence[tuple[str, Calibration]], label: str, what: str) -> str:
    """How often what was the likeliest is right, by the probability that it had."""
    drawn = [(name, sums, sums.rows()) for name, sums in named if sums.error is not None]
    if not drawn:
        return ""
    ticks = [(step / 5, f"{step / 5:.0%}") for step in range(6)]
    lines = [
        Line(
            [(sure, right) for _, _, _, sure, right in rows],
            STYLES[number % len(STYLES)],
            steady(one_line(name)),
            dots=True,
            tips=[f"{right:.1%} right of {count:,} {what}" for _, _, count, _, right in rows],
        )
        for number, (name, _, rows) in enumerate(drawn)
    ]
    picture = svg(
        [Line([(0.0, 0.0), (1.0, 1.0)], "ideal"), *lines],
        f"{label}: share right by probability",
        lambda value: f"{value:.1%}",
        axis=Axis(0.0, 1.0, ticks, lambda at: f"mean probability {at:.1%}"),
        values=(0.0, 1.0),
        width=WIDTH,
        height=HEIGHT,
    )
    tables = [
        table(
            ["probability", what, "mean probability", "right"],
            [
                [f"{low:.0%} to {high:.0%}", f"{n:,}", f"{sure:.4f}", f"{right:.4f}"]
                for low, high, n, sure, right in rows
            ],
            caption=name,
        )
        for name, _, rows in drawn
    ]
    errors = "; ".join(f"{plain(name)} <b>{sums.error:.4f}</b>" for name, sums, _ in drawn)
    note = (
        "How often the likeliest answer is right, by the probability it was given; on the dashed line they agree, "
        f"below it the model is too sure. Expected calibration error: {errors}."
    )
    return _figure(label, lines, picture, note, tables)


def _figure(label: str, lines: Sequence[Line], picture: str, note: str, tables: Sequence[str]) -> str:
    """`note` is HTML."""
    keys = legend((line.style, line.name) for line in lines)
    numbers = f"<details><summary>Numbers</summary><div>{''.join(tables)}</div></details>"
    return f"<figure><figcaption>{plain(label)}{keys}</figcaption>{picture}{_note(note)}{numbers}</figure>"


def _tasks(tasks: Sequence[TaskResult]) -> str:
    if not tasks:
        return ""
    names = list(dict.fromkeys(name for each in tasks for name in each.metrics if name != "confusion_matrix"))
    rows = [["rows", *(f"{each.rows:,}" for each in tasks)]]
    rows += [[name, *(_shown(each.metrics.get(name)) for each in tasks)] for name in names]
    parts = [table(["", *(each.model for each in tasks)], rows)]
    named = [(each.model, each.calibration) for each in tasks if each.calibration is not None]
    charts = _calibration(named, "Calibration of the labels", "rows")
    for each in tasks:
        if (matrix := each.metrics.get("confusion_matrix")) is not None:
            name = f"Confusion matrix{f' of {each.model}' if len(tasks) > 1 else ''}"
            charts += _matrix(name, matrix["labels"], matrix["counts"])
    return _section("Tasks", *parts, f'<div class="charts">{charts}</div>' if charts else "")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _matrix(title: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A row for each label that was right, shaded by the share of the row that was taken for each label."""
    head = "".join(f'<th scope="col">{plain(label)}</th>' for label in labels)
    lines = []
    for label, row in zip(labels, counts, strict=True):
        total = sum(row)
        cells = "".join(
            f'<td class="h{math.ceil(SHADES * count / total) if total else 0}" '
            f'title="{count / max(total, 1):.1%} of the rows of {plain(label)}">{count:,}</td>'
            for count in row
        )
        lines.append(f'<tr><th scope="row">{plain(label)}</th>{cells}</tr>')
    return (
        f"<figure><figcaption>{plain(title)}</figcaption>{_note('Lines: what was right. Columns: what was answered.')}"
        f'<div class="scroll" tabindex="0"><table class="grid-table matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def _harness(measured: Sequence[tuple[str, dict[str, Any]]]) -> str:
    columns = ["task", "filter", "shots", "metric", "value", "stderr"]
    tables = [
        table(columns, harness_rows(found), caption=name if len(measured) > 1 else "") for name, found in measured
    ]
    return _section("lm-evaluation-harness", *tables) if tables else ""


def _surprise(results: Sequence[Evaluation]) -> str:
    """The first tokens of the corpus as each model finds them, and what changes from the first model to another."""
    maps = 2 * sum(each.curves is not None for each in results) - 1
    most = TEXT_TOKENS if maps <= MAPS else TEXT_TOKENS * MAPS // maps
    found = [
        (each.model, pieces(each.curves.text, load_fast(each.tokenizer), most))
        for each in results
        if each.curves is not None and each.tokenizer is not None and len(each.curves.text.ids)
    ]
    if not found:
        return ""
    several = len(found) > 1
    parts = [
        _note(
            f"The first tokens of the data (at most {most:,} of each model), each coloured by its nats: the more, the "
            "harder it was to foresee. The exact value, and what the model thought the likeliest, is shown on the "
            "token under the pointer."
        ),
        heat.heat_legend(),
    ]
    for model, documents in found:
        parts += [f"<h3>{plain(model)}</h3>" if several else "", heat.heat_map(documents)]
        parts.append(f"<details><summary>The hardest</summary><div>{heat.hardest(documents)}</div></details>")
    first, baseline = found[0]
    if several:
        parts += ["<h3>Difference</h3>", heat.change_legend()]
    for model, documents in found[1:]:
        parts.append(f"<h3>{plain(model)} beside {plain(first)}: blue is easier to it, orange harder</h3>")
        differences = changes(documents, baseline)
        parts.append(
            heat.change_map(differences)
            if differences is not None
            else _note("Their tokenizers do not give the same text back, so there is nothing to compare by the token.")
        )
    return _section("Surprise", *parts)
