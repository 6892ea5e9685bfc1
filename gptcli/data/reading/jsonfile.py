"""One JSON document as rows: a list of objects or of texts, one object, or JSON lines under the wrong name.

A list is read element by element from a window of decoded text, so that memory is one element, whatever the list. The
window doubles while an element does not end in it: parsing that again each time is twice the work, not its square.
A document that is an object is one row, or holds the list of the rows; it is held in memory.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from typing import Any

from gptcli.data.reading.row import (
    BadRow,
    Layout,
    Part,
    Row,
    Rows,
    checked_row,
    kind_of,
    object_row,
    whole_row,
)
from gptcli.data.reading.streams import BLOCK, DamagedError

_SPACE = re.compile(r"[ \t\r\n]*")
_MARGIN = 16  # more than the longest token that is not a string and can be cut at the window's end: \ud83d\ude00
# Numbers are not used, and Python refuses integers of more than 4300 digits.
_raw_decode = json.JSONDecoder(parse_int=float).raw_decode


class _SyntaxFault(Exception):
    """The text is no JSON from here on."""


def json_rows(part: Part, layout: Layout) -> Rows:
    """The rows of a JSON document; a row's number is its index in the list from 1, for JSON lines that of the line.

    A fault of syntax is one bad row, and in a list the last one: where the next element begins cannot be known.
    """
    window = _Window(part.stream)
    number = 1
    try:
        if not (first := window.peek()):
            return
        for row in _listed(window, layout) if first == "[" else _values(window, layout):
            number = row.number + 1
            yield row
    except DamagedError as error:
        error.number = number
        raise


def _listed(window: _Window, layout: Layout) -> Rows:
    window.position += 1
    number = 0
    closed = window.peek() == "]"
    while not closed:
        number += 1
        try:
            value = window.value()
            yield _element(number, value, layout)
            if (mark := window.peek()) not in (",", "]"):
                number += 1
                raise _SyntaxFault(f"{mark!r} where , or ] has to be" if mark else "the list does not end")
        except _SyntaxFault as fault:
            yield BadRow(number, "not JSON", f"is not JSON ({fault}); nothing after it is read")
            return
        closed = mark == "]"
        window.position += not closed
        window.peek()
    window.position += 1
    if window.peek():
        yield BadRow(number + 1, "not JSON", "is not JSON (text after the end of the list); nothing of it is read")


def _values(window: _Window, layout: Layout) -> Rows:
    """The rows of a document that is one value, or of values one after the other, which is what JSON lines are."""
    line = window.line()
    try:
        value = window.value()
    except _SyntaxFault as fault:
        yield BadRow(1, "not JSON", f"is not JSON ({fault}); nothing after it is read")
        return
    if not window.peek():
        yield from _document(value, layout)
        return
    yield _element(line, value, layout)
    while window.peek():
        line = window.line()
        try:
            value = window.value()
        except _SyntaxFault as fault:
            yield BadRow(line, "not JSON", f"is not JSON ({fault})")
            window.skip_line()
        else:
            yield _element(line, value, layout)


def _document(value: Any, layout: Layout) -> Rows:
    if isinstance(value, dict) and layout.text not in value:
        lists = [rows for rows in value.values() if isinstance(rows, list) and rows and _all_objects(rows)]
        if len(lists) == 1:
            for number, row in enumerate(lists[0], start=1):
                yield _element(number, row, layout)
            return
    yield _element(1, value, layout)


def _all_objects(rows: list[Any]) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _element(number: int, value: Any, layout: Layout) -> Row | BadRow:
    if layout.whole:
        return whole_row(number, value)
    if isinstance(value, dict):
        return object_row(number, value, layout.text)
    if isinstance(value, str):
        return checked_row(number, value)
    return BadRow(number, "not text", f"is {kind_of(value)}, neither a text nor an object")


class _Window:
    """The part of a JSON text that is held: what comes before `position` has been read."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        # Bytes that are no UTF-8 pass as lone surrogates, so that one bad row does not end the reading of the file.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._ended = False
        self._fault: DamagedError | None = None
        self._characters = 0  # of the file before the window
        self._lines = 1  # that of the character at `_counted`
        self._counted = 0
        self.position = 0
        while not self._text and self._more():
            pass
        if self._text.startswith("\ufeff"):
            self.position = 1

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            self.position = _SPACE.match(self._text, self.position).end()  # type: ignore[union-attr]  # it may be empty
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The value that begins at `position`, which moves behind it. Raises `_SyntaxFault`."""
        while True:
            text = self._text
            try:
                value, end = _raw_decode(text, self.position)
            except RecursionError:
                raise _SyntaxFault("nested too deep") from None
            except json.JSONDecodeError as error:
                cut = error.pos >= len(text) - _MARGIN or error.msg.startswith("Unterminated string")
                if cut and self._more():
                    continue
                raise _SyntaxFault(f"{error.msg} at character {self._characters + error.pos}") from None
            # A number that ends with the window may go on after it.
            if end > len(text) - _MARGIN and not isinstance(value, (str, dict, list)) and self._more():
                continue
            self.position = end
            return value

    def line(self) -> int:
        """The number of the line of `position`, from 1."""
        self._lines += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines

    def skip_line(self) -> None:
        """Move to the end of the line of `position`."""
        while (end := self._text.find("\n", self.position)) < 0:
            self.position = len(self._text)
            if not self._more():
                return
        self.position = end

    def _more(self) -> bool:
        if self._ended:
            return False
        if self._fault is not None:
            raise self._fault
        self.line()
        self._characters += self.position
        self._text = self._text[self.position :]
        self.position = self._counted = 0
        self._text += self._read(max(BLOCK, len(self._text)))
        return True

    def _read(self, size: int) -> str:
        pieces = []
        try:
            while size > 0 and not self._ended:
                raw = self._stream.read1(size)
                self._ended = not raw
                pieces.append(self._decoder.decode(raw, final=not raw))
                size -= len(raw)
        except DamagedError as error:  # what came before it is read first
            self._fault = error
        return "".join(pieces)
