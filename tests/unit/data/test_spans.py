from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.data.readers import (
    Layout,
    Row,
    Span,
    lines_before,
    read_rows,
    spans,
)
from tests.unit.data.example_files import (
    BLANK,
    LINE,
    LONG,
    put,
    read,
)

LINES = st.lists(
    st.sampled_from(
        [
            b"a",
            b"text",
            "é中🙂".encode(),
            b"\n",
            b"\n",
            b"\r\n",
            b"\r",
            b" \n",
            b"\t \r\n",
            b"\n\n",
            b"\xff",
            b"\0",
            b"  ",
        ]
    ),
    max_size=14,
).map(b"".join)
CONTENTS = st.tuples(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]), LINES).map(b"".join)
JSONL = st.lists(
    st.sampled_from([b'{"text": "a"}', b"\n", b"\n", b"\r\n", b"{", b" \n", b'{"text": "\xc3\xa9"}\n']), max_size=12
).map(b"".join)


def numbered(path: Path, layout: Layout, parts: list[Span | None]) -> list[tuple[int, str]]:
    found = []
    for part in parts:
        before = lines_before(path, part, layout)
        for row in read_rows(path, layout, span=part):
            found.append((before + row.number, row.text if isinstance(row, Row) else row.kind))
    return found


def old_rows(raw: bytes, documents: str) -> list[tuple[int, str]]:
    """Lines and paragraphs by a plain loop over lines, for comparison."""
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    lines = [line.removesuffix(b"\r") for line in lines]
    if documents == "line":
        groups = [(number, [line]) for number, line in enumerate(lines, start=1)]
    else:
        groups = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                groups.append((0, []))
            elif groups and groups[-1][1]:
                groups[-1][1].append(line)
            else:
                groups.append((number, [line]))
    found = []
    for number, group in groups:
        if number:
            block = b"\n".join(group) if documents == "line" else b"\n".join(group).rstrip(b"\r\n")
            try:
                found.append((number, block.decode()))
            except UnicodeDecodeError as error:
                found.append((number + block.count(b"\n", 0, error.start), "not UTF-8"))
    return found


@settings(max_examples=300, deadline=None)
@given(raw=CONTENTS, documents=st.sampled_from(["line", "blank-line"]), block=st.integers(1, 9))
def test_the_spans_of_plain_text_give_the_rows_of_the_file(raw: bytes, documents: str, block: int) -> None:
    layout = Layout(documents)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.data.reading.streams.BLOCK", block)
        patch.setattr("gptcli.data.reading.spans.BLOCK", block)
        path = put(Path(folder) / "a.txt", raw)
        expected = numbered(path, layout, [None])
        if b"\r\r\n" not in raw:
            assert expected == old_rows(raw, documents)
        for size in range(1, len(raw) + 2):
            assert numbered(path, layout, spans(path, layout, size)) == expected
            cuts = [*range(0, len(raw), size), len(raw)]
            anywhere: list[Span | None] = [Span(begin, end) for begin, end in pairwise(cuts)]
            assert numbered(path, layout, anywhere) == expected


@settings(max_examples=150, deadline=None)
@given(raw=JSONL, bom=st.booleans())
def test_the_spans_of_json_lines_give_the_rows_of_the_file(raw: bytes, bom: bool) -> None:
    layout = Layout("blank-line")
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder) / "a.jsonl", b"\xef\xbb\xbf" * bom + raw)
        expected = numbered(path, layout, [None])
        for size in range(1, len(raw) + 5):
            assert numbered(path, layout, spans(path, layout, size)) == expected


def test_the_spans_of_parquet_are_its_row_groups(tmp_path: Path) -> None:
    path, layout = tmp_path / "a.parquet", Layout()
    pq.write_table(pa.table({"text": [str(number) for number in range(1000)]}), path, row_group_size=130)
    expected = numbered(path, layout, [None])
    assert spans(path, layout, 1 << 20) == [None]
    assert spans(path, layout, 1) == [Span(index, index + 1) for index in range(8)]
    for size in (1, 1000, 2000, 5000):
        assert numbered(path, layout, spans(path, layout, size)) == expected
    seen: list[int] = []
    read(path, layout, on_position=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size
    assert spans(put(path, b"PAR1"), layout, 1) == [None]


def test_files_that_cannot_be_cut_are_not_divided(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "a.json", "a.csv", "a.tsv", "a.arrow", "a.zip", "a.tar"):
        assert spans(put(tmp_path / name, LONG), LINE, 1000) == [None]
    assert spans(put(tmp_path / "a.txt", LONG), Layout("file"), 1000) == [None]
    assert len(spans(tmp_path / "a.txt", LINE, 100_000)) == -(-len(LONG) // 100_000)
    assert spans(put(tmp_path / "a.txt", LONG), BLANK, 1000) == [None]  # which has no blank line


def test_the_position_in_a_span_counts_from_its_beginning(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", LONG)
    for span in spans(path, LINE, 200_000):
        seen: list[int] = []
        read(path, LINE, span=span, on_position=seen.append)
        assert span is not None
        assert seen[-1] == span.end - span.begin
