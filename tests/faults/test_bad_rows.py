"""Fault 29: rows that are no documents are named by file and row, or left out and counted; good ones are kept."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.conftest import Cli, Finished
from tests.unit.data.example_files import tarred

RECIPE = """\
tokenizer: {train: {algorithm: bytes}}
data: {train: data, documents: line, validation: 0, sequence_length: 4}
"""
# A file of 300 KB in parts, as one of 300 MB is.
DRIVER = """\
from gptcli.data import pieces

pieces.SMALLEST = 40_000
if __name__ == "__main__":
    from gptcli.__main__ import run

    run()
"""
END_OF_TEXT = 256
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@dataclass(frozen=True)
class Case:
    """A file, the documents in it that are good, and where the first of those stands that are not, if any."""

    name: str
    content: bytes
    good: tuple[str, ...] = ("one", "three")
    place: str = ""
    said: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    before_damage: int = 0


def jsonl(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def parquet(column: Any, name: str = "text") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: column}), buffer)
    return buffer.getvalue()


def not_utf8_column() -> Any:
    """A column that says to be text and is not, which Arrow does not check."""
    column = pa.array([b"one", b"\xff", b"three"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 3, column.buffers())


def archive(name: str, files: dict[str, bytes]) -> bytes:
    if name.endswith(".tar"):
        return tarred(files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for member, raw in files.items():
            packed.writestr(member, raw)
    return buffer.getvalue()


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) * 2 // 3]


NOT_UTF8: dict[str, Any] = {"said": "is not UTF-8 (byte 0xff", "dropped": {"not UTF-8": 1}}
DAMAGED: dict[str, Any] = {"said": "damaged or truncated", "dropped": {"damaged file": 1}}
LINES = b"one\n\xff\nthree\n"
# Some 30 KB that do not compress: two thirds of them hold whole lines.
RANDOM = np.random.default_rng(29).bytes(20_000).hex()
LONG = tuple(RANDOM[at : at + 100] for at in range(0, len(RANDOM), 100))
LONG_RAW = "".join(f"{line}\n" for line in LONG).encode()

BAD = [
    Case("a.txt", LINES, place="a.txt:2", **NOT_UTF8),
    Case(
        "a.jsonl",
        jsonl({"text": "one"}) + b'{"text": "\xff"}\n' + jsonl({"text": "three"}),
        place="a.jsonl:2",
        **NOT_UTF8,
    ),
    Case("a.csv", b"text\n" + LINES, place="a.csv:3", **NOT_UTF8),
    Case("a.tsv", b"text\tn\none\t1\n\xff\t2\nthree\t3\n", place="a.tsv:3", **NOT_UTF8),
    Case("a.parquet", parquet(not_utf8_column()), place="a.parquet:2", **NOT_UTF8),
    Case("a.json", b'["one", "\xff", {"text": "three"}]', place="a.json:2", **NOT_UTF8),
    *(Case(f"a.txt{suffix}", pack(LINES), place=f"a.txt{suffix}:2", **NOT_UTF8) for suffix, pack in COMPRESS.items()),
    Case("a.zip", archive("a.zip", {"b/c.txt": LINES}), place="a.zip!b/c.txt:2", **NOT_UTF8),
    Case("a.tar", archive("a.tar", {"b/c.txt": LINES}), place="a.tar!b/c.txt:2", **NOT_UTF8),
    # Columns that are not there, and other things than texts.
    Case(
        "a.jsonl",
        jsonl({"text": "one"}, {"txt": "two"}, {"text": 2}, {"text": None}, [2], {"text": "three"}) + b'{"text": \n',
        place="a.jsonl:2",
        said="has no column 'text', only 'txt'",
        dropped={"wrong columns": 1, "not text": 2, "not JSON": 2},
    ),
    Case(
        "a.json",
        json.dumps(["one", {"txt": "two"}, {"text": 2}, None, {"text": "three"}]).encode(),
        place="a.json:2",
        said="has no column 'text', only 'txt'",
        dropped={"wrong columns": 1, "not text": 2},
    ),
    Case(
        "a.csv",
        b"n,text\n1,one\n2,two,2\n3,three\n4\n",
        place="a.csv:3",
        said="has 3 fields where the columns are 2",
        dropped={"wrong columns": 2},
    ),
    Case(
        "a.tsv",
        b"n\ttext\n1\tone\n2\n3\tthree\n",
        place="a.tsv:3",
        said="has 1 fields where the columns are 2",
        dropped={"wrong columns": 1},
    ),
    Case(
        "a.parquet",
        parquet(["one", None, "three"]),
        place="a.parquet:2",
        said="column 'text' holds null, not text",
        dropped={"not text": 1},
    ),
    # Damage ends a file; what comes before it is kept, as far as the compression's blocks go.
    *(
        Case(f"a.txt{suffix}", cut(pack(LONG_RAW)), LONG, f"a.txt{suffix}:", **DAMAGED, before_damage=least)
        for (suffix, pack), least in zip(COMPRESS.items(), (200, 0, 200, 0), strict=True)
    ),
    Case(
        "a.tar",
        cut(archive("a.tar", {"b.txt": b"one\nthree\n", "c.txt": LONG_RAW})),
        ("one", "three", *LONG),
        "a.tar!c.txt:",
        **DAMAGED,
        before_damage=2,
    ),
    Case("a.zip", cut(archive("a.zip", {"b.txt": LONG_RAW})), (), "a.zip:1", **DAMAGED),
    Case("a.parquet", cut(parquet(list(LONG))), (), "a.parquet:1", **DAMAGED),
    Case("a.parquet", b"", (), "a.parquet:1", **DAMAGED),
]
NUL = ("o\0ne", "three")
MARKED = b"\xef\xbb\xbfone\r\nthree\r\n"
# In the order of their names, which is that of reading.
GOOD = {
    "NUL": {
        "a.csv": b"text\no\0ne\nthree\n",
        "a.json": json.dumps(NUL).encode(),
        "a.jsonl": jsonl({"text": "o\0ne"}, {"text": "three"}),
        "a.parquet": parquet(list(NUL)),
        "a.tsv": b"text\no\0ne\nthree\n",
        "a.txt": b"o\0ne\nthree\n",
    },
    "BOM and CRLF": {
        "a.csv": b"\xef\xbb\xbftext,n\r\none,1\r\nthree,2\r\n",
        "a.json": b'\xef\xbb\xbf["one",\r\n{"text": "three"}]\r\n',
        "a.jsonl": b"\xef\xbb\xbf" + jsonl({"text": "one"}, {"text": "three"}).replace(b"\n", b"\r\n"),
        "a.tar": archive("a.tar", {"a.txt": b"", "b.txt": MARKED}),
        "a.tsv": b"\xef\xbb\xbftext\tn\r\none\t1\r\nthree\t2\r\n",
        "a.txt": MARKED,
        **{f"a.txt{suffix}": pack(MARKED) for suffix, pack in sorted(COMPRESS.items())},
        "a.zip": archive("a.zip", {"b.txt": MARKED, "a.txt": b""}),
    },
}


def name_of(value: object) -> str:
    return f"{value.name} {next(iter(value.dropped), '')}".strip() if isinstance(value, Case) else str(value)


@dataclass(frozen=True)
class Tokenize:
    """`gptcli tokenize` of the files of a folder."""

    folder: Path
    cli: Cli

    def __call__(self, *arguments: str) -> Finished:
        cache = str(self.folder / "cache")
        return self.cli("tokenize", "bad.yaml", *arguments, cwd=self.folder, GPTCLI_CACHE=cache, COLUMNS="1000")

    def write(self, name: str, content: bytes) -> None:
        (self.folder / "data" / name).write_bytes(content)


@pytest.fixture
def tokenize(tmp_path: Path, run_cli: Cli) -> Tokenize:
    (tmp_path / "data").mkdir()
    (tmp_path / "bad.yaml").write_text(RECIPE)
    return Tokenize(tmp_path, run_cli)


def documents(report: dict[str, Any]) -> list[str]:
    """The documents as the training shards have them: bytes up to each end of text."""
    shards = sorted(Path(report["train_folder"]).glob("*.tokens.npy"))
    tokens = np.concatenate([np.load(path) for path in shards])
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    assert ends[-1] == len(tokens) - 1
    return [bytes(part[part != END_OF_TEXT].astype(np.uint8)).decode() for part in np.split(tokens, ends[:-1] + 1)]


def assert_kept(case: Case, report: dict[str, Any]) -> None:
    *kept, last = documents(report)
    assert last == "beside it"
    if "truncated" in case.said:
        assert kept == list(case.good[: len(kept)])
        assert len(kept) >= case.before_damage
    else:
        assert kept == list(case.good)


@pytest.mark.parametrize("case", BAD, ids=name_of)
def test_a_bad_row_is_code_3_with_file_and_row_or_is_left_out_and_counted(tokenize: Tokenize, case: Case) -> None:
    tokenize.write(case.name, case.content)
    tokenize.write("b.txt", b"beside it\n")
    stopped = tokenize()
    assert stopped.code == 3, stopped.err
    assert f"data/{case.place}" in stopped.err
    assert case.said in stopped.err
    assert "Traceback" not in stopped.err and len(stopped.err.strip().splitlines()) <= 8
    assert list((tokenize.folder / "cache" / "data").glob("*")) == []
    done = tokenize("data.on_bad_row=skip", "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert report["dropped"] == case.dropped
    assert report["dropped_examples"][0].startswith(f"data/{case.place}")
    assert report["dropped_examples"][0].endswith(f": {next(iter(case.dropped))}")
    assert len(report["dropped_examples"]) == sum(case.dropped.values())
    assert_kept(case, report)


@pytest.mark.parametrize("kind", GOOD)
def test_nul_a_bom_and_crlf_are_no_fault(tokenize: Tokenize, kind: str) -> None:
    for name, content in GOOD[kind].items():
        tokenize.write(name, content)
    done = tokenize("--json")
    assert done.code == 0, done.err
    report = done.json()
    assert (report["dropped"], report["dropped_examples"]) == ({}, [])
    assert documents(report) == [*(NUL if kind == "NUL" else ("one", "three"))] * len(GOOD[kind])
    assert report["train"]["with_nul"] == (len(GOOD[kind]) if kind == "NUL" else 0)


EMPTY = [
    "a.txt",
    "a.md",
    "a.jsonl",
    "a.csv",
    "a.tsv",
    "a.json",
    "a.arrow",
    "a.txt.gz",
    "a.jsonl.zst",
    "a.csv.xz",
    "a.tsv.bz2",
]


def test_files_of_no_bytes_are_files_without_documents(tokenize: Tokenize) -> None:
    for name in EMPTY:
        tokenize.write(name, b"")
    nothing = tokenize()
    assert nothing.code == 3, nothing.err
    assert "data.train has no documents" in nothing.err
    tokenize.write("b.txt", b"beside it\n")
    done = tokenize("--json")
    assert done.code == 0, done.err
    assert documents(done.json()) == ["beside it"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"txt,n\none,1\n"),
        ("a.tsv", b"txt\tn\none\t1\n"),
        ("a.parquet", parquet(["one"], "txt")),
        ("a.parquet", parquet([1, 2])),
        ("a.zip", archive("a.zip", {"b.csv": b"txt,n\none,1\n"})),
    ],
    ids=["csv", "tsv", "parquet", "parquet of numbers", "zip"],
)
def test_a_file_without_the_column_is_code_3_even_when_bad_rows_are_left_out(
    tokenize: Tokenize, name: str, content: bytes
) -> None:
    tokenize.write(name, content)
    done = tokenize("data.on_bad_row=skip")
    assert done.code == 3, done.err
    assert f"data/{name}" in done.err and "column 'text'" in done.err
    assert "Traceback" not in done.err


def test_rows_in_the_parts_of_a_large_file_are_named_by_their_line_in_the_file(tokenize: Tokenize) -> None:
    good = [b"line %06d of a file in parts" % number for number in range(8_000)]
    bad = {"a.txt": (3_001, 7_001), "b.jsonl": (5_432,), "c.txt": (7_999,)}
    for name, numbers in bad.items():
        raw = [b'{"text": "%s"}' % line for line in good] if name == "b.jsonl" else list(good)
        for number in numbers:
            raw[number - 1] = raw[number - 1].replace(b"parts", b"p\xffrts")
        # In c.txt every line is a paragraph, and stands on every third line.
        tokenize.write(name, (b"\n\n\n" if name == "c.txt" else b"\n").join(raw) + b"\n")
    (tokenize.folder / "bad.yaml").write_text(
        RECIPE.replace("train: data", "train: [data/a.txt, data/b.jsonl, {path: data/c.txt, documents: blank-line}]")
    )
    (tokenize.folder / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "GPTCLI_CACHE": str(tokenize.folder / "cache"), "OMP_NUM_THREADS": "1"}
    places = ["data/a.txt:3001", "data/a.txt:7001", "data/b.jsonl:5432", f"data/c.txt:{7_998 * 3 + 1}"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "driver.py", "tokenize", "bad.yaml", "tokenize.processes=2", *arguments]
        return subprocess.run(
            command, cwd=tokenize.folder, env=environment, capture_output=True, text=True, timeout=120
        )

    stopped = run()
    assert stopped.returncode == 3, stopped.stderr
    assert any(f"error: {place}: is not UTF-8" in stopped.stderr for place in places)
    done = run("data.on_bad_row=skip", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["dropped"] == {"not UTF-8": 4}
    assert report["dropped_examples"] == [f"{place}: not UTF-8" for place in places]
    kept = [
        line.decode() for numbers in bad.values() for number, line in enumerate(good, start=1) if number not in numbers
    ]
    assert documents(report) == kept


def test_a_line_of_100_mb_is_one_document_in_bounded_memory(tokenize: Tokenize, environment: dict[str, str]) -> None:
    size = 100_000_000
    line = b"a hundred megabytes. " * (size // 21 + 1)
    tokenize.write("a.txt", b"before\n" + line[:size] + b"\nafter\n")
    command = [sys.executable, "-m", "gptcli", "tokenize", "bad.yaml", "--json"]
    variables = {**environment, "GPTCLI_CACHE": str(tokenize.folder / "cache")}
    with (tokenize.folder / "out").open("w+") as out:
        process = subprocess.Popen(command, cwd=tokenize.folder, env=variables, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)  # unlike getrusage: this process's memory, no other child's
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        report = json.load(out)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 1.5e9
    assert report["train"]["documents"] == 3
    assert report["train"]["document_tokens"]["max"] == size + 1
    assert report["train"]["longest"][0]["document"] == "data/a.txt:2"
    assert report["train"]["bytes"] == size + len("before") + len("after")
    assert re.fullmatch(r"[0-9a-f]+", report["fingerprint"])
