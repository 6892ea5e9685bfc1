from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gptcli.errors import CheckpointError
from gptcli.runs.folder import RunFolder
from gptcli.train.checkpoint import committing, newest_good, prune, remove_leftovers, verify


def save(run: RunFolder, step: int) -> Path:
    with committing(run, step, {"steps": 100}) as work:
        (work / "model.safetensors").write_bytes(bytes(range(100)))
        (work / "optimizer.pt").write_bytes(bytes(50))
    return run.checkpoint(step)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_committed_checkpoint_verifies(run: RunFolder) -> None:
    folder = save(run, 5)
    assert verify(folder) is None
    found = newest_good(run)
    assert found.folder == folder
    assert found.manifest["step"] == 5


def test_all_files_of_a_checkpoint_can_be_read_by_others(run: RunFolder) -> None:
    with committing(run, 5, {}) as work:
        (work / "model.safetensors").touch(mode=0o600)
    assert {path.stat().st_mode & 0o777 for path in run.checkpoint(5).iterdir()} == {0o644}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def edit(folder: Path, **fields: object) -> None:
    path = folder / "MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 60), "model.safetensors has 60 bytes instead of 100"),
        (lambda f: flip(f / "optimizer.pt"), "optimizer.pt was changed"),
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "MANIFEST.json cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("[]"), "MANIFEST.json cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("[" * 100_000), "MANIFEST.json cannot be read"),
        (lambda f: edit(f, steps="100"), "MANIFEST.json was changed"),
        (lambda f: edit(f, files={}), "MANIFEST.json was changed"),
        (lambda f: edit(f, format=2), "MANIFEST.json has format 2, this version reads 3"),
        (lambda f: (f / "scaler.pt").touch(), "scaler.pt is none of its files"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(run: RunFolder, damage: object, named: str) -> None:
    good, bad = save(run, 5), save(run, 10)
    assert callable(damage)
    damage(bad)
    found = newest_good(run)
    assert found.folder == good
    assert found.passed_over[0][0] == bad
    assert named in found.passed_over[0][1]


def test_no_good_checkpoint_is_an_error_and_never_a_fresh_start(run: RunFolder) -> None:
    for step in (5, 10):
        flip(save(run, step) / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        newest_good(run)
    assert "checkpoint-10" in str(caught.value.remedy)
    assert len(caught.value.lines()) <= 8


def test_the_newest_is_by_step_and_not_by_time(run: RunFolder) -> None:
    old = save(run, 9)
    save(run, 10)
    os.utime(run.checkpoint(10), (0, 0))
    os.utime(old, (2**31, 2**31))
    assert newest_good(run).folder == run.checkpoint(10)


def test_an_error_while_writing_leaves_nothing_half_written(run: RunFolder) -> None:
    save(run, 5)
    with pytest.raises(RuntimeError), committing(run, 10, {}) as work:
        (work / "model.safetensors").write_bytes(b"half")
        raise RuntimeError
    assert [path.name for path in run.path.iterdir()] == ["checkpoint-5"]


def test_a_full_disk_is_a_checkpoint_error(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="No space left"), committing(run, 1, {}):
        raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="No space left"), committing(run, 1, {}):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert list(run.path.iterdir()) == []


def test_pruning_keeps_the_newest(run: RunFolder) -> None:
    for step in (1, 2, 3, 10):
        save(run, step)
    prune(run, 2)
    assert [step for step, _ in run.checkpoints()] == [3, 10]


def test_pruning_removes_what_a_kill_left_of_an_older_checkpoint(run: RunFolder) -> None:
    for step in (1, 2, 3):
        save(run, step)
    (run.checkpoint(1) / "MANIFEST.json").unlink()
    prune(run, 2)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_that_was_moved_to_another_disk_and_linked_is_replaced_and_pruned(
    run: RunFolder, tmp_path: Path
) -> None:
    for step in (1, 2):
        moved = save(run, step).rename(tmp_path / str(step))
        run.checkpoint(step).symlink_to(moved)
    save(run, 2)
    prune(run, 1)
    assert [path.name for path in run.path.iterdir()] == ["checkpoint-2"]
    assert not run.checkpoint(2).is_symlink()
    assert verify(tmp_path / "1") is None and verify(tmp_path / "2") is None, "what the links lead to stays"


def test_a_save_removes_checkpoints_of_later_steps(run: RunFolder) -> None:
    for step in (1, 3, 10, 2):
        save(run, step)
    assert [step for step, _ in run.checkpoints()] == [1, 2]


@pytest.mark.parametrize(
    "text",
    ["Error while serializing: I/O error: Read-only (os error 30)", "[enforce fail at inline_container.cc:672] . x"],
)
def test_an_error_of_a_library_while_writing_is_a_checkpoint_error(run: RunFolder, text: str) -> None:
    said = "could not be written: (Read-only file system|Input/output error)"
    with pytest.raises(CheckpointError, match=said), committing(run, 1, {}):
        raise RuntimeError(text)


def test_leftovers_of_a_kill_are_removed(run: RunFolder) -> None:
    good = save(run, 5)
    (run.path / ".checkpoint-10.tmp-abc").mkdir()
    (run.path / ".checkpoint-10.tmp-abc" / "x").write_bytes(b"x")
    remove_leftovers(run)
    assert list(run.path.iterdir()) == [good]
