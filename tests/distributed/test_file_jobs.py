"""A file job on several processes: the same bytes as on one, and the same ways to end."""

from __future__ import annotations

import json
import os
from signal import SIGCONT, SIGKILL

import pytest

from tests.jobs import Jobs, make_jobs
from tests.pairs import faulty, until_stopped, workers
from tests.runs import Forks

JOURNAL = r"os\.fsync .*/done-{}\.jsonl"
SLOW = pytest.mark.slow_fault


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Jobs:
    return make_jobs(tmp_path_factory.mktemp("jobs"), forks)


@pytest.mark.slow_fault
def test_two_processes_write_what_one_writes_and_one_goes_on_with_what_two_began(jobs: Jobs) -> None:
    fault = faulty({1: {"at": JOURNAL.format(1), "then": 2, "do": "SIGINT"}})
    command = jobs.arguments("two", "--processes", "2", "--json")
    stopped = jobs.forks.start(*command, cwd=jobs.folder, **fault).finish()
    assert stopped.code == 75, stopped.err
    first, second = (sum(b'{"unit": ' in line for line in journal(jobs, "two", rank)) for rank in (0, 1))
    assert (first, second) == (5, 3)
    assert "stopped: 32 of 40 prompts are done and kept" in stopped.err
    assert "going on: 32 of 40" in jobs.ends_the_same("two").out


def journal(jobs: Jobs, name: str, rank: int) -> list[bytes]:
    return (jobs.partial(name) / f"done-{rank}.jsonl").read_bytes().splitlines()


@SLOW
def test_two_processes_end_the_same_and_say_it_once(jobs: Jobs) -> None:
    done = jobs.run("both", "--processes", "2", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["prompts"] == 40
    assert jobs.output("both").read_bytes() == jobs.output("undisturbed").read_bytes()
    assert done.err.count("done:") == 1


@SLOW
def test_a_worker_that_is_killed_is_named_with_what_to_do_and_the_job_goes_on(jobs: Jobs) -> None:
    command = jobs.arguments("killed", "--processes", "2")
    fault = faulty({0: {"at": JOURNAL.format(0), "then": 2, "do": "SIGSTOP"}})
    started = jobs.forks.start(*command, cwd=jobs.folder, **fault)
    pids = workers(started.pid)
    until_stopped(pids[0])
    os.kill(pids[0], SIGKILL)
    os.kill(pids[0], SIGCONT)
    done = started.finish()
    assert done.code == 6
    assert done.err.splitlines()[-3:] == [
        "error: process 0 of 2 was killed (SIGKILL): probably out of memory",
        "  Run fewer processes (--processes), or --precision bf16.",
        "  The same command goes on with what is done.",
    ]
    jobs.ends_the_same("killed")


def test_a_worker_of_another_launcher_is_refused(jobs: Jobs) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    done = jobs.forks(*jobs.arguments("torchrun"), cwd=jobs.folder, **variables, **meeting)
    assert done.code == 2 and "was started by torchrun" in done.err and "--processes N" in done.err
