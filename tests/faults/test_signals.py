"""Faults 5, 6 and 26, limited time, and what the list of runs says of each end."""

from __future__ import annotations

from signal import SIGCONT, SIGINT, SIGKILL, SIGTERM

import pytest

from tests.runs import SAVE, Bench, assert_all_good, assert_same, lines

# After the save of step 3, the sync of the folder and step 4: before the line of the log.
STEP = {"at": r"os\.rename .*/checkpoint-3$", "then": 2}


@pytest.mark.parametrize("then", [0, 8, 17])
def test_sigterm_during_a_save_stops_there_and_saves_once(bench: Bench, then: int) -> None:
    name = f"term-{then}"
    done = bench.pretrain(name, fault={"at": SAVE, "then": then, "do": "SIGTERM"})
    assert done.code == 75, done.err
    assert assert_all_good(bench.run(name)) == [3, 6]
    assert lines(bench.run(name))[-1]["step"] == 6
    done = bench.resume_to_the_same(name)
    assert f"resuming {name} from checkpoint-6" in done.out


def test_two_signals_in_a_step_leave_at_once_and_nothing_is_corrupt(bench: Bench) -> None:
    started = bench.start("twice", fault={**STEP, "do": "SIGSTOP"})
    started.until_stopped()
    started.send(SIGINT, SIGTERM, SIGCONT)
    done = started.finish()
    assert done.code == 130
    assert "left at once" in done.err and "Traceback" not in done.err
    assert assert_all_good(bench.run("twice")) == [3]
    bench.resume_to_the_same("twice")


@pytest.mark.parametrize("then", [5, 14])
def test_two_signals_during_a_save_leave_at_once_and_nothing_is_corrupt(bench: Bench, then: int) -> None:
    name = f"twice-{then}"
    done = bench.pretrain(name, fault={"at": SAVE, "then": then, "do": "SIGTERM SIGINT"})
    assert done.code == 130
    assert assert_all_good(bench.run(name)) == [3]
    bench.resume_to_the_same(name)


def test_a_run_whose_time_is_over_saves_ends_with_75_and_goes_on(bench: Bench) -> None:
    done = bench.pretrain("timed", "train.max_time=1s", "train.max_steps=1M", "train.sample_every=0", "--json")
    assert done.code == 75, done.err
    assert "train.max_time is over" in done.err
    reached = done.json()["step"]
    assert assert_all_good(bench.run("timed"))[-1] == reached
    steps = [f"train.max_steps={reached + 3}", "train.sample_every=0", "--allow-changes", "train.max_steps"]
    # Shorter than it was planned, so its schedule is another one, and only the steps are compared.
    done = bench.pretrain("timed", *steps)
    assert done.code == 0, done.err
    assert [line["step"] for line in lines(bench.run("timed")) if "loss" in line] == list(range(1, reached + 4))


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on_the_same(bench: Bench) -> None:
    started = bench.start("held", fault={**STEP, "do": "SIGSTOP"})
    started.until_stopped()
    for arguments in ([], ["--overwrite"], ["--resume", "never"]):
        second = bench.pretrain("held", *arguments)
        assert second.code == 2, second.err
        assert f"the run held is being trained by process {started.pid}" in second.err
    started.send(SIGCONT)
    assert started.finish().code == 0
    assert_same(bench.run("held"), bench.undisturbed)


def test_the_list_of_runs_tells_how_each_of_them_is(bench: Bench) -> None:
    running = bench.start("is-running", fault={**STEP, "do": "SIGSTOP"})
    running.until_stopped()
    assert bench.pretrain("is-stopped", fault={"at": SAVE, "do": "SIGTERM"}).code == 75
    assert bench.pretrain("has-failed", fault={"at": SAVE, "do": "error"}).code == 4
    assert bench.pretrain("has-died", fault={"at": SAVE, "do": "SIGKILL"}).code == -SIGKILL

    def listed() -> dict[str, tuple[str, str | None]]:
        done = bench.forks("runs", "list", "--json", cwd=bench.folder)
        assert done.code == 0, done.err
        return {row["name"]: (row["status"], row["reason"]) for row in done.json()}

    found = listed()
    assert found["is-running"] == ("running", None)
    assert found["is-stopped"] == ("stopped", "by SIGTERM; step 6 of 12 is saved")
    assert found["has-failed"] == ("failed", "the checkpoint could not be written: Input/output error")
    assert found["has-died"][0] == "died"
    assert found["tiny"][0] == "done"
    running.send(SIGKILL)
    assert running.finish().code == -SIGKILL
    assert listed()["is-running"][0] == "died"
