"""`gptcli runs`: what was run, how far it came, how good it is and whether another is better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet
from gptcli.cli.evaluate import Data, Documents, Html, Limit, Markdown, Precision, SequenceLength, Stride, Text

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.runs.folder import RunFolder
    from gptcli.runs.summary import Points, Summary

app = typer.Typer(name="runs", help="List runs, show one, compare them, write a report.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A run's name, or its folder.", show_default=False)]

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Runs, folders or Hub ids (the first is the baseline); a recipe and overrides, as for eval.",
        show_default=False,
    ),
]

CURVE_WIDTH, CURVE_HEIGHT = 60, 7


@app.command("list")
def list_runs(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the runs in ./runs (else $GPTCLI_RUNS), the newest first."""
    del debug
    from gptcli.cli.console import console
    from gptcli.runs.folder import find_runs, runs_root
    from gptcli.runs.summary import ago, figure, summarize

    out = console(json=json, quiet=quiet)
    found = [summarize(run) for run in find_runs(runs_root())]
    if json:
        out.print_json([summary.as_dict() for summary in found])
        return
    if not found:
        out.say(f"no runs in {runs_root()}/ (start one: gptcli pretrain quickstart)")
        return
    rows = [
        [
            summary.name,
            summary.status,
            _steps(summary),
            figure(summary.loss),
            figure(summary.bits_per_byte),
            ago(summary.ended or summary.started),
        ]
        for summary in found
    ]
    out.table(["run", "status", "step", "loss", "validation bits/byte", "when"], rows)
    for summary in found:
        if summary.problem:
            out.warn(f"{summary.name}: {summary.problem}")


@app.command("show")
def show(name: Name, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show a run: its key figures and the curve of its loss."""
    del debug
    from gptcli.cli.console import console
    from gptcli.runs import metrics
    from gptcli.runs.folder import resolve_run
    from gptcli.runs.summary import points, summarize

    out = console(json=json, quiet=quiet)
    run = resolve_run(name)
    fields = run.read()
    lines = metrics.read(run.metrics)
    summary = summarize(run)
    if json:
        out.print_json({**summary.as_dict(), "run": fields, "files": _files(run)})
        return
    out.table(["run", summary.name], _figures(summary, fields, run))
    _curve(points(lines, "loss"), out)
    if summary.problem:
        out.warn(summary.problem)


@app.command("report")
def report(name: Name, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write a run's report (one HTML page, for any browser) and print its path."""
    del debug
    from gptcli.cli.console import console
    from gptcli.runs.folder import resolve_run
    from gptcli.runs.report import write_report

    path = write_report(resolve_run(name))
    out = console(json=json, quiet=quiet)
    if json:
        out.print_json({"report": str(path)})
    else:
        out.write(f"{path}\n")


@app.command("compare")
def compare(
    models: Models,
    data: Data = None,
    text: Text = "text",
    documents: Documents = "file",
    stride: Stride = None,
    limit: Limit = None,
    sequence_length: SequenceLength = None,
    precision: Precision = "auto",
    markdown: Markdown = None,
    html: Html = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell whether models differ on the same documents: beside the first, by kept scores or new ones."""
    del debug
    from gptcli.cli.console import console
    from gptcli.cli.evaluate import Options, load_for, model_folders, score_models, sort_arguments, what_to_score
    from gptcli.cli.evaluation_told import tell
    from gptcli.errors import UsageError

    options = Options(data, text, documents, stride, limit, sequence_length, precision, markdown, html)
    options.check()
    named, recipe, overrides = sort_arguments(models)
    if len(named) < 2:
        raise UsageError("a comparison is of two models or more", remedy="gptcli runs compare RUN OTHER_RUN")
    out = console(json=json, quiet=quiet)
    loaded = load_for(recipe, overrides)
    folders = model_folders(named, recipe)
    loaded, chosen = what_to_score(folders, loaded, overrides, options)
    if chosen is None:
        raise UsageError("this recipe names no texts to compare models on", remedy="Give files: --data FILE")
    results = score_models(folders, chosen, loaded, options, out, reuse=True)
    tell(folders, results, out, markdown=markdown, html=html)


def _steps(summary: Summary) -> str:
    step = "-" if summary.step is None else f"{summary.step:,}"
    return step if summary.steps is None else f"{step}/{summary.steps:,}"


def _files(run: RunFolder) -> dict[str, Any]:
    weights = run.weights()
    return {
        "weights": str(weights) if weights else None,
        "checkpoints": [str(path) for _, path in run.checkpoints()],
        "report": str(run.report) if run.report.is_file() else None,
    }


def _figures(summary: Summary, fields: dict[str, Any], run: RunFolder) -> list[list[str]]:
    from gptcli.runs.summary import ago, count, figure, size, span

    weights = run.weights()
    checkpoints = [step for step, _ in run.checkpoints()]
    rows = [
        ("status", summary.status + (f": {summary.reason}" if summary.reason else "")),
        ("step", _steps(summary)),
        ("tokens", count(summary.tokens)),
        ("parameters", count(summary.parameters)),
        ("loss", figure(summary.loss)),
        ("validation loss", figure(summary.validation_loss)),
        ("bits per byte", figure(summary.bits_per_byte)),
        ("tokens/s", count(summary.tokens_per_second)),
        ("wall time", span(summary.wall_seconds)),
        ("peak memory", size(summary.peak_bytes)),
        ("device", summary.device or "-"),
        ("started", ago(summary.started)),
        ("command", str(fields.get("command_line") or fields.get("command") or "-")),
        ("weights", str(weights) if weights else "none yet"),
        ("checkpoints", ", ".join(f"{step:,}" for step in checkpoints) or "-"),
    ]
    return [[key, value] for key, value in rows if value != "-"]


def _curve(curve: Points, out: Console) -> None:
    """The loss in braille, its range beside it and the steps below."""
    from gptcli.runs.chart import braille, smooth
    from gptcli.runs.summary import figure

    if len(curve) < 2:
        return
    smoothed = smooth(curve)
    values = [value for _, value in smoothed]
    high, low = figure(max(values), 3), figure(min(values), 3)
    margin = max(len(high), len(low))
    lines = braille(smoothed, width=CURVE_WIDTH, height=CURVE_HEIGHT)
    labels = [high, *[""] * (len(lines) - 2), low]
    out.say("loss")
    for label, line in zip(labels, lines, strict=True):
        out.say(f"{label:>{margin}} ┤{line}".rstrip())
    first, last = f"{curve[0][0]:,.0f}", f"step {curve[-1][0]:,.0f}"
    out.say(f"{'':>{margin}}  {first}{last:>{CURVE_WIDTH - len(first)}}")
