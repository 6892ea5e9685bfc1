"""What a person reads when something goes wrong with a run: each message whole, at most eight lines, and its code."""

from __future__ import annotations

import shutil
from pathlib import Path
from signal import SIGCONT

from tests.runs import SAVE, Bench, Disk, Started, fill, flip, truncate


def assert_says(started: Started, run: Path, code: int, text: str) -> None:
    """The whole of standard error, with RUN for the folder of the run."""
    done = started.finish()
    said = done.err.replace(str(run), "RUN")
    assert said == text.removeprefix("\n")
    assert done.code == code
    assert len(said.splitlines()) <= 8


def test_a_full_disk(bench: Bench, disk: Disk) -> None:
    folder = disk("size=16m")
    bench = Bench(bench.folder, bench.undisturbed, bench.forks, output=folder)
    started = bench.start("says-full", fault={"at": SAVE, "do": "SIGSTOP"})
    started.until_stopped()
    fill(folder, 250_000)
    started.send(SIGCONT)
    assert_says(
        started,
        bench.run("says-full"),
        4,
        """
error: RUN/checkpoint-6: the checkpoint could not be written: No space left on device
  Nothing that was saved before is lost. Make room (or mend the folder) and run the same command again.
""",
    )


def test_a_disk_nearly_full_at_the_start(bench: Bench, disk: Disk) -> None:
    bench = Bench(bench.folder, bench.undisturbed, bench.forks, output=disk("size=1m"))
    assert_says(
        bench.start("says-nearly-full"),
        bench.run("says-nearly-full"),
        4,
        """
error: RUN: the run needs about 1.8 MiB of disk and 1.0 MiB are free
  Make room, lower train.save_total_limit, or set output_dir to another disk.
""",
    )


def test_a_disk_that_is_read_only(bench: Bench, disk: Disk) -> None:
    bench = Bench(bench.folder, bench.undisturbed, bench.forks, output=disk("ro"))
    assert_says(
        bench.start("says-read-only"),
        bench.run("says-read-only"),
        4,
        """
error: RUN: the run's folder cannot be written: Read-only file system
  Make room, mend the folder, or set output_dir to another one.
""",
    )


def test_an_io_error(bench: Bench) -> None:
    assert_says(
        bench.start("says-io", fault={"at": SAVE, "then": 12, "do": "error"}),
        bench.run("says-io"),
        4,
        """
error: RUN/checkpoint-6: the checkpoint could not be written: Input/output error
  Nothing that was saved before is lost. Make room (or mend the folder) and run the same command again.
""",
    )


def test_sigterm_and_a_second_signal(bench: Bench) -> None:
    assert_says(
        bench.start("says-term", fault={"at": SAVE, "do": "SIGTERM"}),
        bench.run("says-term"),
        75,
        """

stopping after this step; once more leaves at once
stopped: by SIGTERM; step 6 of 12 is saved
  The same command goes on from there.
""",
    )
    assert_says(
        bench.start("says-term", fault={"at": r"os\.mkdir .*/\.checkpoint-9\.tmp-", "do": "SIGINT SIGTERM"}),
        bench.run("says-term"),
        130,
        """

stopping after this step; once more leaves at once

left at once; the last checkpoint is good
""",
    )


def test_a_corrupt_checkpoint_and_only_corrupt_ones(bench: Bench) -> None:
    run = bench.copy("says-corrupt")
    truncate(run / "checkpoint-12" / "model.safetensors")
    assert_says(
        bench.start("says-corrupt"),
        run,
        0,
        """
warning: checkpoint-12 is passed over: model.safetensors has 150,726 bytes instead of 150,736 (the next save removes it)
""",
    )
    for step, file in ((6, "optimizer.pt"), (9, "trainer_state.json"), (12, "rng_state.pth")):
        flip(run / f"checkpoint-{step}" / file)
    (run / "checkpoint-9" / "trainer_state.json").unlink()
    assert_says(
        bench.start("says-corrupt"),
        run,
        4,
        """
error: RUN: none of the 3 checkpoints can be trusted
  checkpoint-12: rng_state.pth was changed (its sha256 differs)
  checkpoint-9: trainer_state.json is missing
  checkpoint-6: optimizer.pt was changed (its sha256 differs)
  Restore one from a copy, or train again from the start with --overwrite.
""",
    )


def test_a_changed_recipe_data_set_and_tokenizer(bench: Bench) -> None:
    run = bench.copy("says-changed")
    for path in ("final", "checkpoint-12"):
        shutil.rmtree(run / path)
    keys = ("data.shuffle=false", "seed=7", "train.global_batch_size=8", "train.optimizer=muon")
    assert_says(
        bench.start("says-changed", *keys, "train.learning_rate=1e-3", "train.log_every=3"),
        run,
        4,
        """
error: RUN/checkpoint-9: this is not the recipe or the data of the run, which is at step 9
  data.shuffle: True -> False
  seed: 1337 -> 7
  train.global_batch_size: 4 -> 8
  train.learning_rate: 0.003 -> 0.001
  and 1 more
  To go on all the same: --allow-changes data.shuffle,seed,train.global_batch_size,train.learning_rate,train.optimizer
  To train anew: --overwrite, or another name=NAME.
""",
    )
    assert_says(
        bench.start("says-changed", "tokenizer.train={algorithm: bpe, vocab_size: 300}"),
        run,
        4,
        """
error: RUN/checkpoint-9: this is not the tokenizer of the run, which is at step 9: its ids mean other texts
  tokenizer.train.algorithm: bytes -> bpe
  tokenizer.train.vocab_size: 258 -> 300
  To train anew: --overwrite, or another name=NAME.
""",
    )


def test_a_folder_that_is_in_use_and_one_that_is_not_empty(bench: Bench) -> None:
    started = bench.start("says-held", fault={"at": SAVE, "do": "SIGSTOP"})
    started.until_stopped()
    run = bench.run("says-held")
    text = f"""
error: RUN: the run says-held is being trained by process {started.pid}
  Wait for it, stop it, or give another name=NAME.
"""
    assert_says(bench.start("says-held"), run, 2, text)
    started.send(SIGCONT)
    assert started.finish().code == 0
    assert_says(
        bench.start("says-held", "--resume", "never"),
        run,
        2,
        """
error: RUN: the run says-held is there already, and --resume never was given
  --overwrite trains again from the start; name=NAME starts another run.
""",
    )
    foreign = bench.run("says-foreign")
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    text = "\nerror: RUN is not empty and is not a run\n  Give another name=NAME or output_dir=FOLDER.\n"
    assert_says(bench.start("says-foreign", "--overwrite"), foreign, 2, text)
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_a_named_checkpoint_that_is_damaged(bench: Bench) -> None:
    run = bench.copy("says-named")
    flip(run / "checkpoint-9" / "optimizer.pt")
    assert_says(
        bench.start("says-named", "--resume", str(run / "checkpoint-9")),
        run,
        4,
        """
error: RUN/checkpoint-9: cannot resume: optimizer.pt was changed (its sha256 differs)
  Name another checkpoint folder.
""",
    )
