"""Fault 24: what may change before a run goes on, what may not, and that neither is silent."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runs import Bench, assert_all_good, assert_same_model, lines

# key: what it is changed to.
HARMLESS = {
    "train.log_every": ("1", "5"),
    "train.eval_every": ("6", "5"),
    "train.save_every": ("3", "2"),
    "train.sample_every": ("6", "5"),
    "train.save_total_limit": ("3", "2"),
    "train.eval_at_start": ("False", "true"),
    "train.max_time": ("not set", "1h"),
    "data.workers": ("auto", "1"),
    "tokenize.processes": ("auto", "1"),
    "generate.max_new_tokens": ("8", "4"),
    "generate.prompts": ("['The ']", "[A]"),
    "eval.stride": ("not set", "16"),
    "eval.limit": ("not set", "5"),
    "launch.processes": ("auto", "1"),
    "tracking.project": ("not set", "mine"),
}


def half_way(bench: Bench, name: str) -> Path:
    """A copy of the finished run that ends with step 9."""
    run = bench.copy(name)
    for path in ("final", "checkpoint-12"):
        shutil.rmtree(run / path)
    return run


def rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["learning_rate"] for line in lines(run) if "loss" in line}


def test_harmless_keys_may_all_change_are_listed_and_end_with_the_same_weights(bench: Bench) -> None:
    run = half_way(bench, "harmless")
    elsewhere = bench.folder / "elsewhere"
    elsewhere.mkdir()
    run = run.rename(elsewhere / "harmless")
    moved = Bench(bench.folder, bench.undisturbed, bench.forks, output=elsewhere)
    done = moved.resume_to_the_same_weights("harmless", *(f"{key}={new}" for key, (_, new) in HARMLESS.items()))
    said = [line for line in done.out.splitlines() if line.startswith("changed since: ")]
    for key, (before, _) in HARMLESS.items():
        assert any(line.startswith(f"changed since: {key}: {before} -> ") for line in said), key
    assert {"name", "output_dir"} <= {line.split(": ")[1] for line in said}
    assert [line["step"] for line in lines(run)] == [*range(1, 7), 6, 7, 8, 9, 10, 10, 12, 12]


def test_another_micro_batch_goes_on_with_the_same_rows(bench: Bench) -> None:
    run = half_way(bench, "micro")
    done = bench.pretrain("micro", "train.micro_batch_size=2")
    assert done.code == 0, done.err
    assert "changed since: train.micro_batch_size: auto -> 2" in done.out
    # Dropout draws for other shapes, so the values are near, not the same.
    mine, theirs = load_file(run / "final/model.safetensors"), load_file(bench.undisturbed / "final/model.safetensors")
    assert all(np.allclose(mine[name], theirs[name], atol=0.02) for name in mine)


def test_data_that_moved_goes_on_the_same(bench: Bench) -> None:
    half_way(bench, "moved")
    shutil.copy(bench.folder / "text.txt", bench.folder / "moved.txt")
    done = bench.resume_to_the_same("moved", "data.train.path=moved.txt")
    assert "changed since: data.train.0.path: " in done.out


@pytest.mark.parametrize(
    ("schedule", "length"),
    [("cosine", "train.max_steps=18"), ("wsd", "train.max_steps=18"), ("linear", "train.max_tokens=2304")],
)
def test_a_longer_run_has_the_learning_rates_of_one_that_was_as_long_from_the_start(
    bench: Bench, schedule: str, length: str
) -> None:
    kind = f"train.lr_scheduler={schedule}"
    assert bench.pretrain(f"short-{schedule}", kind).code == 0
    extended = bench.pretrain(f"short-{schedule}", kind, length)
    assert extended.code == 0, extended.err
    assert f"changed since: {length.partition('=')[0]}: " in extended.out
    assert bench.pretrain(f"long-{schedule}", kind, length).code == 0
    mine, theirs = (rates(bench.run(f"{what}-{schedule}")) for what in ("short", "long"))
    assert mine.keys() == theirs.keys() == set(range(1, 19))
    assert {step: mine[step] for step in range(13, 19)} == {step: theirs[step] for step in range(13, 19)}
    assert assert_all_good(bench.run(f"short-{schedule}"))[-1] == 18


def test_what_changes_the_learning_is_refused_in_one_list_and_nothing_is_touched(bench: Bench) -> None:
    run = half_way(bench, "refused")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    changed = {
        "seed": "7",
        "train.optimizer": "muon",
        "train.learning_rate": "1e-3",
        "train.global_batch_size": "8",
        "data.shuffle": "false",
        "train.max_steps": "10",
        "train.weight_decay": "0",
        "tokenize.shard_tokens": "5000",
    }
    done = bench.pretrain("refused", *(f"{key}={value}" for key, value in changed.items()))
    assert done.code == 4
    assert "and 4 more" in done.err and f"--allow-changes {','.join(sorted(changed))}" in done.err
    assert len(done.err.strip().splitlines()) <= 8
    for key in ("train.learning_rate", "train.max_steps"):
        done = bench.pretrain("refused", f"{key}={changed[key]}")
        assert done.code == 4, done.err
        assert f"--allow-changes {key}\n" in done.err
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_an_allowed_change_goes_on_and_takes_effect(bench: Bench) -> None:
    run = half_way(bench, "allowed")
    done = bench.pretrain("allowed", "train.learning_rate=1e-3", "--allow-changes", "train.learning_rate")
    assert done.code == 0, done.err
    assert "changed since: train.learning_rate: 0.003 -> 0.001" in done.out
    then, now = rates(bench.undisturbed), rates(run)
    for step in (10, 11, 12):
        assert now[step] == pytest.approx(then[step] / 3)


def test_another_tokenizer_is_refused_and_cannot_be_allowed(bench: Bench) -> None:
    half_way(bench, "tokenizer")
    another = "tokenizer.train={algorithm: bpe, vocab_size: 300}"
    for more in ([], ["--allow-changes", "tokenizer,data"]):
        done = bench.pretrain("tokenizer", another, *more)
        assert done.code == 4, done.err
        assert "this is not the tokenizer of the run, which is at step 9" in done.err
        assert "tokenizer.train.vocab_size: 258 -> 300" in done.err or more
        assert "--allow-changes" not in done.err


def test_data_that_changed_is_refused_and_can_be_allowed(bench: Bench) -> None:
    run = half_way(bench, "data")
    (bench.folder / "changed.txt").write_text((bench.folder / "text.txt").read_text().replace("token", "tokem"))
    done = bench.pretrain("data", "data.train.path=changed.txt")
    assert done.code == 4
    assert "data.train.0.path: " in done.err and "--allow-changes data" in done.err
    done = bench.pretrain("data", "data.train.path=changed.txt", "--allow-changes", "data")
    assert done.code == 0, done.err
    assert lines(run)[:10] == lines(bench.undisturbed)[:10]
    assert lines(run)[-2] != lines(bench.undisturbed)[-2]


def test_a_run_evaluated_at_its_start_and_killed_before_its_first_checkpoint_is_logged_once(bench: Bench) -> None:
    fault = {"at": r"os\.mkdir .*/\.checkpoint-3\.tmp-", "do": "SIGKILL"}
    assert bench.pretrain("evaluated", "train.eval_at_start=true", fault=fault).code == -9
    done = bench.pretrain("evaluated", "train.eval_at_start=true")
    assert done.code == 0, done.err
    assert lines(bench.run("evaluated"))[1:] == lines(bench.undisturbed)
    assert lines(bench.run("evaluated"))[0]["step"] == 0
    assert_same_model(bench.run("evaluated") / "final", bench.undisturbed / "final")
