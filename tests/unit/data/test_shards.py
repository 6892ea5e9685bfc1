"""Verification of shards: what is damaged is named with its bytes, and what is unchanged is not read again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from gptcli.data import verify
from gptcli.data.contents import are_verified
from gptcli.data.encode import Encoded
from gptcli.data.shards import MANIFEST, Shards
from gptcli.data.writer import PARTS
from gptcli.errors import DataError
from gptcli.files import read_json, sha256_file, write_json
from tests.shards import write_side

MIB = 1 << 20
SETTLED = 1_600_000_000
# Three whole MiB and a part of a fourth: 1,600,000 tokens of two bytes and the header.
TOKENS = 1_600_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One source of two shards, the first of 1.6 M tokens, all files of long ago."""
    return write(tmp_path / "key" / "train", 0)


def write(folder: Path, seed: int) -> Path:
    tokens = np.random.RandomState(seed).randint(0, 1000, TOKENS + 5000).astype(np.uint16)
    lengths = np.full(len(tokens) // 1000, 1000, dtype=np.int64)
    specials = {"bos": None, "eos": 999, "pad": None, "adds_bos": False}
    batches = [("s", [Encoded(tokens, lengths, lengths * 4)])]
    write_side(folder, np.dtype(np.uint16), TOKENS, batches, tokenizer="t", vocab_size=1000, specials=specials)
    settle(folder)
    return folder


def settle(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (SETTLED, SETTLED))


def flip(path: Path, *places: int) -> None:
    """Change bytes and leave the stat as it was."""
    before = path.stat()
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 64]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose blocks are read."""
    read: list[Path] = []
    blocks = verify._blocks
    monkeypatch.setattr(verify, "_blocks", lambda path: (read.append(path), blocks(path))[1])
    return read


def refused(folder: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        Shards.open(folder, **options)
    assert f"rm -r {folder.parent}" in str(caught.value.remedy)
    assert len(caught.value.lines()) <= 3
    return caught.value


def test_the_manifest_has_the_checksum_of_every_mib_of_every_file(folder: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    for shard in manifest["sources"][0]["shards"]:
        for part in PARTS:
            entry = shard["files"][part]
            data = (folder / entry["name"]).read_bytes()
            expected = [xxhash.xxh3_64(data[begin : begin + MIB]).hexdigest() for begin in range(0, len(data), MIB)]
            assert entry["blocks"] == "".join(expected)
            assert (entry["size"], entry["sha256"]) == (len(data), sha256_file(folder / entry["name"]))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ((128,), "bytes 0 to 1,048,576 are not what was written"),
        ((MIB,), "bytes 1,048,576 to 2,097,152 are not what was written"),
        ((2 * MIB - 1, MIB + 7), "bytes 1,048,576 to 2,097,152 are not what was written"),
        ((3 * MIB + 9,), "bytes 3,145,728 to 3,200,128 are not what was written"),
        ((MIB, 3 * MIB), "bytes 1,048,576 to 2,097,152 are not what was written (2 of its 4 blocks are wrong)"),
    ],
)
def test_wrong_bytes_are_named_by_file_and_mib(folder: Path, places: Sequence[int], said: str) -> None:
    path = folder / "source-000-shard-00000.tokens.npy"
    flip(path, *places)
    for options in ({}, {"verify": True}):
        error = refused(folder, **options)
        assert (error.where, error.what, error.exit_code) == (str(path), said, 3)
    Shards.open(folder, verify=False)


@pytest.mark.parametrize("part", PARTS)
def test_every_kind_of_file_is_verified(folder: Path, part: str) -> None:
    path = folder / f"source-000-shard-00001.{part}.npy"
    flip(path, path.stat().st_size - 1)
    assert refused(folder).where == str(path)


def test_up_to_1_gb_every_start_reads_all_and_above_it_only_what_is_new(
    folder: Path, blocks_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = sorted(folder.glob("*.npy"))
    for _ in range(2):
        Shards.open(folder)
        assert sorted(blocks_read) == every
        blocks_read.clear()
    monkeypatch.setattr(verify, "ALWAYS_BYTES", sum(path.stat().st_size for path in every) - 1)
    Shards.open(folder)
    assert blocks_read == []
    Shards.open(folder, verify=True)
    assert sorted(blocks_read) == every


def test_a_large_folder_is_read_at_its_first_start_and_then_only_where_a_stat_changed(
    folder: Path, blocks_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ALWAYS_BYTES", 0)
    every = sorted(folder.glob("*.npy"))
    Shards.open(folder)
    assert sorted(blocks_read) == every
    blocks_read.clear()
    Shards.open(folder)
    assert blocks_read == []
    os.utime(every[0], (SETTLED + 1, SETTLED + 1))
    Shards.open(folder)
    assert blocks_read == every[:1]
    blocks_read.clear()
    os.utime(every[0])  # now: not remembered, for a further change might have the same time
    for _ in range(2):
        Shards.open(folder)
    assert blocks_read == every[:1] * 2


def test_in_a_large_folder_swapped_files_and_another_manifest_are_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ALWAYS_BYTES", 0)
    other = write(tmp_path / "other" / "train", 1)
    for each in (folder, other):
        Shards.open(each)
    mine, theirs = (each / "source-000-shard-00000.tokens.npy" for each in (folder, other))
    mine.rename(tmp_path / "aside")
    theirs.rename(mine)
    (tmp_path / "aside").rename(theirs)
    assert refused(folder).where == str(mine)
    # What was good by one manifest is not by the next.
    (folder / MANIFEST).write_bytes((other / MANIFEST).read_bytes())
    assert refused(folder).where == str(folder / "source-000-shard-00001.tokens.npy")


def test_a_file_found_wrong_is_found_wrong_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "ALWAYS_BYTES", 0)
    flip(folder / "source-000-shard-00000.tokens.npy", 999)
    assert refused(folder).what == refused(folder).what


def test_a_memory_that_cannot_be_written_or_read_only_costs_time(
    folder: Path, cache: Path, blocks_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ALWAYS_BYTES", 0)
    memory = cache / "contents.sqlite"
    memory.mkdir()
    for _ in range(2):
        Shards.open(folder)
    assert len(blocks_read) == 12
    memory.rmdir()
    memory.write_bytes(b"not a database, " * 100)
    for _ in range(2):
        Shards.open(folder)
    assert len(blocks_read) == 18


def test_a_memory_that_takes_nothing_more_only_costs_time(
    folder: Path, cache: Path, blocks_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ALWAYS_BYTES", 0)
    are_verified([])  # makes the tables
    with contextlib.closing(sqlite3.connect(cache / "contents.sqlite")) as memory:
        memory.execute("CREATE TRIGGER full BEFORE INSERT ON verified BEGIN SELECT RAISE(ABORT, 'full'); END")
        memory.commit()
    for _ in range(2):
        Shards.open(folder)
    assert len(blocks_read) == 12


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("some text\n" * 1000), "is not a shard: it does not begin as a .npy"),
        (lambda path: path.write_text("x"), "is not a shard: it does not begin as a .npy"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, not 3,200,128"),
        (lambda path: np.save(path, np.zeros(TOKENS, dtype=np.int16)), "is not a shard of this data: .* uint16"),
        (lambda path: path.mkdir(), "is not a shard: it is a folder"),
        (_pipe, "is not a shard: it is not a file"),
        (lambda path: path.symlink_to("nowhere"), "is missing"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
        (lambda path: None, "is missing"),
    ],
)
@pytest.mark.parametrize("check", [None, False])
def test_what_is_not_a_shard_is_refused(
    folder: Path, make: Callable[[Path], object], said: str, check: bool | None
) -> None:
    path = folder / "source-000-shard-00000.tokens.npy"
    path.unlink()
    make(path)
    error = refused(folder, verify=check)
    assert error.where == str(path)
    assert re.fullmatch(said, error.what) or said in error.what


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_file_that_must_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, buffering: int) -> None:
    """As root every file can be read, so that the refusal is made: of the header (-1) and of the blocks (0)."""
    path = folder / "source-000-shard-00001.offsets.npy"
    opened = Path.open

    def deny(self: Path, mode: str = "r", buffer: int = -1, **options: Any) -> Any:
        if self == path and options.get("buffering", buffer) == buffering:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, buffer, **options) if buffer != -1 else opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", deny)
    error = refused(folder)
    assert (error.where, error.what) == (str(path), "cannot be read: Permission denied")


def test_a_cache_of_the_version_before_says_to_delete_it(folder: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, {**manifest, "version": 1})
    error = refused(folder)
    assert error.where == str(folder / MANIFEST)
    assert "another format (gptcli token shards, version 1, not" in error.what
    assert "Delete the folder and run again" in str(error.remedy)


def edit(change: Callable[[Any], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        manifest = json.loads(text)
        change(manifest)
        return json.dumps(manifest)

    return apply


def _shards(manifest: Any) -> Any:
    return manifest["sources"][0]["shards"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "is not the manifest of token shards"),
        (lambda text: "", "is not the manifest of token shards"),
        (lambda text: "[]", "is not the manifest of token shards"),
        (edit(lambda manifest: _shards(manifest).reverse()), "fingerprint is not that of the files it lists"),
        (edit(lambda manifest: _shards(manifest).pop()), "fingerprint is not that of the files it lists"),
        (edit(lambda manifest: manifest.pop("sources")), "no 'sources'"),
        (edit(lambda manifest: manifest.pop("specials")), "no 'specials'"),
        (edit(lambda manifest: manifest.update(dtype="tokens")), "is not the manifest of token shards"),
        (edit(lambda manifest: _shards(manifest)[0]["files"]["bytes"].pop("blocks")), "no 'blocks'"),
        (edit(lambda manifest: _shards(manifest)[0]["files"]["tokens"].update(blocks="00")), "each MiB"),
        (edit(lambda manifest: _shards(manifest)[0]["files"]["tokens"].update(name="../x")), "../x is not a name"),
        (edit(lambda manifest: _shards(manifest)[0].update(tokens=None)), "is not the manifest of token shards"),
    ],
)
def test_a_damaged_manifest_is_named(folder: Path, damage: Callable[[str], str], said: str) -> None:
    path = folder / MANIFEST
    path.write_text(damage(path.read_text()))
    error = refused(folder)
    assert error.where == str(path)
    assert said in error.what
    path.unlink()
    assert refused(folder).what == "is missing"
