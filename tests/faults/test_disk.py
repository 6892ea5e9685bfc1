"""Faults 14, 15 and 16: a full disk, one that cannot be written, and I/O errors end with 4 and cost nothing.

The disks are small ones of memory, mounted for a test, and really full. Read-only is a mount, and a mode that binds the
command (it gives up what a superuser may). Only I/O errors are injected, by the hook of tests/driver.py.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from signal import SIGCONT

import pytest

from tests.conftest import Finished
from tests.runs import SAVE, Bench, Disk, assert_all_good, fill

NUMBERS = count()


def assert_failed(done: Finished, run: Path, said: str) -> None:
    """Code 4 and what was said, in a few lines; nothing half written is left."""
    assert done.code == 4, done.err
    assert said in done.err
    assert "Traceback" not in done.err and "unexpected" not in done.err
    assert len(done.err.strip().splitlines()) <= 8
    assert not [path for path in run.iterdir() if ".tmp-" in path.name]


# Where it is full: at once, within the weights, within the optimizer's state, after it.
@pytest.mark.parametrize("room", [0, 100_000, 250_000, 480_000])
def test_a_disk_full_at_a_save_keeps_the_old_checkpoint_and_goes_on_the_same_with_room(
    bench: Bench, disk: Disk, room: int
) -> None:
    folder = disk("size=16m")
    bench = Bench(bench.folder, bench.undisturbed, bench.forks, output=folder)
    started = bench.start("full", fault={"at": SAVE, "do": "SIGSTOP"})
    started.until_stopped()
    filler = fill(folder, room)
    started.send(SIGCONT)
    assert_failed(started.finish(), folder / "full", "the checkpoint could not be written: No space left on device")
    assert assert_all_good(folder / "full") == [3]
    filler.unlink()
    assert "resuming full from checkpoint-3" in bench.resume_to_the_same("full").out


def test_a_disk_full_at_the_end_loses_no_step(bench: Bench, disk: Disk) -> None:
    folder = disk("size=16m")
    bench = Bench(bench.folder, bench.undisturbed, bench.forks, output=folder)
    started = bench.start("full", fault={"at": r"os\.mkdir .*/\.final\.tmp-", "do": "SIGSTOP"})
    started.until_stopped()
    filler = fill(folder, 100_000)
    started.send(SIGCONT)
    done = started.finish()
    assert_failed(done, folder / "full", "the trained model could not be written: No space left on device")
    assert assert_all_good(folder / "full") == [6, 9, 12]
    filler.unlink()
    assert "resuming full from checkpoint-12" in bench.resume_to_the_same("full").out


def test_a_disk_that_is_nearly_full_is_found_before_the_first_step(bench: Bench, disk: Disk) -> None:
    folder = disk("size=1m")
    done = Bench(bench.folder, bench.undisturbed, bench.forks, output=folder).pretrain("nearly")
    assert_failed(done, folder, "of disk and 1.0 MiB are free")
    assert "the run needs about " in done.err
    assert list(folder.iterdir()) == []


def test_a_read_only_disk_is_a_typed_error(bench: Bench, disk: Disk) -> None:
    folder = disk("ro")
    done = Bench(bench.folder, bench.undisturbed, bench.forks, output=folder).pretrain("read-only")
    assert_failed(done, folder, "the run's folder cannot be written: Read-only file system")


def test_a_folder_that_becomes_read_only_keeps_its_checkpoints_and_goes_on_the_same(bench: Bench) -> None:
    started = bench.start("sealed", fault={"at": SAVE, "do": "SIGSTOP", "unprivileged": True})
    started.until_stopped()
    run = bench.run("sealed")
    run.chmod(0o555)
    try:
        started.send(SIGCONT)
        assert_failed(started.finish(), run, "the checkpoint could not be written: Permission denied")
        assert assert_all_good(run) == [3]
        again = bench.pretrain("sealed", fault={"unprivileged": True})
        assert_failed(again, run, "the run's folder cannot be written: Permission denied")
    finally:
        run.chmod(0o755)
    bench.resume_to_the_same("sealed")


@pytest.mark.parametrize(
    ("at", "then", "said"),
    [
        (SAVE, 3, "the checkpoint could not be written: Input/output error"),  # a file of transformers
        (SAVE, 9, "the checkpoint could not be written: Input/output error"),  # the sync of the manifest
        (SAVE, 20, "the checkpoint could not be written: Input/output error"),  # the sync of all files
        (r"open .*/metrics\.jsonl", 0, "a line could not be written: Input/output error"),
        (r"open .*/samples\.jsonl", 0, "a line could not be written: Input/output error"),
        (r"os\.mkdir .*/\.final\.tmp-", 4, "the trained model could not be written: Input/output error"),
    ],
)
def test_an_io_error_is_a_typed_error_and_the_run_goes_on_the_same(bench: Bench, at: str, then: int, said: str) -> None:
    name = f"io-{next(NUMBERS)}"
    done = bench.pretrain(name, fault={"at": at, "then": then, "do": "error"})
    assert_failed(done, bench.run(name), said)
    assert json.loads((bench.run(name) / "run.json").read_text())["reason"] in said
    bench.resume_to_the_same(name)


# What a limit on the size of files brings is an error inside of safetensors and of torch.
@pytest.mark.parametrize("size", [100_000, 200_000])
def test_a_write_that_fails_inside_of_a_library_is_the_system_s_error(bench: Bench, size: int) -> None:
    name = f"limit-{size}"
    done = bench.pretrain(name, fault={"bytes": size, "do": "error"})
    assert_failed(done, bench.run(name), "the checkpoint could not be written: File too large")
    bench.resume_to_the_same(name)


def test_a_run_that_may_goes_on_to_the_next_save(bench: Bench, disk: Disk) -> None:
    folder = disk("size=16m")
    bench = Bench(bench.folder, bench.undisturbed, bench.forks, output=folder)
    started = bench.start("goes-on", "train.on_save_error=continue", fault={"at": SAVE, "do": "SIGSTOP"})
    started.until_stopped()
    filler = fill(folder, 100_000)
    started.send(SIGCONT)
    # The save after it finds the disk full, too; the last one has to succeed.
    done = started.finish()
    assert_failed(done, folder / "goes-on", "the checkpoint could not be written: No space left on device")
    warning = "the checkpoint could not be written: No space left on device; training goes on (train.on_save_error)"
    assert [line for line in done.err.splitlines() if line.startswith("warning")] == [
        f"warning: step {step}: {warning}" for step in (6, 9)
    ]
    assert assert_all_good(folder / "goes-on") == [3]
    filler.unlink()
    bench.resume_to_the_same("goes-on")

    done = bench.pretrain("once", "train.on_save_error=continue", fault={"at": SAVE, "then": 3, "do": "error"})
    assert done.code == 0, done.err
    assert assert_all_good(folder / "once") == [3, 9, 12]


# What a limit on the size of files brings is met within the weights, as a full disk is.
def test_an_export_that_cannot_be_written_leaves_nothing_of_it(bench: Bench, disk: Disk) -> None:
    folder = disk("size=17m")  # of which an export keeps 16 for what is beside the weights
    fill(folder, 1_000_000)
    for place, fault, said in (
        (folder, None, "the export needs about"),
        (bench.folder, {"bytes": 100_000, "do": "error"}, "the export could not be written: File too large"),
    ):
        before = sorted(place.iterdir())
        done = bench.forks("export", "tiny", "--output", str(place / "exported"), cwd=bench.folder, fault=fault)
        assert_failed(done, place, said)
        assert sorted(place.iterdir()) == before
