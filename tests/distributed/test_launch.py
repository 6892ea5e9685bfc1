"""Workers that a command started: how they end, and what of it the user sees. Real processes, no trainer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.groups import HERE, Parent, is_running, start, wait_until

Launch = Callable[..., Parent]


@pytest.fixture
def launch(tmp_path: Path, environment: dict[str, str]) -> Iterator[Launch]:
    started: list[Parent] = []

    def run(
        behaviour: str, name: str = "one", variables: dict[str, str | None] | None = None, **options: Any
    ) -> Parent:
        both = {**environment, **(variables or {})}
        kept = {key: value for key, value in both.items() if value is not None}
        started.append(start(behaviour, tmp_path / name, kept, options))
        return started[-1]

    yield run
    for parent in started:
        parent.kill()
        assert (
            list((parent.folder / "temporary").glob("gptcli-*")) == [] or parent.process.returncode == -signal.SIGKILL
        )


def test_workers_know_their_place_and_share_the_cores(launch: Launch) -> None:
    parent = launch("done", variables={"OMP_NUM_THREADS": None})
    done = parent.finish()
    assert (done.code, done.out, done.err) == (0, "", "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in (0, 1):
        assert (parent.folder / f"ready-{rank}").read_text() == f"{rank} 2 {rank} {threads}\n"


def test_an_error_of_all_is_said_once_without_a_rank_and_not_started_again(launch: Launch) -> None:
    done = launch("all_typed", variables={"GPTCLI_MAX_RESTARTS": "1"}).finish()
    assert (done.code, done.err) == (3, "error: a.jsonl:7: row 7 is no text\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_each_worker_once_and_the_command_ends_with_75(launch: Launch, number: signal.Signals) -> None:
    parent = launch("stop")
    parent.until_ready(0, 1)
    parent.send(number)
    done = parent.finish()
    assert done.code == 75, done.err
    assert done.err == f"stopped: by {number.name}; step 3 is saved\n  The same command goes on.\n"
    assert parent.signals(0) == parent.signals(1) == [number.name]


@pytest.mark.slow_fault
def test_a_save_after_a_signal_is_waited_for_longer_than_the_followers_of_a_failure(launch: Launch) -> None:
    parent = launch("slow_save")
    parent.until_ready(0, 1)
    parent.send(signal.SIGTERM)
    done = parent.finish()
    assert done.code == 75, done.err
    assert parent.signals(0) == ["SIGTERM"]


def test_a_second_signal_leaves_at_once_with_130(launch: Launch) -> None:
    parent = launch("never_ends")
    parent.until_ready(0, 1)
    parent.send(signal.SIGINT)
    parent.until_signalled(0, 1)
    parent.send(signal.SIGINT)
    done = parent.finish()
    assert (done.code, done.err) == (130, "")
    assert parent.signals(0) == parent.signals(1) == ["SIGINT", "SIGINT"]


@pytest.mark.slow_fault
def test_workers_stop_and_save_when_their_parent_is_killed(launch: Launch) -> None:
    parent = launch("slow_save")  # long enough for a second signal to come
    pids = parent.until_ready(0, 1)
    os.kill(parent.process.pid, signal.SIGKILL)
    done = parent.finish()
    wait_until(lambda: not any(map(is_running, pids)), "ended")
    assert done.code == -signal.SIGKILL
    assert parent.signals(0) == parent.signals(1) == ["SIGTERM"]
    # Nobody is left to say it but the first of them.
    assert done.err == "stopped: by SIGTERM; step 3 is saved\n  The same command goes on.\n"


@pytest.mark.slow_fault
def test_a_crash_names_the_signal_and_the_rank(launch: Launch) -> None:
    done = launch("segfault").finish()
    assert done.code == 1
    assert done.err.splitlines()[0] == "error: process 1 of 2 died by SIGSEGV"


def test_a_killed_worker_ends_the_others_in_a_collective_with_6(launch: Launch) -> None:
    parent = launch("killed")
    done = parent.finish()
    assert done.code == 6
    head, *rest = done.err.splitlines()
    assert head == "error: process 1 of 2 was killed (SIGKILL): probably out of memory"
    assert "micro_batch_size" in rest[0] and len(rest) == 2


@pytest.mark.slow_fault
def test_a_killed_worker_is_started_again_with_the_others_as_often_as_asked(launch: Launch) -> None:
    parent = launch("killed", variables={"GPTCLI_MAX_RESTARTS": "1"})
    done = parent.finish()
    assert done.code == 0, done.err
    assert "process 1 of 2 was killed" in done.err and done.err.startswith("warning: ")
    assert (parent.folder / "starts-0").read_text() == (parent.folder / "starts-1").read_text() == "0\n1\n"


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    ("behaviour", "code", "head"),
    [
        ("typed", 3, "error: process 1 of 2: a.jsonl:7: row 7 is no text"),
        ("unexpected", 1, "error: process 1 of 2: ValueError: a shape that nobody thought of"),
        ("deaf", 3, "error: process 1 of 2: a.jsonl:7: row 7 is no text"),
    ],
)
def test_the_error_of_one_ends_those_that_wait_for_it_and_is_said_once(
    launch: Launch, behaviour: str, code: int, head: str
) -> None:
    done = launch(behaviour).finish()
    assert done.code == code
    assert done.err.splitlines()[0] == head
    assert done.err.count("error:") == 1


@pytest.mark.slow_fault
def test_a_signal_to_one_worker_alone_stops_all_and_the_command_ends_with_75(launch: Launch) -> None:
    parent = launch("agree")
    pids = parent.until_ready(0, 1)
    os.kill(pids[1], signal.SIGTERM)
    done = parent.finish()
    assert done.code == 75, done.err
    assert done.err.count("step 3 is saved") == 1


@pytest.mark.slow_fault
def test_torchruns_own_restarts_work_and_its_workers_say_their_rank(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "worker.py"), "killed", str(tmp_path)],
        env={**environment, "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts-0").read_text() == (tmp_path / "starts-1").read_text() == "0\n1\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def machines(launch: Launch, behaviour: str, **variables: str) -> list[Parent]:
    """Two parents that meet as two machines would, a worker each."""
    meeting = {"processes": 1, "nodes": 2, "rendezvous": f"127.0.0.1:{free_port()}"}
    return [launch(behaviour, f"machine-{number}", variables, **meeting) for number in (0, 1)]


def ready(parents: list[Parent]) -> dict[int, int]:
    """For each rank its process, once both are ready, whichever machine it came to be on."""
    files = {rank: [parent.folder / f"ready-{rank}" for parent in parents] for rank in (0, 1)}
    wait_until(lambda: all(any(f.exists() for f in both) for both in files.values()), "both ready")
    return {rank: next(i for i, file in enumerate(both) if file.exists()) for rank, both in files.items()}


@pytest.mark.slow_fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_for_another_machine_can_be_left(launch: Launch, number: signal.Signals) -> None:
    port = free_port()
    parent = launch("done", processes=1, nodes=2, rendezvous=f"127.0.0.1:{port}")

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, "listening")
    parent.send(number)
    done = parent.finish()
    assert (done.code, done.err) == (130, "stopped: there was nothing to save\n")


@pytest.mark.slow_fault
def test_two_machines_stop_together(launch: Launch) -> None:
    parents = machines(launch, "agree")
    ready(parents)
    parents[1].send(signal.SIGTERM)
    ended = [parent.finish() for parent in parents]
    assert [done.code for done in ended] == [75, 75], ended


@pytest.mark.slow_fault
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_command_on_one_machine_ends_the_other(launch: Launch, rank: int) -> None:
    parents = machines(launch, "agree")
    at = ready(parents)[rank]
    pid = int((parents[at].folder / f"ready-{rank}").read_text())
    os.kill(parents[at].process.pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    done = parents[1 - at].finish()
    assert done.code == 1, done
    assert done.err.count("error:") == 1
    assert not is_running(pid)


@pytest.mark.slow_fault
def test_each_machine_says_the_error_of_one_with_its_code(launch: Launch) -> None:
    ended = [parent.finish() for parent in machines(launch, "typed")]
    assert [done.code for done in ended] == [3, 3], ended
    assert {done.err.splitlines()[0] for done in ended} == {"error: process 1 of 2: a.jsonl:7: row 7 is no text"}


@pytest.mark.slow_fault
def test_two_machines_start_again_together_after_a_kill_on_one(launch: Launch) -> None:
    parents = machines(launch, "killed", GPTCLI_MAX_RESTARTS="1")
    ended = [parent.finish() for parent in parents]
    assert [done.code for done in ended] == [0, 0], "\n".join(done.err for done in ended)


@pytest.mark.slow_fault
def test_one_process_a_machine_starts_the_machines_own(launch: Launch) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    parents = [
        launch("done", f"machine-{rank}", {**slurm, **meeting, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)})
        for rank in (0, 1)
    ]
    assert [parent.finish().code for parent in parents] == [0, 0]
    places = [(parents[rank // 2].folder / f"ready-{rank}").read_text().split()[:3] for rank in range(4)]
    assert places == [[str(rank), "4", str(rank % 2)] for rank in range(4)]
