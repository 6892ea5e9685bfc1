"""The processes that read images and sounds ahead of the step that takes them: their errors, and their end.

torch hands on what a worker raises as the text of its traceback, and takes a worker that is gone for a bug. Here an
error goes the way of the batches and is raised where the batch would be used; a worker that ended is told as that.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gptcli.errors import DataError, GptcliError, first_line

_GONE = re.compile(r"DataLoader worker \(pid.*?(?:is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)")


@dataclass(frozen=True)
class Failed:
    """What a worker hands over in place of a batch."""

    error: GptcliError


def begin(number: int) -> None:
    """Begin a worker: a signal to all processes of a run is the training process' to answer."""
    del number
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)


def arrived(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of an iterator; one that could not be read raises its error here."""
    for batch in batches:
        if isinstance(batch, Failed):
            raise batch.error
        yield batch


@contextmanager
def watched() -> Iterator[None]:
    """Inside, the end of a worker, which torch may tell of at any place, is a `DataError`."""
    try:
        yield
    except RuntimeError as error:
        gone = _GONE.search(str(error))
        if gone is None:
            raise
        how = f"by the signal {gone['signal']}" if gone["signal"] else first_line(error)
        raise DataError(
            f"a process that reads images and sounds was ended: {how}",
            remedy="Killed means mostly that memory ran out, a bus error that /dev/shm is full.\n"
            "data.workers: 0 reads in the training process. The same command goes on from the last checkpoint.",
        ) from error
