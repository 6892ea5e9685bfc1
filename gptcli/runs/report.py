"""The report of a run: one HTML page that needs nothing else, neither script nor network nor font.

Everything that comes from the run is escaped, and a content security policy forbids whatever were to slip through.
Parts that a run does not have (yet) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gptcli.errors import CheckpointError, GptcliError
from gptcli.files import write_atomic
from gptcli.runs import metrics
from gptcli.runs.chart import Line, smooth, svg
from gptcli.runs.folder import RunFolder, parse_time
from gptcli.runs.html import document, legend
from gptcli.runs.summary import Summary, count, figure, mapping, points, size, span, summarize, text, whole

MAX_SAMPLES = 24
MAX_SAMPLE_CHARACTERS = 2000
MAX_RECIPE_BYTES = 1 << 20


def write_report(run: RunFolder) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Raises:
        MissingError, CheckpointError: there is no such run, or its files are damaged.
    """
    try:
        write_atomic(run.report, page(run))
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=str(run.report)) from error
    return run.report


def page(run: RunFolder) -> str:
    """The page as a text."""
    fields = run.read()
    lines = metrics.read(run.metrics)
    summary = summarize(run)
    sections = [
        _header(summary, fields),
        _figures(summary),
        _curves(lines, summary.loss_unit),
        _samples(_read_samples(run)),
        _decisions(fields),
        _machine(fields),
        _recipe("Recipe with every default", run.resolved),
        _recipe("Recipe as given", run.recipe),
    ]
    return document(summary.name, sections)


def _header(summary: Summary, fields: Mapping[str, Any]) -> str:
    facts = [_when(summary.started), summary.device]
    line = '<span class="dot">·</span>'.join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    reason = f'<p class="reason">{escape(summary.reason)}</p>' if summary.reason and summary.status != "done" else ""
    command = text(fields.get("command_line")) or text(fields.get("command"))
    typed = f'<p class="command"><code>{escape(command)}</code></p>' if command else ""
    return (
        f'<header><div class="title"><h1>{escape(summary.name)}</h1>'
        f'<span class="status {escape(summary.status)}">{escape(summary.status)}</span></div>'
        f'<p class="facts">{line}</p>{reason}{typed}</header>'
    )


def _when(moment: str | None) -> str | None:
    parsed = parse_time(moment)
    return parsed.strftime("%Y-%m-%d %H:%M %Z").strip() if parsed else moment


def _figures(summary: Summary) -> str:
    step = "-" if summary.step is None else f"{summary.step:,}"
    unit = summary.loss_unit or ""
    of = "" if summary.steps is None or summary.steps == summary.step else f"of {summary.steps:,}"
    cells = [
        ("Validation loss", figure(summary.validation_loss), unit),
        ("Bits per byte", figure(summary.bits_per_byte), "validation"),
        ("Training loss", figure(summary.loss), f"{unit}, last log step".removeprefix(", ")),
        ("Parameters", count(summary.parameters), ""),
        ("Steps", step, of),
        ("Tokens", count(summary.tokens), ""),
        ("Tokens/s", count(summary.tokens_per_second), ""),
        ("Wall time", span(summary.wall_seconds), ""),
        ("Peak memory", size(summary.peak_bytes), ""),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>"
        for name, value, note in cells
        if value != "-"
    )
    return f'<dl class="figures">{shown}</dl>' if shown else ""


def _curves(lines: Sequence[Mapping[str, Any]], unit: str | None) -> str:
    training = points(lines, "loss")
    validation = points(lines, "validation", "loss")
    last_step = max((step for step, _ in [*training, *validation]), default=0.0)
    charts = []
    if training or validation:
        drawn = []
        if training:
            drawn = [
                Line(training, "raw" if len(training) > 8 else "main", "training loss"),
                *([Line(smooth(training), "main")] if len(training) > 8 else []),
            ]
        if validation:
            drawn.append(Line(validation, "second", "validation loss", dots=len(validation) <= 60))
        entries = [("main", "training", training), ("second", "validation", validation)]
        title = f"Loss ({escape(unit)})" if unit else "Loss"
        keys = legend((style, name) for style, name, curve in entries if curve)
        picture = svg(drawn, "Loss by step", lambda value: f"{value:.4f}", last_step=last_step, width=1040, height=320)
        charts.append(f'<figure class="wide"><figcaption>{title}{keys}</figcaption>{picture}</figure>')
    small = [
        ("Validation loss", validation, "second", lambda value: f"{value:.4f}", False, True),
        ("Learning rate", points(lines, "learning_rate"), "main", lambda value: f"{value:.3g}", True, False),
        ("Gradient norm", points(lines, "grad_norm"), "main", lambda value: f"{value:.3g}", True, False),
        ("Tokens/s", points(lines, "tokens_per_second"), "main", lambda value: f"{value:,.0f}", True, False),
    ]
    for name, curve, style, show, zero, dots in small:
        if curve:
            line = Line(curve, style, name.lower(), dots=dots and len(curve) <= 60)
            picture = svg([line], f"{name} by step", show, last_step=last_step, width=512, height=210, zero=zero)
            charts.append(f"<figure><figcaption>{name}</figcaption>{picture}</figure>")
    return f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>' if charts else ""


def _read_samples(run: RunFolder) -> list[dict[str, Any]]:
    try:
        samples = metrics.read(run.samples)
    except GptcliError:
        return []
    return [sample for sample in samples if text(sample.get("text"))]


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    shown = _spread(sorted(samples, key=lambda sample: -(whole(sample.get("step")) or 0)), MAX_SAMPLES)
    items = []
    for sample in shown:
        prompt, continuation = text(sample.get("prompt")) or "", str(sample["text"])
        if len(continuation) > MAX_SAMPLE_CHARACTERS:
            continuation = continuation[:MAX_SAMPLE_CHARACTERS] + " …"
        step = whole(sample.get("step"))
        items.append(
            f'<li><span class="step">{"" if step is None else f"step {step:,}"}</span>'
            f"<p><b>{escape(prompt)}</b>{escape(continuation)}</p></li>"
        )
    note = "" if len(shown) == len(samples) else f" <small>{len(shown)} of {len(samples)}, newest first</small>"
    return f'<section><h2>Samples{note}</h2><ol class="samples">{"".join(items)}</ol></section>'


def _spread(items: list[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _decisions(fields: Mapping[str, Any]) -> str:
    decisions = mapping(fields.get("plan")).get("decisions")
    rows = [
        f"<tr><th><code>{escape(str(item.get('key')))}</code></th><td>{escape(str(item.get('value')))}</td>"
        f"<td>{escape(str(item.get('reason', '')))}</td></tr>"
        for item in (decisions if isinstance(decisions, list) else [])
        if isinstance(item, dict)
    ]
    return (
        f'<section><h2>Decided for this run</h2><table class="decisions">{"".join(rows)}</table></section>'
        if rows
        else ""
    )


def _machine(fields: Mapping[str, Any]) -> str:
    versions = mapping(fields.get("versions"))
    prints = mapping(fields.get("fingerprints"))
    left = [
        ("device", fields.get("device")),
        ("host", fields.get("host")),
        ("seed", fields.get("seed")),
        ("git commit", fields.get("git_commit")),
        *((f"{name} fingerprint", value) for name, value in prints.items()),
    ]
    right = [
        ("gptcli", versions.get("gptcli", fields.get("gptcli"))),
        *((n, v) for n, v in versions.items() if n != "gptcli"),
    ]
    columns = [_pairs("Hardware and inputs", left), _pairs("Data", _data(fields)), _pairs("Versions", right)]
    return f'<section class="machine">{"".join(columns)}</section>' if any(columns) else ""


def _data(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was trained on, of the data report."""
    train = mapping(mapping(fields.get("data")).get("train"))
    for key in ("documents", "tokens", "supervised_tokens"):
        if (number := whole(train.get(key))) is not None:
            yield key.replace("_", " "), f"{number:,}"
    for kind, numbers in mapping(train.get("media")).items():
        found, rows, tokens = (whole(mapping(numbers).get(key)) for key in ("count", "rows", "tokens"))
        if found is not None and rows is not None and tokens is not None:
            yield "sounds" if kind == "audio" else f"{kind}s", f"{found:,} in {rows:,} rows, {tokens:,} tokens"


def _pairs(title: str, pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in pairs
        if value is not None and not isinstance(value, dict | list)
    )
    return f"<div><h2>{title}</h2><table>{rows}</table></div>" if rows else ""


def _recipe(title: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    return f"<details><summary>{title}</summary><pre>{escape(content)}</pre></details>"
