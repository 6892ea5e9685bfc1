"""What the lower layers may say to the user, without knowing how it is shown.

`gptcli.cli.console` implements `Reporter` with rich (or plain lines, or nothing); everything below takes one as an
argument. Only rank 0 has one that prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A running task."""

    def update(self, completed: float, **fields: str) -> None:
        """Set how much is done, and the texts shown beside the bar (`loss="3.21"`, `rate="6.2K tok/s"`)."""


class Reporter(Protocol):
    """Where information, warnings and progress go."""

    def say(self, text: str) -> None:
        """Print one line of information."""

    def warn(self, text: str) -> None:
        """Print one line that the user should not miss."""

    def progress(self, name: str, total: float, unit: str) -> AbstractContextManager[Progress]:
        """Open a task of `total` units; use as a context manager that yields a `Progress`."""


class _SilentProgress:
    def update(self, completed: float, **fields: str) -> None:
        del completed, fields


class Silent:
    """A reporter that says nothing: other ranks, and library use."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def progress(self, name: str, total: float, unit: str) -> Iterator[Progress]:
        """Yield a task that shows nothing."""
        del name, total, unit
        yield _SilentProgress()
