"""Parts of one file that several processes read: byte ranges of line formats, row groups of parquet.

A span is a pair of cuts that may lie anywhere. Each is moved to the next place at which a document can begin (a line,
a blank line), by the same rule for the end of a span and the beginning of the next: nothing is lost or doubled.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gptcli.data.reading.columnar import row_groups
from gptcli.data.reading.row import Layout
from gptcli.data.reading.streams import BLOCK


@dataclass(frozen=True)
class Span:
    """The part [begin, end) of a file: bytes of a line format, row groups of parquet."""

    begin: int
    end: int


def byte_spans(path: Path, size: int, *, blank: bool) -> list[Span | None]:
    """Spans of about `size` bytes whose cuts lie where documents begin, found by a look at the bytes around them."""
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        cuts = [0]
        while cuts[-1] + size < total:
            cuts.append(next_begin(file, cuts[-1] + size, blank=blank))
        if len(cuts) > 1 and cuts[-1] >= total:
            cuts.pop()
    return _between([*cuts, total])


def group_spans(path: Path, size: int) -> list[Span | None]:
    """Spans of consecutive row groups of together about `size` bytes."""
    cuts, held = [0], 0
    groups = row_groups(path)
    for index, group in enumerate(groups):
        if held and held + group > size:
            cuts.append(index)
            held = 0
        held += group
    return _between([*cuts, len(groups)])


def _between(cuts: list[int]) -> list[Span | None]:
    return [Span(begin, end) for begin, end in pairwise(cuts)] if len(cuts) > 2 else [None]


def byte_range(path: Path, span: Span, layout: Layout, suffix: str) -> tuple[int, int]:
    """The bytes that a span of a line format consists of, its cuts moved to where documents begin."""
    blank = is_cut_at_blank(layout, suffix)
    with path.open("rb") as file:
        return next_begin(file, span.begin, blank=blank), next_begin(file, span.end, blank=blank)


def is_cut_at_blank(layout: Layout, suffix: str) -> bool:
    """Whether documents begin at blank lines, not at any line."""
    return suffix != ".jsonl" and layout.documents == "blank-line" and not layout.whole


def next_begin(file: io.BufferedReader, position: int, *, blank: bool) -> int:
    """Where the first (blank) line begins at `position` or after it; the start of the file for 0, else its end."""
    total = os.fstat(file.fileno()).st_size
    if position <= 0 or position >= total:
        return max(0, min(position, total))
    file.seek(position - 1)
    position += _skip_line(file)[0] - 1
    while blank and position < total:
        length, is_blank = _skip_line(file)
        if is_blank:
            break
        position += length
    return position


def _skip_line(file: io.BufferedReader) -> tuple[int, bool]:
    """(length, whether it is nothing but white space) of the next line, which may be longer than memory."""
    length, is_blank = 0, True
    while piece := file.readline(BLOCK):
        length += len(piece)
        is_blank = is_blank and not piece.strip()
        if piece.endswith(b"\n"):
            break
    return length, is_blank


def count_lines(path: Path, end: int) -> int:
    """The line ends in the first `end` bytes of a file."""
    count = 0
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(end, BLOCK))):
            count += block.count(b"\n")
            end -= len(block)
    return count
