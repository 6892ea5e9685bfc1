"""What can be wrong with an image, a sound or a video: one type, whatever a library raised, so that a row can be named.

Pillow, libsndfile and FFmpeg have no common error for bytes that are not theirs: bit flips bring everything from
SyntaxError to AttributeError out of Pillow. So all that their calls raise is caught, and little but their calls stands
inside `library_faults`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from gptcli.errors import GptcliError, first_line
from gptcli.reporting import one_line

Kind: TypeAlias = Literal[
    "not media", "missing file", "outside the folder", "not fetched", "damaged file", "too large", "not finite"
]
_LONGEST_NAME, _LONGEST_REASON = 100, 300


class MediaFault(Exception):
    """An image, sound or video cannot be used; `str()` is a sentence: `images/3.png is not an image`.

    Args:
        name: what the row calls it, as `shown_name` has it.
        kind: what it is counted as.
        reason: the rest of the sentence.
    """

    def __init__(self, name: str, kind: Kind, reason: str) -> None:
        reason = one_line(reason)[:_LONGEST_REASON]  # a library's and a server's words are among them
        super().__init__(name, kind, reason)  # the same arguments, so that it can be pickled
        self.name = name
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def shown_name(name: str) -> str:
    """The name of a file or URL on one line, its middle left out where it is long."""
    name = one_line(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[:60]}...{name[-30:]}"


def unreadable(name: str, error: OSError) -> MediaFault:
    """The fault of a file that the system does not open or read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MediaFault(name, "missing file", "does not exist")
    return MediaFault(name, "missing file", f"cannot be read: {error.strerror or first_line(error)}")


@contextlib.contextmanager
def library_faults(name: str, fault_of: Callable[[Exception], tuple[Kind, str]]) -> Iterator[None]:
    """Inside, whatever a library raises for the bytes of a medium is a `MediaFault` of it.

    `fault_of` says which, in our words. An error of the disk stays one, since it has a number that a library's lacks.
    """
    try:
        yield
    except (MediaFault, GptcliError):
        raise
    except MemoryError:
        raise MediaFault(name, "too large", "needs more memory to be decoded than there is") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(name, error) from None
        raise MediaFault(name, *fault_of(error)) from None
