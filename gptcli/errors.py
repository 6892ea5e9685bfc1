"""The typed errors of gptcli and the exit code of each.

An error says what is wrong, where (file and line of the recipe, file and row of the data) and what to do. It is
raised where the knowledge is and caught once, in `gptcli.cli`. Codes are documented in the README.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class GptcliError(Exception):
    """Base of every error that a user is meant to read, printed as `label: where: what` and the remedy below.

    Args:
        what: what is wrong, one sentence.
        where: file and line, or file and row; None when there is no such place.
        remedy: what to do about it; may hold several lines.
    """

    exit_code = 1
    label = "error"

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def lines(self) -> list[str]:
        """The error as the lines that are printed, without colour."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return [head, *(self.remedy.splitlines() if self.remedy else [])]


class UsageError(GptcliError):
    """The command line is wrong."""

    exit_code = 2


class RecipeError(GptcliError):
    """The recipe is wrong: an unknown key, a wrong type, two of an exactly-one-of."""

    exit_code = 2


class DataError(GptcliError):
    """The data is missing, empty, unreadable or does not fit the recipe."""

    exit_code = 3


class CheckpointError(GptcliError):
    """A checkpoint cannot be written, read, or does not belong to the recipe."""

    exit_code = 4


class DivergedError(GptcliError):
    """Training produced a number that is not finite."""

    exit_code = 5


class OutOfMemoryError(GptcliError):
    """Not enough memory on the device or the machine."""

    exit_code = 6


class MissingError(GptcliError):
    """A required device, package or file of a model is missing."""

    exit_code = 7


class StoppedError(GptcliError):
    """Stopped by a signal or by `train.max_time`, with work that can be resumed.

    Args:
        result: what `--json` prints of the work so far.
    """

    exit_code = 75
    label = "stopped"

    def __init__(self, what: str, *, remedy: str | None = None, result: dict[str, Any] | None = None) -> None:
        super().__init__(what, remedy=remedy)
        self.result = result


class AbortedError(GptcliError):
    """Stopped with nothing to resume, or by a second signal."""

    exit_code = 130
    label = "stopped"


@contextmanager
def writing(target: Path, what: str, comfort: str) -> Iterator[None]:
    """Inside, an error of the system is a `CheckpointError` of what was written; `comfort` says what is not lost."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{what} could not be written: {error.strerror or error}",
            where=str(target),
            remedy=f"{comfort} Make room (or mend the folder) and run the same command again.",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of a library's error that says something, else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def not_installed(what: str, package: str, extra: str) -> MissingError:
    """The error for a package of an extra that `what` needs."""
    return MissingError(
        f"{what} needs the package {package}, which is not installed", remedy=f"pip install 'gptcli[{extra}]'"
    )


def not_available(key: str, what: str, *, where: str | None = None, remedy: str | None = None) -> RecipeError:
    """The error for a key or value of the contract whose feature does not exist yet."""
    return RecipeError(f"{key}: {what} is not available yet", where=where, remedy=remedy)
