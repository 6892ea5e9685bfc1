"""The one place that prints: rich on a terminal, plain lines elsewhere, nothing but errors with `--quiet`.

What it prints holds names and texts of others: all of it is plain text, never rich's markup, and what a terminal would
act on is shown as its picture (`gptcli.reporting.visible`).

Results go to standard output. Information, warnings and progress go to standard error when `--json` owns standard
output, and in a launched process group only rank 0 prints.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptcli.endings import WorkersError
from gptcli.errors import StoppedError
from gptcli.launch import is_main_process, place
from gptcli.reporting import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

    from gptcli.errors import GptcliError
    from gptcli.reporting import Progress

MAX_ERROR_LINES = 8
MAX_ERROR_WIDTH = 2000
PLAIN_PROGRESS_SECONDS = 10.0
QUICK_TASK_SECONDS = 3.0
# What a progress bar shows only in a terminal that has room for it.
WIDE_COLUMNS = 120
WIDE_FIELDS = ("mfu", "memory")


class Console:
    """A `gptcli.reporting.Reporter` over rich, with the results of commands beside it."""

    def __init__(self, *, json_output: bool, quiet: bool) -> None:
        from rich.console import Console as RichConsole

        class Lasting(RichConsole):
            """Goes on in silence when the reader of a pipe went away; rich would end the training."""

            def on_broken_pipe(self) -> None:
                self.quiet = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if self.stderr else 1)

            def _check_buffer(self) -> None:
                with _outliving_the_terminal():
                    super()._check_buffer()

        self.json_output = json_output
        self.quiet = quiet or not is_main_process()
        self._info = Lasting(stderr=json_output, highlight=False)
        self._errors = Lasting(stderr=True, highlight=False)

    @property
    def is_terminal(self) -> bool:
        """Whether information goes to a terminal."""
        return self._info.is_terminal

    @property
    def rich(self) -> RichConsole:
        """The rich console that information goes to."""
        return self._info

    def say(self, text: str) -> None:
        """Print one line of information."""
        if not self.quiet:
            self._info.print(visible(text), markup=False, emoji=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line that the user should not miss, on standard error."""
        if is_main_process():
            from rich.text import Text

            self._errors.print(Text.assemble(("warning:", "yellow"), f" {visible(text)}"), soft_wrap=True)

    def write(self, text: str) -> None:
        """Write a piece of streamed text as it is, at once."""
        if is_main_process():
            sys.stdout.write(text)
            sys.stdout.flush()

    def print_json(self, value: Any) -> None:
        """Print one JSON document (a single line) on standard output."""
        if is_main_process():
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
            # JSON writes the other control characters as \\u001b by itself.
            with _outliving_the_terminal():
                sys.stdout.write(re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text) + "\n")
                sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
        """Print a table; columns whose cells are all numbers are aligned to the right."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        if self.quiet:
            return
        heading = None if title is None else Text(one_line(title))
        table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", pad_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
            table.add_column(Text(one_line(column)), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        self._info.print(table)

    @contextmanager
    def progress(self, name: str, total: float, unit: str) -> Iterator[Progress]:
        """Show a bar on a terminal, a line every ten seconds elsewhere; see `gptcli.reporting.Reporter`."""
        if self.quiet:
            yield _PlainProgress(None, name, total, unit)
        elif self._info.is_terminal:
            bar = _bar(self._info)
            with bar:
                task = bar.add_task(name, total=max(total, 1), unit=unit, fields="")
                yield _RichProgress(bar, task)
        else:
            yield _PlainProgress(self, name, total, unit)


def console(*, json: bool = False, quiet: bool = False) -> Console:
    """The console of a command: `json` moves information to standard error, `quiet` drops it."""
    return Console(json_output=json, quiet=quiet)


@contextmanager
def _outliving_the_terminal() -> Iterator[None]:
    """Inside, a terminal that was closed takes what is written, into nowhere: a run that is to stop has yet to save."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        for number in (1, 2):
            try:
                os.write(number, b"")
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def print_error(error: GptcliError, traceback: str = "") -> None:
    """Print an error on standard error: what and where, then the remedy, at most eight lines after a traceback.

    Of the processes that another launcher started, all but the first name themselves, and leave an orderly stop to it.
    """
    if traceback:
        with _outliving_the_terminal():
            sys.stderr.write(traceback)
    here = "" if isinstance(error, WorkersError) else place()  # which names the worker itself
    if not error.lines() or (here and isinstance(error, StoppedError)):
        return
    red, reset = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    head, *rest = error.lines()
    rest = [line for part in rest for line in part.splitlines()][: MAX_ERROR_LINES - 1]
    head = f"{here}: {head}" if here else head
    lines = [f"{red}{error.label}:{reset} {_cut(head)}", *(f"  {_cut(line)}" for line in rest)]
    with _outliving_the_terminal():
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()


def _cut(line: str) -> str:
    shown = one_line(line)
    return shown if len(shown) <= MAX_ERROR_WIDTH else f"{shown[: MAX_ERROR_WIDTH - 1]}\u2026"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _is_number(cell: str) -> bool:
    text = cell.replace(",", "").replace("%", "").strip()
    return text in {"", "-"} or text.removeprefix("-")[:1].isdigit()


class _RichProgress:
    def __init__(self, bar: RichProgress, task: Any) -> None:
        self._bar = bar
        self._task = task

    def update(self, completed: float, **fields: str) -> None:
        if self._bar.console.width < WIDE_COLUMNS:
            fields = {key: value for key, value in fields.items() if key not in WIDE_FIELDS}
        text = "  ".join(f"[dim]{key}[/] {_escape(value)}" for key, value in fields.items())
        self._bar.update(self._task, completed=completed, fields=text)


class _PlainProgress:
    """Progress as lines, at most one every `PLAIN_PROGRESS_SECONDS` and one at the end, for logs."""

    def __init__(self, console: Console | None, name: str, total: float, unit: str) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._unit = unit
        self._last = time.monotonic()
        self._start = self._last
        self._first: float | None = None
        self._finished = False

    def update(self, completed: float, **fields: str) -> None:
        if self._console is None:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = completed
        finished = completed >= self._total and not self._finished
        if now - self._last < (QUICK_TASK_SECONDS if finished else PLAIN_PROGRESS_SECONDS):
            return
        self._finished = finished
        self._last = now
        text = "  ".join(f"{key} {value}" for key, value in fields.items())
        gained = completed - self._first
        left = f"  ETA {_clock((self._total - completed) * (now - self._start) / gained)}" if gained > 0 else ""
        done = f"{completed:,.0f}/{self._total:,.0f} {self._unit}"
        self._console.say(f"{self._name} {done}  {text}{left}".rstrip())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(rich_console: RichConsole) -> RichProgress:
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.completed:,.0f}/{task.total:,.0f} {task.fields['unit']}", style="bold")

    class Remaining(TimeRemainingColumn):
        def render(self, task: Any) -> Text:
            return Text.assemble(("ETA ", "dim"), super().render(task))

    return Progress(
        TextColumn("[bold cyan]{task.description}"),
        BarColumn(bar_width=20),
        Count(),
        TextColumn("{task.fields[fields]}"),
        Remaining(compact=True),
        console=rich_console,
        refresh_per_second=4,
        speed_estimate_period=60,
    )
