"""Faults 1, 2, 3 and 17: a run that is killed at any moment goes on as if it had never been.

"Killed" is SIGKILL, or the end in the middle of a write that a limit on the size of files brings (in torch's and
safetensors' own code, where nothing of ours runs).
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from signal import SIGKILL, SIGXFSZ
from typing import Any

import pytest

from gptcli.train.checkpoint import verify
from tests.runs import SAVE, Bench, Started, assert_all_good, assert_same

SLOW = pytest.mark.slow_fault
POLL_SECONDS = 0.002


def kill(at: str, then: int = 0) -> dict[str, Any]:
    return {"at": at, "then": then, "do": "SIGKILL"}


def leftovers(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if ".tmp-" in path.name]


# The numbers: into the files of transformers, the sync of them, the manifest.
@pytest.mark.parametrize("then", [0, 6, 17])
def test_a_kill_in_the_middle_of_a_save_loses_only_that_save(bench: Bench, then: int) -> None:
    name = f"in-save-{then}"
    assert bench.pretrain(name, fault=kill(SAVE, then)).code == -SIGKILL
    assert assert_all_good(bench.run(name)) == [3]
    done = bench.resume_to_the_same(name)
    assert f"resuming {name} from checkpoint-3" in done.out


@pytest.mark.parametrize(("size", "file"), [(100_000, "model.safetensors"), (200_000, "optimizer.pt")])
def test_a_kill_in_the_middle_of_a_write_leaves_a_folder_that_nothing_takes(bench: Bench, size: int, file: str) -> None:
    name = f"in-{file}"
    assert bench.pretrain(name, fault={"bytes": size}).code == -SIGXFSZ
    (temporary,) = bench.run(name).glob(".checkpoint-3.tmp-*")
    assert max(path.stat().st_size for path in temporary.iterdir()) <= size
    bench.resume_to_the_same(name)


def test_a_kill_between_write_and_rename_is_cleaned_up_by_the_next_start(bench: Bench) -> None:
    assert bench.pretrain("renaming", fault=kill(r"os\.rename .*/checkpoint-6$")).code == -SIGKILL
    assert len(leftovers(bench.run("renaming"))) == 1
    bench.resume_to_the_same("renaming")


@pytest.mark.parametrize("then", [0, 4])
def test_a_kill_between_save_and_prune_leaves_a_checkpoint_that_verifies(bench: Bench, then: int) -> None:
    name = f"pruning-{then}"
    fault = kill(r"shutil\.rmtree .*/checkpoint-3", then)
    assert bench.pretrain(name, "train.save_total_limit=1", fault=fault).code == -SIGKILL
    assert verify(bench.run(name) / "checkpoint-6") is None
    assert (bench.run(name) / "checkpoint-3").exists()
    done = bench.resume_to_the_same(name)
    assert f"resuming {name} from checkpoint-6" in done.out


# Before run.json, which makes a folder a run, and after the last step.
@pytest.mark.parametrize("before", ["resolved.yaml", "run.json", "final"])
def test_a_kill_before_the_first_step_or_after_the_last_is_no_loss(bench: Bench, before: str) -> None:
    name = f"before-{before.partition('.')[0]}"
    assert bench.pretrain(name, fault=kill(rf"os\.rename .*/{before}$")).code == -SIGKILL
    bench.resume_to_the_same(name)


def test_a_kill_while_overwriting_leaves_a_run_that_can_be_overwritten(bench: Bench) -> None:
    bench.copy("overwritten")
    fault = kill(r"os\.remove .*/run\.json")
    assert bench.pretrain("overwritten", "--overwrite", fault=fault).code == -SIGKILL
    assert [path.name for path in bench.run("overwritten").iterdir() if path.name != ".lock"] == ["run.json"]
    bench.resume_to_the_same("overwritten", "--overwrite")


@SLOW
@pytest.mark.parametrize(
    ("name", "begin", "event", "step"),
    [
        ("start", None, r"open .*/\.lock", 3),
        ("save", None, SAVE, 1),
        ("prune", None, r"os\.rename .*/checkpoint-12", 2),
        ("resume", "checkpoint-6", r"open .*/\.lock", 3),
    ],
)
def test_a_kill_before_any_of_the_operations_on_files_is_no_loss(
    bench: Bench, name: str, begin: str | None, event: str, step: int
) -> None:
    seen = set()
    for then in range(0, 60, step):
        run = bench.run("swept")
        shutil.rmtree(run, ignore_errors=True)
        if begin is not None:
            bench.copy("swept")
            for path in ("final", "checkpoint-9", "checkpoint-12"):
                shutil.rmtree(run / path)
        code = bench.pretrain("swept", fault=kill(event, then)).code
        if code == 0:
            break
        assert code == -SIGKILL
        seen.add(tuple(sorted(path.name.partition("tmp-")[0] for path in run.iterdir())))
        bench.resume_to_the_same("swept")
    assert len(seen) > 2, f"all kills ({name}) found the folder in the same states"


def wait_for_lines(started: Started, path: Path, size: int) -> None:
    """Wait until a file has grown to `size` bytes, or the process has ended."""
    while not (path.exists() and path.stat().st_size >= size):
        state = Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return
        time.sleep(POLL_SECONDS)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=SLOW)])
def test_kills_at_random_moments_end_with_the_weights_of_an_undisturbed_run(bench: Bench, kills: int) -> None:
    draw = random.Random(3)
    # Long enough that no kill comes after the end, however far the run gets between two on a busy machine.
    name, steps = f"killed-{kills}", [f"train.max_steps={20 * kills}", "train.save_every=2", "train.sample_every=40"]
    reference = f"not-{name}"
    assert bench.pretrain(reference, *steps).code == 0
    run, killed = bench.run(name), 0
    for _ in range(kills):
        started = bench.start(name, *steps)
        before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
        # A log line is some 200 bytes: between no and some ten steps, and any place within one.
        wait_for_lines(started, run / "metrics.jsonl", before + draw.randrange(2400))
        for _ in range(draw.randrange(2000)):
            os.sched_yield()
        started.send(SIGKILL)
        killed += started.finish().code == -SIGKILL
    assert killed == kills
    done = bench.pretrain(name, *steps)
    assert done.code == 0, done.err
    assert_same(run, bench.run(reference))
