"""Faults 7 and 8: a run of two processes of which one is signalled, killed, or alone with an error.

Signals that come to a process while it waits for the other are part of it: where rank 0 is stopped, rank 1 waits.
"""

from __future__ import annotations

from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGTERM, SIGXFSZ
from typing import Any

import pytest

from tests import team
from tests.faults import test_numbers as numbers
from tests.pairs import LARGE, SAVING, STEP, TOKENS, UNREADABLE, VALIDATION, Pair, codes
from tests.resume import test_early_stopping as early
from tests.runs import Forks, assert_all_good, assert_same_model, lines

SLOW = pytest.mark.slow_fault
LOST = """\
connection closed: another process of the run has ended
  What it said last, or what is said of it, is the cause.
  The same command goes on from the last checkpoint.
"""
STOPPED = "stopped: by {}; step {} of 12 is saved\n  The same command goes on from there.\n"


# ---- 7: signals ----


@pytest.mark.parametrize(
    ("rank", "where", "saved"),
    [
        (1, STEP, 5),
        (1, SAVING, 6),
        (0, VALIDATION, 6),
        pytest.param(0, STEP, 5, marks=SLOW),
        pytest.param(0, SAVING, 6, marks=SLOW),
        pytest.param(1, VALIDATION, 6, marks=SLOW),
    ],
    ids=["1-step", "1-save", "0-eval", "0-step", "0-save", "1-eval"],
)
def test_a_signal_to_one_of_two_stops_both_at_one_checkpoint_and_they_go_on_the_same(
    pair: Pair, rank: int, where: dict[str, Any], saved: int
) -> None:
    name = f"one-{saved}-{where['then']}-{rank}"
    both = pair.start(name, faults={0: {**where, "do": "SIGSTOP"}})
    both.members[0].until_stopped()
    both.members[rank].send(SIGTERM)
    both.members[0].send(SIGCONT)
    ended = both.finish()
    assert codes(ended) == [75, 75], ended
    said = "\nstopping after this step; once more leaves at once\n" if rank == 0 else ""
    assert [done.err for done in ended] == [said + STOPPED.format("SIGTERM", saved), ""]
    assert assert_all_good(pair.run(name)) == [3, saved]
    assert f"resuming {name} from checkpoint-{saved}" in pair.resume_to_the_same(name).out


def test_a_signal_to_all_that_comes_once_more_from_the_parent_saves_once(pair: Pair) -> None:
    # One after the other, so that each is handled.
    ended = pair.pretrain("echo", faults={0: {**STEP, "do": "SIGTERM SIGTERM"}})
    assert codes(ended) == [75, 75], ended
    assert ended[0].err.count("stopping after this step") == 1
    assert assert_all_good(pair.run("echo")) == [3, 5]
    pair.resume_to_the_same("echo")


@pytest.mark.parametrize("where", [pytest.param(STEP, marks=SLOW), SAVING], ids=["step", "save"])
def test_two_signals_leave_at_once_and_nothing_is_corrupt(pair: Pair, where: dict[str, Any]) -> None:
    name = f"twice-{where['then']}"
    both = pair.start(name, faults={0: {**where, "do": "SIGSTOP"}})
    both.members[0].until_stopped()
    for member in both.members:
        member.send(SIGTERM, SIGINT)
    both.members[0].send(SIGCONT)
    ended = both.finish()
    assert ended[0].code == 130, ended
    assert ended[1].code in (1, 130), ended
    assert_all_good(pair.run(name))
    pair.resume_to_the_same(name)


@pytest.mark.parametrize("ranks", [(0,), (0, 1)], ids=["first", "both"])
def test_a_signal_while_the_first_makes_tokens_ends_both_with_nothing_to_save(
    pair: Pair, ranks: tuple[int, ...]
) -> None:
    name = f"before-{len(ranks)}"
    both = pair.start(name, f"data.validation={{tail: 4{len(ranks)}%}}", faults={0: {**TOKENS, "do": "SIGSTOP"}})
    both.members[0].until_stopped()
    for rank in ranks:
        both.members[rank].send(SIGTERM)
    both.members[0].send(SIGCONT)
    ended = both.finish()
    assert codes(ended) == [130, 130], ended
    assert ended[0].err == "stopped: there was nothing to save\n"
    assert not pair.run(name).exists()


@SLOW
def test_two_processes_whose_time_is_over_stop_at_the_same_step(pair: Pair) -> None:
    arguments = ("train.max_time=1s", "train.max_steps=1M", "train.sample_every=0")
    ended = pair.pretrain("timed", *arguments, "--json")
    assert codes(ended) == [75, 75]
    assert "train.max_time is over" in ended[0].err and ended[1].err == ""
    assert assert_all_good(pair.run("timed"))[-1] == ended[0].json()["step"]


# ---- 8: one of them dies ----


@pytest.mark.parametrize(
    ("rank", "where"),
    [(1, STEP), (0, SAVING), pytest.param(0, STEP, marks=SLOW), pytest.param(1, SAVING, marks=SLOW)],
    ids=["1-step", "0-save", "0-step", "1-save"],
)
def test_a_killed_process_ends_the_other_and_costs_no_checkpoint(pair: Pair, rank: int, where: dict[str, Any]) -> None:
    name = f"killed-{where['then']}-{rank}"
    both = pair.start(name, faults={0: {**where, "do": "SIGSTOP"}})
    both.members[0].until_stopped()
    both.members[rank].send(SIGKILL)
    both.members[0].send(SIGCONT)
    ended = both.finish()
    assert ended[rank].code == -SIGKILL
    other = ended[1 - rank]
    place = "process 1 of 2: " if rank == 0 else ""
    assert (other.code, other.err) == (1, f"error: {place}{LOST}"), other
    good = assert_all_good(pair.run(name))
    assert good == ([3, 6] if (where, rank) == (SAVING, 1) else [3])
    assert f"resuming {name} from checkpoint-{good[-1]}" in pair.resume_to_the_same(name).out


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
def test_a_killed_process_while_the_first_makes_tokens_costs_nothing(pair: Pair, rank: int) -> None:
    name, other_data = f"tokens-{rank}", f"data.validation={{tail: {20 + rank}%}}"
    both = pair.start(name, other_data, faults={0: {**TOKENS, "do": "SIGSTOP"}})
    both.members[0].until_stopped()
    both.members[rank].send(SIGKILL)
    both.members[0].send(SIGCONT)
    ended = both.finish()
    assert ended[rank].code == -SIGKILL
    assert ended[1 - rank].code == 1 and ended[1 - rank].err.endswith(LOST), ended
    done = pair.pretrain(name, other_data)
    assert codes(done) == [0, 0]
    assert_all_good(pair.run(name))


# ---- an error on one alone ----


@pytest.mark.slow_fault
def test_a_disk_that_is_full_for_the_one_that_saves_ends_both_with_4(pair: Pair) -> None:
    ended = pair.pretrain("full", faults={0: {"bytes": 200_000, "do": "error"}})
    assert codes(ended) == [4, 4], ended
    assert "the checkpoint could not be written: File too large" in ended[0].err
    assert assert_all_good(pair.run("full")) == []
    pair.resume_to_the_same("full")
    ended = pair.pretrain("io", faults={0: {**SAVING, "do": "error"}})
    assert codes(ended) == [4, 4], ended
    assert assert_all_good(pair.run("io")) == [3]
    pair.resume_to_the_same("io")


@pytest.mark.slow_fault
@pytest.mark.parametrize("do", ["error", pytest.param("killed", marks=SLOW)])
def test_a_part_of_a_divided_checkpoint_that_cannot_be_written_is_no_checkpoint(pair: Pair, do: str) -> None:
    """Where both write, the fault is in the file of the one that does not lead."""
    name, fsdp = f"part-{do}", "launch.strategy=fsdp"
    ended = pair.pretrain(name, fsdp, faults={1: {"bytes": 60_000, "do": do}})
    if do == "error":
        assert codes(ended) == [4, 4], ended
        assert "the checkpoint could not be written: File too large" in ended[0].err
        assert not list(pair.run(name).glob(".checkpoint*"))
    else:
        assert ended[1].code == -SIGXFSZ, ended
        assert ended[0].code == 1, ended
    assert assert_all_good(pair.run(name)) == []
    assert codes(pair.pretrain(name, fsdp)) == [0, 0]
    assert assert_all_good(pair.run(name))[-1] == 12
    assert not list(pair.run(name).glob(".checkpoint*"))


@SLOW
def test_both_go_on_after_a_save_that_failed_where_the_recipe_says_so(pair: Pair) -> None:
    ended = pair.pretrain("goes-on", "train.on_save_error=continue", faults={0: {**SAVING, "do": "error"}})
    assert codes(ended) == [0, 0], ended
    assert ended[0].err.count("training goes on (train.on_save_error)") == 1 and ended[1].err == ""
    assert assert_all_good(pair.run("goes-on")) == [3, 9, 12]
    assert_same_model(pair.run("goes-on") / "final", pair.undisturbed / "final")


@pytest.mark.parametrize(
    ("fault", "arguments", "code", "said"),
    [
        (UNREADABLE, (), 3, "Input/output error"),
        pytest.param({"memory": 300 << 20}, LARGE, 6, "does not fit", marks=SLOW),
    ],
    ids=["shard", "memory"],
)
def test_an_error_of_the_second_alone_ends_both(
    pair: Pair, fault: dict[str, Any], arguments: tuple[str, ...], code: int, said: str
) -> None:
    ended = pair.pretrain(f"alone-{code}", *arguments, faults={1: fault})
    assert codes(ended) == [1, code], ended
    assert said in ended[1].err


def test_a_loss_that_is_no_number_on_one_process_stops_both_or_is_skipped_by_both(tmp_path: Path, forks: Forks) -> None:
    folder = numbers.make_poisoned(tmp_path)
    poisoned = numbers.poisoned_steps(folder)
    command = ("pretrain", "tiny.yaml", *numbers.RECIPE, *numbers.PLAIN)
    ended = team.start(forks, 2, *command, "name=stops", cwd=folder).finish()
    assert codes(ended) == [5, 5]
    assert f"the gradient of step {poisoned[0]} is not finite" in ended[0].err
    assert max(assert_all_good(folder / "runs" / "stops"), default=0) < poisoned[0]
    done = team.run(forks, 2, *command, "name=skips", "train.non_finite=skip", cwd=folder)
    assert done.err.count("it is skipped") == len(poisoned)
    logged = [line for line in lines(folder / "runs" / "skips") if "loss" in line]
    assert [line["step"] for line in logged if line.get("skipped")] == poisoned
    assert forks(*command, "name=alone", "train.non_finite=skip", cwd=folder).code == 0
    alone = [line for line in lines(folder / "runs" / "alone") if "loss" in line]
    for line, expected in zip(logged, alone, strict=True):
        assert line["step"] in poisoned or line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@SLOW
def test_two_processes_stop_early_at_the_step_of_one_with_the_same_best(tmp_path: Path, forks: Forks) -> None:
    folder = early.overfitting(tmp_path)
    command = ("pretrain", "tiny.yaml", *early.RECIPE, "--json")
    one = forks(*command, "name=one", cwd=folder).json()
    two = team.run(forks, 2, *command, "name=two", cwd=folder).json()
    assert (two["step"], two["best_step"]) == (one["step"], one["best_step"])
    assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-3)
    run = folder / "runs" / "two"
    assert assert_all_good(run) == [two["best_step"], two["step"]]
    assert_same_model(run / "final", run / f"checkpoint-{two['best_step']}")
