"""How a worker says how it ended, and what its parent makes of the endings of all.

A worker that gptcli started prints no error: it writes it into a folder of the parent, which shows the one that the
others follow from. An orderly end (0, or 75: stopped) is agreed upon by all; anything else ends the group.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from gptcli.errors import AbortedError, GptcliError, OutOfMemoryError, StoppedError

# What is said of a worker that was killed: where memory was short, and how it goes on.
LESS_MEMORY = "Lower train.micro_batch_size, or run fewer processes on this machine (launch.processes)."
GOES_ON = "The same command goes on from the last checkpoint."
# In a process that lost another one. It says nothing of the cause.
CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|ProcessGroup|Dist(Store|Network|Backend)Error|"
    r"socket (timeout|error)|recvValue|sendBytes|wait timeout",
    re.IGNORECASE,
)
GLOOS_ADVICE = ". This is typically caused by"
AFTER_A_LOSS = (
    "Another process, its machine or the network has probably failed (--debug shows the traceback). "
    "The same command goes on from the last checkpoint."
)
# The same as gloo and NCCL say it where the other one has ended, rather than that a device or the network is wrong.
_GONE = re.compile(r"connection (closed|reset)|broken pipe|remote process exited", re.IGNORECASE)
# What a user, a scheduler or a closing terminal sends.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The last of what `_kind` tells apart.
LOSS = 3
# May be gone when it is tried again from the last checkpoint; every other code is a decision.
WORTH_A_RESTART = (GptcliError.exit_code, OutOfMemoryError.exit_code)


@dataclass(frozen=True)
class Report:
    """An error as a worker wrote it down.

    Attributes:
        rank: of the worker, over all machines.
        code: its exit code.
        label: "error" or "stopped".
        lines: as they would have been printed.
        typed: whether it is one of `gptcli.errors` that says more than "unexpected".
        seconds: since the epoch.
        traceback: with --debug, else empty.
    """

    rank: int
    code: int
    label: str
    lines: list[str]
    typed: bool
    seconds: float
    traceback: str = ""


@dataclass(frozen=True)
class Ending:
    """How the process of a worker ended: `code` as `Popen` has it, negative for a signal; `stopped`: by its parent."""

    rank: int
    code: int
    seconds: float
    report: Report | None = None
    stopped: bool = False


class WorkersError(GptcliError):
    """What a group of workers ended with: the error that the others follow from, with that worker's exit code.

    Args:
        code: the exit code.
        label: what is printed before the first line.
        lines: as a worker wrote them; none: the workers have said it themselves.
        traceback: the worker's, shown with --debug.
        lost: whether nothing is known but that workers lost another one, which ran on another machine.
    """

    def __init__(self, code: int, label: str, lines: Sequence[str], traceback: str = "", *, lost: bool = False) -> None:
        super().__init__(lines[0] if lines else "", remedy="\n".join(lines[1:]) or None)
        self.exit_code = code
        self.label = label
        self.lost = lost
        if traceback:
            self.add_note(traceback)

    def lines(self) -> list[str]:
        """The lines to print; none when there is nothing to add."""
        return super().lines() if self.what else []


def write_report(folder: Path, report: Report) -> bool:
    """Leave a report for the parent, whole or not at all; False: the folder is gone, with the parent."""
    import tempfile

    try:
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(report), file)
        os.replace(name, folder / f"{report.rank}.json")
    except OSError:
        return False
    return True


def read_report(folder: Path, rank: int) -> Report | None:
    """The report of a worker, when it left one."""
    try:
        return Report(**json.loads((folder / f"{rank}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def report_of(error: GptcliError, rank: int, traceback: str = "") -> Report:
    """The report of an error that ends this process."""
    typed = type(error) is not GptcliError
    return Report(rank, error.exit_code, error.label, error.lines(), typed, time.time(), traceback)


@contextmanager
def on_stop_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, each of `STOP_SIGNALS` goes to a handler; one that is ignored, as SIGHUP by nohup, stays so."""
    hangs_up = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or hangs_up]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def told_as_loss() -> Iterator[None]:
    """Inside, what gloo or NCCL raise where another process of the run has ended says so, without their own words.

    Raises:
        GptcliError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        raise GptcliError(
            "connection closed: another process of the run has ended",
            remedy="What it said last, or what is said of it, is the cause.\n"
            "The same command goes on from the last checkpoint.",
        ) from error


def is_orderly(ending: Ending) -> bool:
    """Whether a worker ended as all agreed to: done, or stopped with its work saved."""
    return ending.code in (0, StoppedError.exit_code)


def verdict(
    endings: Sequence[Ending], world_size: int, *, signalled: bool, advice: tuple[str, str] = (LESS_MEMORY, GOES_ON)
) -> WorkersError | None:
    """What the endings of a machine's workers come to; None when all are done.

    Args:
        endings: one of each worker.
        world_size: processes over all machines, for the message.
        signalled: whether the parent passed a signal on to them.
        advice: what to do where a worker was killed: against too little memory, and then.
    """
    failed = [ending for ending in endings if not is_orderly(ending)]
    if not failed:
        stopped = [ending for ending in endings if ending.code]
        return _as_reported(stopped, endings, world_size) if stopped else None
    aborted = AbortedError.exit_code
    left = [
        ending
        for ending in failed
        if ending.code == aborted or (signalled and not ending.stopped and -ending.code in STOP_SIGNALS)
    ]
    causes = [ending for ending in failed if ending not in left and not ending.stopped]
    if left:  # a worker that waits in a collective hears no second signal, only that the other has left
        causes = [ending for ending in causes if _kind(ending) != LOSS]
    if not causes:
        silent = any(ending.code == aborted and ending.report is None for ending in left)
        saved = [ending for ending in endings if ending.code == StoppedError.exit_code]
        if saved and not silent:  # one of them had something to save, the others waited for it
            return _as_reported(saved, endings, world_size)
        said = next((ending.report for ending in left if ending.report is not None), None)
        if said is None and not silent:
            return WorkersError(aborted, AbortedError.label, ["there was nothing to save"])
        return WorkersError(aborted, AbortedError.label, [] if silent or said is None else said.lines)
    return _as_reported(causes, endings, world_size, advice)


def _as_reported(
    causes: Sequence[Ending], endings: Sequence[Ending], world_size: int, advice: tuple[str, str] = ("", "")
) -> WorkersError:
    first = min(causes, key=lambda ending: (_kind(ending), _when(ending)))
    report = first.report
    process = f"process {first.rank} of {world_size}"
    if report is None:
        return _silent(first, process, advice)
    said_by_first = any(e.rank == 0 and e.report is not None and e.report.lines == report.lines for e in endings)
    by_all = report.code == StoppedError.exit_code or (report.typed and said_by_first)
    head, *rest = report.lines or [f"ended with code {report.code}"]
    lost = _kind(first) == LOSS
    if lost:
        head, rest = head.partition(GLOOS_ADVICE)[0], [AFTER_A_LOSS]
    lines = [head if by_all else f"{process}: {head}", *rest]
    return WorkersError(report.code, report.label, lines, report.traceback, lost=lost)


def _kind(ending: Ending) -> int:
    """Orders causes: what a worker decided, what it did not expect, an end without a word, the loss of another."""
    report = ending.report
    if report is None:
        return 2
    if report.typed:
        return 0
    return LOSS if CONSEQUENCE.search("\n".join((*report.lines, report.traceback))) else 1


def _when(ending: Ending) -> float:
    return ending.seconds if ending.report is None else ending.report.seconds


def _silent(ending: Ending, process: str, advice: tuple[str, str]) -> WorkersError:
    if ending.code == -signal.SIGKILL:
        return WorkersError(
            OutOfMemoryError.exit_code,
            OutOfMemoryError.label,
            [f"{process} was killed (SIGKILL): probably out of memory", *advice],
        )
    if ending.code < 0:
        name = signal.Signals(-ending.code).name if -ending.code in set(signal.Signals) else f"signal {-ending.code}"
        lines = [f"{process} died by {name}", advice[1]]
        return WorkersError(GptcliError.exit_code, GptcliError.label, lines)
    label = StoppedError.label if ending.code == StoppedError.exit_code else GptcliError.label
    lines = [] if ending.code == StoppedError.exit_code else [f"{process} ended with code {ending.code} and no message"]
    return WorkersError(ending.code, label, lines)
