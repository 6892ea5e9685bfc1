"""Plain text as documents: the file, its lines or its paragraphs. CRLF becomes LF, every other character is kept.

A paragraph ends at a line of nothing but ASCII white space. Whole lines come in blocks, so a blank line never lies
across two of them and is searched for once, whatever the length of a paragraph.
"""

from __future__ import annotations

import json
import re
from itertools import count

import numpy as np

from gptcli.data.reading.row import BadRow, Layout, Part, Record, Records, Row, Rows, not_utf8_row
from gptcli.data.reading.streams import BOM, DamagedError, line_blocks, text_lines

_BLANK_LINES = re.compile(rb"(?:[ \t\r\v\f]*+\n)++")
_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[list(b" \t\r\v\f")] = True
_BREAK = re.compile(rb"\n((?:[ \t\r\v\f]*+\n)++)")


def plain_rows(part: Part, layout: Layout) -> Rows:
    """The documents of a plain text; a row's number is the line on which it begins, from 1.

    Whole rows are lines, of one column.
    """
    if layout.whole:
        return _columns(part, layout.text)
    if layout.documents == "line":
        return _lines(part)
    return _paragraphs(part) if layout.documents == "blank-line" else _whole(part)


def line_records(part: Part, layout: Layout) -> Records:
    """The lines of a plain text as rows of one column."""
    for row in _lines(part):
        if isinstance(row, BadRow):
            yield row
        else:
            yield Record(row.number, row.text, json.dumps({layout.text: row.text}, ensure_ascii=False))


def _columns(part: Part, column: str) -> Rows:
    for row in _lines(part):
        yield row if isinstance(row, BadRow) else Row(row.number, "", values={column: row.text})


def _whole(part: Part) -> Rows:
    raw = part.stream.read()
    skipped = len(BOM) if raw.startswith(BOM) else 0
    try:
        text = str(memoryview(raw)[skipped:], "utf-8")  # a slice of the bytes would be one copy more
    except UnicodeDecodeError as error:
        yield not_utf8_row(1 + raw.count(b"\n", 0, skipped + error.start), error)
        return
    del raw
    yield Row(1, text.replace("\r\n", "\n"))


def _lines(part: Part) -> Rows:
    for first, lines, clean in text_lines(part):
        if clean:
            yield from map(Row, count(first), lines)
        else:
            for number, line in enumerate(lines, first):
                yield Row(number, line) if isinstance(line, str) else line


def _paragraphs(part: Part) -> Rows:
    state = _State()
    try:
        for block in line_blocks(part):
            whole = block if block.endswith(b"\n") else block + b"\n"
            del block
            first, last = whole.find(b"\n\n") + 2, whole.rfind(b"\n\n") + 2
            if first < last and not _has_space_ends(whole) and (text := _decoded(whole[first:last])):
                # Blank lines are empty ones here: what lies between the first and the last is cut four times as fast.
                yield from _cut(whole[:first], state)
                for piece in text.split("\n\n"):
                    lead = len(piece) - len(stripped := piece.lstrip("\n"))
                    if stripped:
                        yield Row(state.number + lead, stripped)
                    state.number += piece.count("\n") + 2
                state.number -= 2
                whole = whole[last:]
            yield from _cut(whole, state)
            del whole
    except DamagedError as error:
        error.number = state.start if state.pending else state.number
        raise
    if state.pending:
        yield _paragraph(state.start, state.pending)


class _State:
    """Where the reading of paragraphs stands: the line, and the blocks of a paragraph that goes on in the next one."""

    number = 1
    start = 1

    def __init__(self) -> None:
        self.pending: list[bytes] = []


def _has_space_ends(lines: bytes) -> bool:
    """Whether a line ends in white space, as a blank line that is not empty does. 10 times as fast as a search."""
    characters = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(characters == 10)
    return bool(_IS_SPACE[characters[np.maximum(ends - 1, 0)]].any())


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _cut(lines: bytes, state: _State) -> Rows:
    """The paragraphs that end in a block of whole lines."""
    position = 0
    if blank := _BLANK_LINES.match(lines):
        if state.pending:
            yield _paragraph(state.start, state.pending)
        position = blank.end()
        state.number += lines.count(b"\n", 0, position)
    for gap in _BREAK.finditer(lines, position):
        state.start = state.start if state.pending else state.number
        state.number += lines.count(b"\n", position, gap.end())
        state.pending.append(lines[position : gap.start()])
        position = gap.end()
        yield _paragraph(state.start, state.pending)
    if position < len(lines):
        state.start = state.start if state.pending else state.number
        state.number += lines.count(b"\n", position)
        state.pending.append(lines[position:] if position else lines)


def _paragraph(number: int, pending: list[bytes]) -> Row | BadRow:
    raw = b"".join(pending).rstrip(b"\r\n")
    pending.clear()
    try:
        return Row(number, raw.decode().replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        return not_utf8_row(number + raw.count(b"\n", 0, error.start), error)
