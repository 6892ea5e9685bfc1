"""What the lower layers may say to the user, without knowing how it is shown, and what their libraries may not.

`gptcli.cli.console` implements `Reporter` with rich (or plain lines, or nothing); everything below takes one as an
argument. Only rank 0 has one that prints.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# Loggers of what transformers and torch import.
_TALKATIVE = ("torchao", "torch.utils._pytree")
# What a terminal would take for commands of its own; a tab and a new line are text.
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {
    127: "\u2421",
    **{code: "\ufffd" for code in range(0x80, 0xA0)},
}
_LINE_ENDS = {ord("\n"): "\u240a", ord("\t"): "\u2409", 0x2028: "\u240a", 0x2029: "\u240a"}


def visible(text: str) -> str:
    """The same text with nothing in it that a terminal would act on or could not be written as UTF-8.

    Names of files and runs, keys of recipes and what a model writes are other people's: control characters become their
    pictures (ESC: ␛), lone surrogates, as which Python holds bytes that are no UTF-8, the name of their code.
    """
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """`visible`, and line ends are pictures too: for a name, which cannot be taken for a line of ours then."""
    return visible(text.translate(_LINE_ENDS))


def mebibytes(count: int) -> str:
    """Bytes as estimates show them: MiB, or GiB from one on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars, log lines and Python warnings off the screen.

    With them torchao's, which transformers imports where it is installed: it tells of kernels for other machines.
    """
    from transformers.utils import logging as told

    verbosity, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()  # type: ignore[no-untyped-call]
    told.disable_progress_bar()  # type: ignore[no-untyped-call]
    others = [(logger, logger.level) for logger in map(logging.getLogger, _TALKATIVE)]
    for logger, _ in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.set_verbosity(verbosity)
        if bars:
            told.enable_progress_bar()  # type: ignore[no-untyped-call]
        for logger, level in others:
            logger.setLevel(level)
