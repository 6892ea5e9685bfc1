from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gptcli.data import contents
from gptcli.errors import DataError
from gptcli.files import sha256_file


def settled(path: Path, text: str) -> Path:
    path.write_text(text)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def hashes_of(paths: list[str], **options: Any) -> list[str]:
    return list(contents.content_hashes(paths, **options))


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settled(tmp_path / "a", "one")
    expected = [sha256_file(path)]
    assert hashes_of([str(path)]) == expected
    read: list[Path] = []
    monkeypatch.setattr(contents, "sha256_file", lambda file: (read.append(file), sha256_file(file))[1])
    assert hashes_of([str(path), str(path)]) == expected * 2
    assert read == []
    settled(path, "two, longer")
    assert hashes_of([str(path)]) == [sha256_file(path)] != expected
    assert read == [path]


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    stat = path.stat()
    first = hashes_of([str(path)])
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes_of([str(path)]) != first


def test_again_reads_everything_and_finds_a_change_that_kept_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (settled(tmp_path / name, name) for name in ("one", "two"))
    paths = [str(one), str(two)]
    before = hashes_of(paths)
    settled(one, "eno")
    assert hashes_of(paths) == before
    read: list[str] = []
    monkeypatch.setattr(contents, "sha256_file", lambda file: (read.append(str(file)), sha256_file(file))[1])
    told: list[int] = []
    after = hashes_of(paths, again=True, on_bytes=told.append)
    assert after == [sha256_file(one), before[1]] and after[0] != before[0]
    assert (read, told) == (paths, [3, 6])
    assert hashes_of(paths) == after
    assert read == paths


def test_what_was_read_before_an_error_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(settled(tmp_path / f"{number}", f"text {number}")) for number in range(5)]
    (tmp_path / "3").unlink()
    with pytest.raises(DataError) as caught:
        hashes_of(paths)
    assert caught.value.where == paths[3]
    settled(tmp_path / "3", "text 3")
    read: list[str] = []

    def interrupted(file: Path) -> str:
        read.append(file.name)
        if file.name == "4":
            raise KeyboardInterrupt
        return sha256_file(file)

    monkeypatch.setattr(contents, "sha256_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hashes_of(paths)
    assert read == ["3", "4"]
    monkeypatch.setattr(contents, "sha256_file", lambda file: (read.append(file.name), sha256_file(file))[1])
    hashes_of(paths)
    assert read == ["3", "4", "4"]


def test_links_are_followed_to_the_file_and_a_change_behind_them_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    target = settled(tmp_path / "folder" / "a", "one")
    other = settled(tmp_path / "folder" / "b", "two")
    link, folder = tmp_path / "link", tmp_path / "link-to-folder"
    link.symlink_to(target)
    folder.symlink_to(tmp_path / "folder")
    paths = [str(link), str(folder / "a"), str(target)]
    read: list[Path] = []
    monkeypatch.setattr(contents, "sha256_file", lambda file: (read.append(file), sha256_file(file))[1])
    hashes_of([str(target)])
    assert hashes_of(paths) == [sha256_file(target)] * 3
    assert len(read) == 1
    settled(target, "one, longer")
    assert hashes_of(paths) == [sha256_file(target)] * 3
    link.unlink()
    link.symlink_to(other)
    assert hashes_of([str(link)]) == [sha256_file(other)]


def test_a_damaged_memory_is_replaced(tmp_path: Path, cache: Path) -> None:
    path = settled(tmp_path / "a", "one")
    (cache / "contents.sqlite").write_bytes(b"not a database, " * 100)
    for _ in range(2):
        assert hashes_of([str(path)]) == [sha256_file(path)]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        hashes_of([str(tmp_path / "gone")])
    assert str(tmp_path / "gone") in str(caught.value.where)


def test_the_commit_of_a_hub_set_is_remembered() -> None:
    assert contents.remembered_revision("a/b@main") is None
    contents.remember_revision("a/b@main", "c0ffee")
    assert contents.remembered_revision("a/b@main") == "c0ffee"
