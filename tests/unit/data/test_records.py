"""Whole rows: the text of one column, and all of them as one line of JSON."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gptcli.data.readers import BadRow, Layout, Record, has_records, read_records
from gptcli.errors import DataError

LAYOUT = Layout("line", "prompt")


def records(path: Path, layout: Layout = LAYOUT) -> list[Record | BadRow]:
    return list(read_records(path, layout))


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_row_of_json_lines_is_kept_as_it_is_written(tmp_path: Path) -> None:
    kept = '{"f": 1.50, "big": 123456789012345678901234567890,"prompt" :"世\\u754c", "n": [1e2, {"a": null}]}'
    path = write(tmp_path / "a.jsonl", f"\ufeff  {kept} \r\n\n   \n" + '{"prompt": "b"}')
    assert records(path) == [Record(1, "世界", kept), Record(4, "b", '{"prompt": "b"}')]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_too(tmp_path: Path, suffix: str) -> None:
    raw = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    pack: Any = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = write(tmp_path / f"a.jsonl{suffix}", pack(raw))
    assert [row.text for row in records(path) if isinstance(row, Record)] == ["a", "b"]
    write(path, pack(raw)[:-4])
    assert [row.kind for row in records(path) if isinstance(row, BadRow)] == ["damaged file"]


def test_lines_and_tables_are_rows_of_their_columns(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", 'one\r\n\ntwo "quoted"')
    assert records(text) == [
        Record(1, "one", '{"prompt": "one"}'),
        Record(2, "", '{"prompt": ""}'),
        Record(3, 'two "quoted"', '{"prompt": "two \\"quoted\\""}'),
    ]
    table = write(tmp_path / "a.csv", 'id,prompt\n7,"a\nb"\n8,世界\n')
    assert [json.loads(row.line) for row in records(table) if isinstance(row, Record)] == [
        {"id": "7", "prompt": "a\nb"},
        {"id": "8", "prompt": "世界"},
    ]
    tabs = write(tmp_path / "a.tsv", "prompt\tid\nx\t1\n")
    assert records(tabs) == [Record(2, "x", '{"prompt": "x", "id": "1"}')]


def test_values_of_parquet_are_those_that_json_has(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    values = {
        "id": [1, 2],
        "prompt": ["a", "世界"],
        "score": [0.5, float("nan")],
        "when": [day, None],
        "price": [decimal.Decimal("1.10"), None],
        "tags": [["x"], []],
        "deep": [{"b": 1}, {"b": 2}],
    }
    pq.write_table(pa.table(values), tmp_path / "a.parquet", row_group_size=1)
    first, second = (json.loads(row.line) for row in records(tmp_path / "a.parquet") if isinstance(row, Record))
    assert list(first) == list(values)
    assert first == {
        "id": 1,
        "prompt": "a",
        "score": 0.5,
        "when": "2026-01-02T03:04:05+00:00",
        "price": "1.10",
        "tags": ["x"],
        "deep": {"b": 1},
    }
    assert (second["score"], second["when"], second["prompt"]) == (None, None, "世界")


@pytest.mark.parametrize(
    ("name", "content", "number", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 2, "has no column 'prompt', only 'text'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', 2, "column 'prompt' holds a number"),
        ("a.jsonl", '{"prompt": "a"\n', 1, "is not a JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', 2, "is not UTF-8"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', 1, "lone surrogate"),
        ("a.txt", b"a\n\xff\n", 2, "is not UTF-8"),
        ("a.csv", b"prompt,id\na,\xff\n", 2, "is not UTF-8"),
        ("a.csv", "prompt,id\na\n", 2, "has 1 fields"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: bytes | str, number: int, said: str) -> None:
    bad = records(write(tmp_path / name, content))[-1]
    assert isinstance(bad, BadRow) and bad.number == number and said in bad.reason


def test_a_column_that_is_missing_or_twice_there_is_an_error_of_the_file(tmp_path: Path) -> None:
    layout = Layout("line", "prompt", remedy="say {hint}")
    with pytest.raises(DataError, match="no column 'prompt'") as error:
        records(write(tmp_path / "a.csv", "id,prompts\n1,a\n"), layout)
    assert error.value.remedy == "say prompts"
    with pytest.raises(DataError, match="more than one column 'id'"):
        records(write(tmp_path / "b.csv", "id,id,prompt\n1,2,a\n"), layout)
    pq.write_table(pa.table({"prompt": ["a"], "picture": [b"\x00"]}), tmp_path / "a.parquet")
    (bad,) = records(tmp_path / "a.parquet")
    assert isinstance(bad, BadRow) and "holds bytes" in bad.reason


def test_the_name_of_a_file_says_whether_it_has_whole_rows() -> None:
    assert all(has_records(name) for name in ("a.jsonl", "a.TXT", "a.csv.gz", "a.parquet"))
    assert not any(has_records(name) for name in ("a", "a.json", "a.tar", "a.pdf", "-"))
