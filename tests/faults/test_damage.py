"""Faults 9 to 13 and 18: a checkpoint that is damaged is named and passed over, and never a fresh one in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.runs.folder import RunFolder
from gptcli.train.checkpoint import newest_good
from tests.runs import Bench, assert_same, flip, lines, truncate

FILES = ("model.safetensors", "optimizer.pt", "rng_state.pth")


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.safetensors", truncate, "has "),
        ("optimizer.pt", flip, "was changed (its sha256 differs)"),
        ("optimizer.pt", Path.unlink, "is missing"),
        ("rng_state.pth", Path.unlink, "is missing"),
        ("rng_state.pth", empty, "has 0 bytes instead of "),
        ("trainer_state.json", Path.unlink, "is missing"),
        ("trainer_state.json", empty, "has 0 bytes instead of "),
        ("scheduler.pt", flip, "was changed (its sha256 differs)"),
        ("MANIFEST.json", empty, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on_the_same(
    bench: Bench, file: str, damage: Callable[[Path], object], said: str
) -> None:
    name = f"{damage.__name__}-{file.partition('.')[0]}"
    damage(bench.copy(name) / "checkpoint-12" / file)
    done = bench.resume_to_the_same(name)
    assert f"checkpoint-12 is passed over: {file} {said}" in done.err
    assert f"resuming {name} from checkpoint-9" in done.out


def test_several_damaged_checkpoints_are_all_named_and_the_newest_good_one_goes_on_the_same(bench: Bench) -> None:
    run = bench.copy("two-damaged")
    flip(run / "checkpoint-12" / "model.safetensors")
    flip(run / "checkpoint-9" / "optimizer.pt")
    done = bench.resume_to_the_same("two-damaged")
    for step in (12, 9):
        assert f"checkpoint-{step} is passed over" in done.err
    assert "resuming two-damaged from checkpoint-6" in done.out


def test_all_checkpoints_damaged_ends_with_4_and_nothing_is_trained_or_removed(bench: Bench) -> None:
    run = bench.copy("all-damaged")
    for path, file in zip(sorted(run.glob("checkpoint-*")), FILES, strict=True):
        flip(path / file)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    done = bench.pretrain("all-damaged")
    assert done.code == 4
    for step in (6, 9, 12):
        assert f"checkpoint-{step}: " in done.err
    assert "the 3 checkpoints" in done.err and "Traceback" not in done.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_a_damaged_checkpoint_of_a_later_step_does_not_outlive_the_good_ones(bench: Bench) -> None:
    run = bench.copy("later")
    flip(run / "checkpoint-12" / "model.safetensors")
    for path in ("checkpoint-9", "final"):
        shutil.rmtree(run / path)
    # From step 6, saved at 8: only one is kept, and it must not be the damaged one of step 12.
    fault = {"at": r"os\.mkdir .*/\.checkpoint-10\.tmp-", "do": "SIGKILL"}
    done = bench.pretrain("later", "train.save_every=2", "train.save_total_limit=1", fault=fault)
    assert done.code == -9, done.err
    found = newest_good(RunFolder(run))
    assert found.folder is not None and found.folder.name == "checkpoint-8"
    bench.resume_to_the_same_weights("later")


@pytest.mark.parametrize("times", [(0, 0, 0), (3, 2, 1)], ids=["equal", "reversed"])
def test_the_newest_checkpoint_is_that_of_the_latest_step_whatever_the_clock_said(
    bench: Bench, times: tuple[int, ...]
) -> None:
    name = f"clock-{times[0]}"
    run = bench.copy(name)
    shutil.rmtree(run / "final")
    for step, time in zip((6, 9, 12), times, strict=True):
        for path in (*(run / f"checkpoint-{step}").iterdir(), run / f"checkpoint-{step}"):
            os.utime(path, (time, time))
    done = bench.resume_to_the_same(name)
    assert f"resuming {name} from checkpoint-12 (12 of 12 steps)" in done.out


def test_a_named_checkpoint_goes_on_the_same_and_what_came_after_it_is_replaced(bench: Bench) -> None:
    run = bench.copy("named")
    done = bench.resume_to_the_same("named", "--resume", str(run / "checkpoint-6"))
    assert "resuming named from checkpoint-6 (6 of 12 steps)" in done.out
    assert "the checkpoints of named after step 6 are removed by the next save" in done.out
    # From another run's folder too, into an empty one.
    done = bench.pretrain("elsewhere", "--resume", str(run / "checkpoint-6"))
    assert done.code == 0, done.err
    assert lines(bench.run("elsewhere")) == [line for line in lines(bench.undisturbed) if line["step"] > 6]


def test_a_later_checkpoint_than_the_named_one_is_never_taken_for_the_newest(bench: Bench) -> None:
    run = bench.copy("branch")
    changed = ["train.learning_rate=1e-3", "--allow-changes", "train.learning_rate"]
    fault = {"at": r"os\.mkdir .*/\.checkpoint-12\.tmp-", "do": "SIGKILL"}
    done = bench.pretrain("branch", *changed, "--resume", str(run / "checkpoint-6"), fault=fault)
    assert done.code == -9
    done = bench.pretrain("branch", "train.learning_rate=1e-3")
    assert done.code == 0, done.err
    assert "resuming branch from checkpoint-9" in done.out


def test_a_named_checkpoint_that_is_damaged_or_missing_ends_with_4(bench: Bench) -> None:
    run = bench.copy("named-damaged")
    flip(run / "checkpoint-9" / "optimizer.pt")
    for path, said in ((run / "checkpoint-9", "optimizer.pt was changed"), (run / "none", "no such folder")):
        done = bench.pretrain("named-damaged", "--resume", str(path))
        assert done.code == 4
        assert said in done.err


def test_resume_never_refuses_a_run_that_is_there_and_starts_one_that_is_not(bench: Bench) -> None:
    bench.copy("never")
    done = bench.pretrain("never", "--resume", "never")
    assert done.code == 2
    assert_same(bench.run("never"), bench.undisturbed)
    bench.resume_to_the_same("never-new", "--resume", "never")
