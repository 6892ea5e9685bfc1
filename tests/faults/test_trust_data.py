"""Trust in data: what a file expands to, where links lead, what a member of an archive is called, and file names."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gptcli.errors import DataError
from tests.unit.data.example_files import tarred
from tests.warm import MB, Ended, Warm

RECIPE = """\
tokenizer: {train: {algorithm: bytes}}
data: {train: data, documents: line, validation: 0, sequence_length: 4}
tokenize: {processes: 1}
"""
ZEROS = bytes(MB)
BOMB_MB = 2048
# What 2 GiB of zeros are compressed to, piece by piece: gzip -1 leaves 9 MB, the others some KB.
COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1),
    ".zst": lambda file: zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False),
    ".xz": lambda file: lzma.LZMAFile(file, "wb", preset=0),  # noqa: SIM115  (closed where it is used)
    ".bz2": lambda file: bz2.BZ2File(file, "wb", compresslevel=1),
}


def bomb(path: Path, before: bytes = b"", megabytes: int = BOMB_MB) -> None:
    """A file of zeros without a line end, compressed by its suffix."""
    with path.open("wb") as file, COMPRESSED[path.suffix](file) as packed:
        packed.write(before)
        for _ in range(megabytes):
            packed.write(ZEROS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.txt").write_text("a good line\n")
    return tmp_path / "data"


@pytest.fixture
def tokenize(data: Path, warm: Warm) -> Callable[..., Ended]:
    def run(*arguments: str, **options: Any) -> Ended:
        cache = str(data.parent / "cache")
        return warm("tokenize", "r.yaml", *arguments, cwd=data.parent, GPTCLI_CACHE=cache, **options)

    return run


def assert_bomb(done: Ended, place: str) -> None:
    assert done.code == DataError.exit_code, done.err
    assert f"data/{place}" in done.err and "expands to more than 200 times its size" in done.err
    assert "Traceback" not in done.err and len(done.err.splitlines()) <= 8
    assert done.peak < 1000 * MB


@pytest.mark.parametrize(
    ("name", "before", "documents"),
    [
        ("a.jsonl.gz", b"", "line"),
        pytest.param("a.txt.gz", b"", "line", marks=pytest.mark.slow_fault),
        pytest.param("a.txt.gz", b"", "blank-line", marks=pytest.mark.slow_fault),
        pytest.param("a.txt.gz", b"", "file", marks=pytest.mark.slow_fault),
        pytest.param("a.csv.gz", b"text\n", "line", marks=pytest.mark.slow_fault),
        pytest.param("a.tsv.gz", b"text\n", "line", marks=pytest.mark.slow_fault),
        ("a.jsonl.zst", b"", "line"),
        pytest.param("a.jsonl.xz", b"", "line", marks=pytest.mark.slow_fault),
        pytest.param("a.jsonl.bz2", b"", "line", marks=pytest.mark.slow_fault),
    ],
)
def test_two_gigabytes_of_zeros_in_a_small_file_are_told_in_bounded_memory(
    data: Path, tokenize: Callable[..., Ended], name: str, before: bytes, documents: str
) -> None:
    bomb(data / name, before)
    assert (data / name).stat().st_size < 10 * MB
    assert_bomb(tokenize(f"data.documents={documents}"), name)
    skipped = tokenize(f"data.documents={documents}", "data.on_bad_row=skip", "--json")
    assert skipped.code == 0, skipped.err
    assert skipped.json()["dropped"] == {"damaged file": 1}
    assert skipped.json()["train"]["documents"] == 1


def test_a_bomb_in_an_archive_is_told_and_nothing_is_written_where_members_say(
    data: Path, tokenize: Callable[..., Ended]
) -> None:
    with zipfile.ZipFile(data / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr("../../escaped.txt", "out of here\n")
        with packed.open("b.txt", "w", force_zip64=True) as member:
            for _ in range(512):
                member.write(ZEROS)
    members = {"../../../escaped.txt": b"out of here too\n", f"{data.parent}/escaped.txt": b"and here\n"}
    (data / "a.tar").write_bytes(tarred(members))
    assert_bomb(tokenize(), "a.zip!b.txt")
    done = tokenize("data.on_bad_row=skip", "--json")
    assert done.code == 0, done.err
    assert done.json()["train"]["documents"] == 4, "the texts of all members that can be read"
    assert not list(data.parent.parent.rglob("escaped.txt"))


@pytest.mark.slow_fault
def test_text_that_compresses_well_is_no_bomb(data: Path, tokenize: Callable[..., Ended]) -> None:
    """100 MB of log lines, which gzip makes a fortieth of."""
    with gzip.open(data / "a.txt.gz", "wb", compresslevel=6) as file:
        for start in range(0, 2_000_000, 1_000):
            file.write(
                b"".join(b"2026-01-01 12:00:00 INFO the same line again %d\n" % n for n in range(start, start + 1_000))
            )
    done = tokenize("--json", seconds=300)
    assert done.code == 0, done.err
    assert done.json()["train"]["documents"] == 2_000_001


@pytest.mark.parametrize("path", ["data", "data/**/*.txt", "data/**"])
def test_links_in_circles_are_walked_once(data: Path, tokenize: Callable[..., Ended], path: str) -> None:
    """Two links to the folder itself make 2^40 paths, which is as deep as the system follows them."""
    for name in ("a", "b", "c"):
        (data / name).symlink_to(".")
    (data / "d").mkdir()
    (data / "d" / "up").symlink_to("..")
    (data / "d" / "e.txt").write_text("another line\n")
    done = tokenize(f"data.train={path}", "--json")
    assert done.code == 0, done.err
    assert done.json()["train"]["documents"] == 2


@pytest.mark.parametrize("kind", ["fifo", "endless", "nothing"])
def test_what_is_no_regular_file_is_told_and_not_waited_for(
    data: Path, tokenize: Callable[..., Ended], kind: str
) -> None:
    if kind == "fifo":
        os.mkfifo(data / "a.txt")
    else:
        (data / "a.txt").symlink_to("/dev/zero" if kind == "endless" else "nowhere")
    done = tokenize(seconds=5)
    assert done.code == DataError.exit_code, done.err
    assert "data/a.txt is a link to a file that is not there, or no regular file" in done.err


HOSTILE_NAME = b"\x1b]0;owned\x07[red][b]\n\xc2\x9b2J.jsonl"


def test_hostile_names_are_shown_as_pictures_on_one_line(data: Path, tokenize: Callable[..., Ended]) -> None:
    (data / os.fsdecode(HOSTILE_NAME)).write_text("{")
    shown = "data/␛]0;owned␇[red][b]␊\ufffd2J.jsonl:1"
    done = tokenize()
    assert done.code == DataError.exit_code, done.err
    assert shown in done.err and len(done.err.splitlines()) == 2
    skipped = tokenize("data.on_bad_row=skip")
    assert skipped.code == 0, skipped.err
    assert f"first: {shown}: not JSON\n" in skipped.out
    assert not {"\x1b", "\x07", "\x9b"} & set(done.err + skipped.out)
    report = tokenize("data.on_bad_row=skip", "--json").json()
    assert report["dropped_examples"] == [f"{shown}: not JSON"]


@pytest.mark.parametrize("path", ["data", "data/*.txt", "data/**/*.txt"])
def test_a_name_that_is_no_utf8_is_code_3(data: Path, tokenize: Callable[..., Ended], path: str) -> None:
    Path(os.fsdecode(bytes(data) + b"/\xff.txt")).write_text("a line\n")
    done = tokenize(f"data.train={path}")
    assert done.code == DataError.exit_code, done.err
    assert "data/\\udcff.txt: this file's name is not valid UTF-8" in done.err
    assert len(done.err.splitlines()) == 2
