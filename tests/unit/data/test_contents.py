from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptcli.data import contents
from gptcli.errors import DataError
from gptcli.files import sha256_file


def settled(path: Path, text: str) -> Path:
    path.write_text(text)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settled(tmp_path / "a", "one")
    expected = [sha256_file(path)]
    assert contents.content_hashes([path]) == expected
    read: list[Path] = []
    monkeypatch.setattr(contents, "sha256_file", lambda file: (read.append(file), sha256_file(file))[1])
    assert contents.content_hashes([path, path]) == expected * 2
    assert read == []
    settled(path, "two, longer")
    assert contents.content_hashes([path]) == [sha256_file(path)] != expected
    assert read == [path]


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    stat = path.stat()
    first = contents.content_hashes([path])
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents.content_hashes([path]) != first


def test_a_damaged_memory_is_replaced(tmp_path: Path, cache: Path) -> None:
    path = settled(tmp_path / "a", "one")
    (cache / "contents.sqlite").write_bytes(b"not a database, " * 100)
    for _ in range(2):
        assert contents.content_hashes([path]) == [sha256_file(path)]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        contents.content_hashes([tmp_path / "gone"])
    assert str(tmp_path / "gone") in str(caught.value.where)


def test_the_commit_of_a_hub_set_is_remembered() -> None:
    assert contents.remembered_revision("a/b@main") is None
    contents.remember_revision("a/b@main", "c0ffee")
    assert contents.remembered_revision("a/b@main") == "c0ffee"
