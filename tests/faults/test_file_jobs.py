"""A file job of `generate` that is killed, stopped, or meets a full disk at any moment ends with the same bytes."""

from __future__ import annotations

import json
import random
from itertools import count
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Any

import pytest

from tests.jobs import SAVE_EVERY, Jobs, make_jobs
from tests.runs import Forks, truncate

JOURNAL = r"os\.fsync .*/done-0\.jsonl"
SLOW = pytest.mark.slow_fault
NUMBERS = count()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Jobs:
    return make_jobs(tmp_path_factory.mktemp("jobs"), forks)


def kept(jobs: Jobs, name: str) -> int:
    """How many units are in the journal, whole or not."""
    return (jobs.partial(name) / "done-0.jsonl").read_bytes().count(b'{"unit": ')


def kill(at: str, then: int = 0) -> dict[str, Any]:
    return {"at": at, "then": then, "do": "SIGKILL"}


def test_a_job_killed_five_times_ends_with_the_bytes_of_an_undisturbed_one(jobs: Jobs) -> None:
    units = []
    for number, fault in enumerate(
        (
            kill(JOURNAL),  # written, and not yet made durable
            kill(JOURNAL, 2),
            kill(JOURNAL, 1),
            kill(r"open .*/output\.jsonl"),  # all units are done
            kill(r"os\.rename .*/killed\.jsonl$"),
        )
    ):
        assert jobs.run("killed", fault=fault).code == -SIGKILL
        assert not jobs.output("killed").exists()
        units.append(kept(jobs, "killed"))
        if number < 3:  # as a kill in the middle of a write leaves it
            truncate(jobs.partial("killed") / "done-0.jsonl")
    assert units == [1, 3, 4, 10, 10]
    done = jobs.ends_the_same("killed")
    assert "going on: 40 of 40 prompts are done" in done.out, "no unit is done twice"


def test_a_kill_between_the_output_and_the_end_is_a_finished_job(jobs: Jobs) -> None:
    fault = kill(r"os\.fsync .*/jobs\d+$", 0)  # the folder, once the output has its name
    assert jobs.run("renamed", fault=fault).code == -SIGKILL
    assert jobs.output("renamed").exists() and jobs.partial("renamed").exists()
    assert "renamed.jsonl is finished: 40 prompts" in jobs.ends_the_same("renamed").out


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(r"open .*/rows\.jsonl", marks=SLOW),
        pytest.param(r"os\.fsync .*/tokens\.bin", marks=SLOW),
        r"os\.rename .*/job\.json$",
    ],
)
def test_a_kill_while_the_prompts_are_read_is_no_loss(jobs: Jobs, at: str) -> None:
    name = f"reading-{next(NUMBERS)}"
    assert jobs.run(name, fault=kill(at)).code == -SIGKILL
    jobs.ends_the_same(name)


def test_a_seed_that_was_drawn_is_kept_over_a_kill(jobs: Jobs) -> None:
    command = jobs.arguments("drawn")
    at = command.index("--seed")
    command = command[:at] + command[at + 2 :]
    for _ in range(2):
        assert jobs.forks(*command, cwd=jobs.folder, fault=kill(JOURNAL, 1)).code == -SIGKILL
    seed = json.loads((jobs.partial("drawn") / "job.json").read_text())["settings"]["seed"]
    done = jobs.forks(*command, cwd=jobs.folder)
    assert done.code == 0 and f"seed {seed}:" in done.out
    alone = jobs.run("drawn-alone", "--seed", str(seed))
    assert alone.code == 0
    assert jobs.output("drawn").read_bytes() == jobs.output("drawn-alone").read_bytes()


@pytest.mark.parametrize("number", [SIGINT, pytest.param(SIGTERM, marks=SLOW), pytest.param(SIGHUP, marks=SLOW)])
def test_a_signal_stops_with_75_and_keeps_what_is_done(jobs: Jobs, number: int) -> None:
    name = f"signal-{number}"
    done = jobs.run(name, fault={"at": JOURNAL, "then": 3, "do": {2: "SIGINT", 15: "SIGTERM", 1: "SIGHUP"}[number]})
    assert done.code == 75, done.err
    count = kept(jobs, name) * SAVE_EVERY
    assert done.err == f"stopped: {count} of 40 prompts are done and kept\n  The same command goes on from there.\n"
    assert f"going on: {count} of 40" in jobs.ends_the_same(name).out


def test_a_signal_before_the_first_unit_leaves_nothing_and_ends_with_130(jobs: Jobs) -> None:
    done = jobs.run("early", fault={"at": r"os\.rename .*/job\.json$", "do": "SIGINT"})
    assert (done.code, done.err) == (130, "stopped: nothing was done yet, and nothing is lost\n")
    assert not jobs.output("early").exists() and not jobs.partial("early").exists()


@pytest.mark.parametrize(
    ("begun", "fault", "said"),
    [
        (True, {"bytes": 1_500, "do": "error"}, "the results could not be written: File too large"),
        (False, {"at": JOURNAL, "then": 2, "do": "error"}, "the results could not be written: Input/output error"),
        (True, {"at": r"open .*/output\.jsonl", "do": "error"}, "the output could not be written: Input/output error"),
        (
            False,
            {"at": r"open .*/rows\.jsonl", "do": "error"},
            "the folder of what is done could not be written: Input",
        ),
    ],
)
def test_a_disk_that_takes_no_more_is_a_typed_error_and_loses_nothing(
    jobs: Jobs, begun: bool, fault: dict[str, Any], said: str
) -> None:
    name = f"disk-{next(NUMBERS)}"
    if begun:
        assert jobs.run(name, fault=kill(JOURNAL, 1)).code == -SIGKILL
    done = jobs.run(name, fault=fault)
    assert done.code == 4, done.err
    assert said in done.err and "Traceback" not in done.err and len(done.err.splitlines()) <= 4
    assert not jobs.output(name).exists()
    jobs.ends_the_same(name)


def test_a_second_command_on_the_same_output_is_refused(jobs: Jobs) -> None:
    first = jobs.start("held", fault={"at": JOURNAL, "then": 2, "do": "SIGSTOP"})
    first.until_stopped()
    for more in ([], ["--overwrite"]):
        second = jobs.run("held", *more)
        assert second.code == 2 and f"process {first.pid} is writing held.jsonl" in second.err
    first.send(SIGCONT)
    assert first.finish().code == 0
    assert jobs.output("held").read_bytes() == jobs.output("undisturbed").read_bytes()


def test_an_unfinished_job_of_another_command_is_refused_with_what_differs(jobs: Jobs) -> None:
    assert jobs.run("other", fault=kill(JOURNAL, 3)).code == -SIGKILL
    before = {path.name: path.read_bytes() for path in jobs.partial("other").iterdir() if path.name != ".lock"}
    (jobs.folder / "in2.jsonl").write_bytes((jobs.folder / "in.jsonl").read_bytes() + b'{"prompt": "more"}\n')
    for more, said in (
        (["--temperature", "0.7"], "temperature: 0.8 there, 0.7 here"),
        (["--seed", "2"], "seed: 1 there, 2 here"),
    ):
        done = jobs.run("other", *more)
        assert done.code == 4 and said in done.err and "--overwrite" in done.err, done.err
    done = jobs.run("other", file="in2.jsonl")
    assert done.code == 4 and "file: its content is another" in done.err
    after = {path.name: path.read_bytes() for path in jobs.partial("other").iterdir() if path.name != ".lock"}
    assert after == before, "nothing is lost by a refusal"
    done = jobs.run("other", "--overwrite", file="in2.jsonl")
    assert done.code == 0 and len(jobs.output("other").read_text().splitlines()) == 41


def test_files_of_somebody_in_the_folder_of_a_job_are_left_there(jobs: Jobs) -> None:
    jobs.partial("somebody").mkdir()
    note = jobs.partial("somebody") / "notes.txt"
    note.write_text("mine")
    assert jobs.run("somebody", "--overwrite").code == 0
    assert jobs.output("somebody").read_bytes() == jobs.output("undisturbed").read_bytes()
    assert [path.name for path in jobs.partial("somebody").iterdir()] == ["notes.txt"]


def test_an_output_that_appears_meanwhile_is_not_replaced(jobs: Jobs) -> None:
    started = jobs.start("meanwhile", fault={"at": JOURNAL, "then": 2, "do": "SIGSTOP"})
    started.until_stopped()
    jobs.output("meanwhile").write_text("somebody's\n")
    started.send(SIGCONT)
    done = started.finish()
    assert done.code == 2 and "meanwhile.jsonl was not there when this job began" in done.err
    assert jobs.output("meanwhile").read_text() == "somebody's\n"
    assert "40 of 40 prompts are done" in jobs.ends_the_same("meanwhile", "--overwrite").out


@SLOW
def test_a_job_killed_at_any_of_its_operations_ends_with_the_bytes_of_an_undisturbed_one(jobs: Jobs) -> None:
    chance = random.Random(7)
    for round_ in range(6):
        name, kills = f"random-{round_}", 0
        while jobs.run(name, fault=kill(r"open .*/\.lock", chance.randrange(0, 40))).code == -SIGKILL:
            kills += 1
        assert kills >= 3
        jobs.ends_the_same(name)
