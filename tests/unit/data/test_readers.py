from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.data.readers import (
    BadRow,
    Layout,
    Row,
    is_readable,
    readable_suffixes,
    split_suffix,
)
from gptcli.errors import DataError
from tests.unit.data.example_files import (
    BLANK,
    COMPRESS,
    FORMATS,
    LINE,
    LONG,
    TEXTS,
    archive,
    bad,
    flat,
    put,
    read,
    texts_of,
    written,
)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_plain_compressed_and_in_archives(tmp_path: Path, suffix: str, compression: str) -> None:
    expected = [flat(text) for text in TEXTS] if suffix == ".tsv" else TEXTS
    name = f"data{suffix.upper()}{compression}"
    raw = COMPRESS[compression](written(suffix))
    rows = read(put(tmp_path / name, raw))
    assert texts_of(rows) == expected
    for kind in (".zip", ".tar.gz"):
        members = read(archive(tmp_path, kind, {f"in/{name}": raw}))
        assert members == [Row(row.number, row.text, None, f"in/{name}") for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("harm", ["truncated", "garbled", "not compressed", "empty"])
def test_damaged_compression_keeps_the_rows_before_it(tmp_path: Path, compression: str, harm: str) -> None:
    lines = LONG.decode().splitlines()
    with_checksum = zstandard.ZstdCompressor(write_checksum=True)
    compress = {".gz": gzip.compress, ".zst": with_checksum.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    raw = compress[compression](LONG)
    middle = len(raw) * 3 // 4
    garbled = raw[:middle] + bytes(255 - byte for byte in raw[middle : middle + 40]) + raw[middle + 40 :]
    content = {"truncated": raw[:middle], "garbled": garbled, "not compressed": LONG, "empty": b""}[harm]
    rows = read(put(tmp_path / f"a.txt{compression}", content), LINE)
    if harm == "empty":
        assert rows == []
        return
    assert bad(rows) == [(len(rows), "damaged file")]
    assert isinstance(rows[-1], BadRow)
    assert compression in rows[-1].reason
    if harm == "truncated":
        assert len(rows) > 1 or compression == ".bz2"  # whose blocks are of 900 kB
    if harm != "garbled":
        assert texts_of(rows[:-1]) == lines[: len(rows) - 1]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_truncation_of_every_format_is_rows_and_at_most_one_damage(tmp_path: Path, suffix: str) -> None:
    texts = ["one", "two", "三", "four"]
    raw = written(suffix, texts)
    for cut in range(0, len(raw), max(1, len(raw) // 60)):
        try:
            rows = read(put(tmp_path / f"a{suffix}", raw[:cut]), LINE)
        except DataError:  # a header that is cut in the name of the column
            assert suffix in (".csv", ".tsv")
            continue
        assert len(bad(rows)) <= 1
        if suffix not in (".txt", ".md", ".csv", ".tsv"):
            assert texts_of(rows[: len(rows) - len(bad(rows))]) == texts[: len(rows) - len(bad(rows))]


JSON: dict[str, tuple[str, list[str], list[tuple[int, str]]]] = {
    "objects": ('\ufeff [{"text": "a"},\n {"text": "b"}]\n', ["a", "b"], []),
    "texts": ('["a", "b \\u00e9"]', ["a", "b é"], []),
    "nothing": (" \n", [], []),
    "an empty list": ("[ ]", [], []),
    "an object": ('{"text": "a", "rows": [{"text": "b"}]}', ["a"], []),
    "an object of rows": ('{"version": 1, "tags": ["x"], "data": [{"text": "a"}, {"text": "b"}]}', ["a", "b"], []),
    "an object of two lists": ('{"a": [{"text": "a"}], "b": [{"text": "b"}]}', [], [(1, "wrong columns")]),
    "a pretty object": ('{\n "text": "a"\n}', ["a"], []),
    "a text": ('"a"', ["a"], []),
    "a number": ("12", [], [(1, "not text")]),
    "lines": ('{"text": "a"}\n\n{"text": 1}\n{"text": \n{"text": "b"}', ["a", "b"], [(3, "not text"), (4, "not JSON")]),
    "bad elements": (
        f'[{{"text": "a"}}, 1.5, {{"txt": "b"}}, {{"text": null}}, [1], {"1" * 5000}, "\\ud800", "b"]',
        ["a", "b"],
        [*((2, "not text"), (3, "wrong columns"), (4, "not text"), (5, "not text"), (6, "not text"), (7, "not UTF-8"))],
    ),
    "a fault": ('["a", {"text": }, "b"]', ["a"], [(2, "not JSON")]),
    "no comma": ('["a" "b"]', ["a"], [(2, "not JSON")]),
    "a comma too much": ('["a",]', ["a"], [(2, "not JSON")]),
    "no end": ('["a"', ["a"], [(2, "not JSON")]),
    "an open text": ('["a", "b', ["a"], [(2, "not JSON")]),
    "text after the end": ('["a"] "b"', ["a"], [(2, "not JSON")]),
    "too deep": ('["a", ' + "[" * 100_000 + "]", ["a"], [(2, "not JSON")]),
}


@pytest.mark.parametrize("name", JSON)
def test_json_documents_and_their_faults(tmp_path: Path, name: str) -> None:
    text, expected, faults = JSON[name]
    rows = read(put(tmp_path / "a.json", text.encode()))
    assert [row.text for row in rows if isinstance(row, Row)] == expected
    assert bad(rows) == faults


def test_bytes_of_json_that_are_no_utf8_cost_one_element(tmp_path: Path) -> None:
    rows = read(put(tmp_path / "a.json", b'["a", "\xff", "b"]'))
    assert bad(rows) == [(2, "not UTF-8")]
    assert len(rows) == 3


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.text(max_size=6) | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.just("x" * 50)
    ),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
)
def test_a_json_list_is_read_through_a_window_of_any_size(
    values: list[Any], indent: int | None, ascii_only: bool, block: int
) -> None:
    raw = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.data.reading.jsonfile.BLOCK", block)
        rows = read(put(Path(folder) / "a.json", raw))
    assert [row.number for row in rows] == list(range(1, len(values) + 1))
    assert [row.text if isinstance(row, Row) else None for row in rows] == [
        value if isinstance(value, str) else None for value in values
    ]


@pytest.mark.parametrize("ipc", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_are_read_with_the_checks_of_parquet(tmp_path: Path, ipc: Any) -> None:
    path = tmp_path / "a.arrow"
    wrong = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", None], pa.binary()).buffers())
    table = pa.table({"n": [1, 2, 3], "text": wrong, "kind": pa.array(["a", "b", "a"]).dictionary_encode()})
    with ipc(str(path), table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "a.parquet")
    for file in (path, tmp_path / "a.parquet"):
        rows = read(file)
        assert rows[0] == Row(1, "a")
        assert bad(rows) == [(2, "not UTF-8"), (3, "not text")]
        assert texts_of(read(file, Layout(text="kind"))) == ["a", "b", "a"]
        with pytest.raises(DataError, match="int64"):
            read(file, Layout(text="n"))
        with pytest.raises(DataError, match="'txt'"):
            read(file, Layout(text="txt"))


def test_what_datasets_saves_is_read_without_its_bookkeeping(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path))
    files = sorted(path.name for path in tmp_path.iterdir())
    readable = [name for name in files if is_readable(name)]
    assert readable == ["data-00000-of-00001.arrow"]
    assert {"dataset_info.json", "state.json"} <= set(files)
    assert texts_of(read(tmp_path / readable[0])) == ["a", "b"]
    assert not is_readable("dataset_dict.json")


def test_suffixes_are_told_apart() -> None:
    assert split_suffix("a.JSONL.xz") == (".jsonl", ".xz")
    assert split_suffix("a.tgz") == split_suffix("a.tar.gz") == (".tar", ".gz")
    names = {"a.zip": True, "a.zip.gz": False, "a.gz": False, "a.png": False, "a.json.bz2": True, "a.arrow": True}
    assert {name: is_readable(name) for name in names} == names
    assert all(suffix in readable_suffixes() for suffix in (*FORMATS, ".zip", ".tar", ".xz", ".bz2"))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".arrow"])
@pytest.mark.parametrize("layout", [LINE, BLANK])
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str, layout: Layout) -> None:
    for raw in (b"", b"\xef\xbb\xbf"):
        if raw and suffix in (".csv", ".tsv", ".arrow"):
            continue
        assert read(put(tmp_path / f"a{suffix}", raw), layout) == []


MEMORY = """
import resource, sys
from pathlib import Path
from gptcli.data.readers import Layout, Row, read_rows
import pyarrow
path, documents = Path(sys.argv[1]), sys.argv[2]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sizes = [len(row.text) for row in read_rows(path, Layout(documents)) if isinstance(row, Row)]
print(max(sizes), len(sizes), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def measured(path: Path, documents: str = "line") -> tuple[int, int, int]:
    """(longest text, rows, bytes of memory that the reading added at its peak), in a process of its own."""
    command = [sys.executable, "-c", MEMORY, str(path), documents]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    longest, count, peak = map(int, done.stdout.split())
    return longest, count, peak


LINE_SIZE = 100_000_000
LONG_LINES = {
    "a.txt": (b"a\n", b"\nb\n", 4),
    "a.jsonl": (b'{"text": "', b'"}\n{"text": "b"}\n', 6),
    "a.json": (b'["', b'", "b"]', 6),
    "a.tsv": (b"text\tn\n", b"\t1\nb\t1\n", 6),
    "a.csv": (b"text,n\n", b",1\nb,1\n", 12),  # the csv module builds a field of four bytes a character
}


@pytest.mark.parametrize("name", LONG_LINES)
def test_a_line_of_100_mb_takes_a_small_multiple_of_it(tmp_path: Path, name: str) -> None:
    head, tail, copies = LONG_LINES[name]
    with (tmp_path / name).open("wb") as file:
        file.write(head)
        for _ in range(100):
            file.write(b"x" * (LINE_SIZE // 100))
        file.write(tail)
    longest, _, peak = measured(tmp_path / name)
    assert longest == LINE_SIZE
    assert peak < copies * LINE_SIZE


def test_a_whole_file_is_held_twice_and_a_list_or_a_bomb_never(tmp_path: Path) -> None:
    with (
        (tmp_path / "a.txt").open("wb") as file,
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        line = b"y" * 999 + b"\n"
        for _ in range(50):
            file.write(line * 1000)
        with bomb.open("a.txt", "w") as member:
            for _ in range(100):
                member.write(line * 1000)
    size = (tmp_path / "a.txt").stat().st_size
    assert measured(tmp_path / "a.txt", "file")[2] < 2.3 * size
    assert measured(tmp_path / "a.zip")[2] < 30_000_000
    frame = zstandard.ZstdCompressor().compressobj()
    with (tmp_path / "a.txt.zst").open("wb") as file:
        for _ in range(100):
            file.write(frame.compress(line * 1000))
        file.write(frame.flush())
    assert measured(tmp_path / "a.txt.zst")[2] < 80_000_000
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b"[")
        for _ in range(100_000):
            file.write(b'{"text": "' + line[:-1] + b'"},\n')
        file.write(b'"z"]')
    longest, count, peak = measured(tmp_path / "a.json")
    assert (longest, count) == (999, 100_001)
    assert peak < 30_000_000


@pytest.mark.parametrize("suffix", [".json", ".arrow", ".zip", ".tar", ".tar.xz"])
def test_changed_bytes_are_rows_bad_rows_or_an_error_of_the_file(tmp_path: Path, suffix: str) -> None:
    # Not .parquet: some changes of its metadata have ended the process inside pyarrow 26 (C++).
    chance = random.Random(0)
    is_archive = suffix not in (".json", ".arrow")
    texts = ["one", "two", "三四五", "four " * 30] * 5
    members = {"a.txt": LONG[:3000], "b.jsonl": written(".jsonl", texts)}
    raw = archive(tmp_path, suffix, members).read_bytes() if is_archive else written(suffix, texts)
    for _ in range(300):
        changed = bytearray(raw)
        for _ in range(chance.choice((1, 3, 20))):
            changed[chance.randrange(len(raw))] = chance.choice((0, 255, chance.randrange(256)))
        with contextlib.suppress(DataError):
            read(put(tmp_path / f"changed{suffix}", bytes(changed)), LINE)
