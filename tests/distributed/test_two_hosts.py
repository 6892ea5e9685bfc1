"""One recipe on two hosts: network namespaces that a virtual cable joins, each with a name that the other cannot reach.

What is run is what a user runs; a host is killed, or the cable pulled, and both go on to the result of one process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Finished
from tests.distributed.groups import wait_until
from tests.distributed.test_equal import assert_equal, train_alone
from tests.runs import Forks, Started

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has network namespaces"),
    pytest.mark.timeout(400),
]
ADDRESSES = ("10.77.113.1", "10.77.113.2")
MEETING = "10.77.113.1:29400"  # free: nobody else is in the namespace
# Each is 127.0.1.1 to itself, as Debian's installer leaves it; the last line is what a name server would tell.
ETC_HOSTS = "127.0.0.1 localhost\n127.0.1.1 {own}\n{its_address} {its}\n{own_address} {own}.example\n"
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
TORCHRUN = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
# Far longer than a step of this model on a busy machine, and the test waits for it.
SILENCE = "8"


@dataclass
class Command:
    """A command that runs on a host."""

    process: subprocess.Popen[str]

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def finish(self) -> Finished:
        out, err = self.process.communicate(timeout=60)
        return Finished(self.process.returncode, out, err)


@dataclass
class Hosts:
    """Two network namespaces, and the environment of the commands in them."""

    folder: Path
    environment: dict[str, str]
    names: tuple[str, str] = (f"gptcli-{os.getpid()}-0", f"gptcli-{os.getpid()}-1")
    started: list[Command] = field(default_factory=list)

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            self.names[1],
        )
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            own, its = f"host-{number}", f"host-{1 - number}"
            text = ETC_HOSTS.format(own=own, its=its, own_address=address, its_address=ADDRESSES[1 - number])
            (self.folder / own).write_text(text)
        self.plug_in()

    def plug_in(self) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "route", "replace", "default", "dev", "cable")

    def pull_the_cable(self) -> None:
        ip("-n", self.names[0], "link", "set", "cable", "down")

    def start(self, number: int, *arguments: str, cwd: Path, **variables: str) -> Command:
        """Start `python -m` on a host."""
        entering = ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "sh", "-c", ENTER, "sh"]
        own = f"host-{number}"
        process = subprocess.Popen(
            [*entering, str(self.folder / own), own, sys.executable, "-m", *arguments],
            cwd=cwd,
            env={**self.environment, "PYTHONPATH": str(REPOSITORY), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(Command(process))
        return self.started[-1]

    def start_both(self, *arguments: str, cwd: Path, **variables: str) -> list[Command]:
        return [self.start(number, *arguments, cwd=cwd, **variables) for number in (0, 1)]

    def end_all(self) -> None:
        for name in self.names:
            for pid in ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for command in self.started:
            command.process.communicate()
        self.started.clear()

    def remove(self) -> None:
        existing = [line.split()[0] for line in ip("netns", "list").splitlines()]
        for name in set(self.names) & set(existing):
            ip("netns", "delete", name)  # the cable goes with it


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), environment)
    try:
        try:
            hosts.make()
        except OSError as error:
            pytest.skip(f"needs two network namespaces: {error}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs two network namespaces: {error.stderr.strip()}")
        yield hosts
    finally:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            hosts.remove()


@pytest.fixture
def hosts(made: Hosts) -> Iterator[Hosts]:
    yield made
    made.end_all()
    made.plug_in()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A run of one process, of some sixty steps, with a checkpoint every ten."""
    return train_alone("llama", tmp_path_factory, forks, EPOCHS="1")


def finish_well(commands: list[Command]) -> None:
    ended = [command.finish() for command in commands]
    assert [done.code for done in ended] == [0, 0], "\n".join(done.err for done in ended)


@pytest.mark.slow_fault
def test_workers_on_two_hosts_end_as_one_process(made: Hosts, alone: Path, forks: Forks) -> None:
    """Two tasks, as srun starts them: the name of either host leads nowhere but to itself."""
    run = alone.with_name("tasks")
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    tasks: list[Started] = [
        forks.start(
            *("pretrain", "r.yaml", f"name={run.name}"),
            cwd=alone.parent.parent,
            namespace=made.names[number],
            **slurm,
            SLURM_PROCID=str(number),
            SLURM_NODEID=str(number),
            MASTER_ADDR=ADDRESSES[0],
        )
        for number in (0, 1)
    ]
    ended = [task.finish() for task in tasks]
    assert [done.code for done in ended] == [0, 0], "\n".join(done.err for done in ended)
    assert_equal(run, alone)


@pytest.mark.slow_fault
def test_the_same_command_on_two_hosts_ends_as_one_process(hosts: Hosts, alone: Path) -> None:
    run = alone.with_name("commands")
    command = ("gptcli", "pretrain", "r.yaml", f"name={run.name}", "launch.nodes=2", "launch.rendezvous=host-0:29400")
    finish_well(hosts.start_both(*command, cwd=alone.parent.parent))
    assert_equal(run, alone)


@pytest.mark.slow_fault
def test_torchrun_on_two_hosts_ends_as_one_process(hosts: Hosts, alone: Path) -> None:
    run = alone.with_name("torchrun")
    endpoint = ("--rdzv-endpoint", "host-0:29400")
    finish_well(
        hosts.start_both(
            *(*TORCHRUN, *endpoint, "-m", "gptcli", "pretrain", "r.yaml", f"name={run.name}"), cwd=alone.parent.parent
        )
    )
    assert_equal(run, alone)


@pytest.mark.slow_fault
@pytest.mark.parametrize(("what", "at"), [("worker", 0), ("worker", 1), ("command", 0), ("command", 1), ("cable", 0)])
def test_both_hosts_end_when_one_is_lost_and_go_on_to_the_same_result(
    hosts: Hosts, alone: Path, what: str, at: int
) -> None:
    run = alone.with_name(f"{what}-{at}")
    command = ("gptcli", "pretrain", "r.yaml", f"name={run.name}", "launch.nodes=2", f"launch.rendezvous={MEETING}")
    commands = hosts.start_both(*command, cwd=alone.parent.parent, GPTCLI_STEP_TIMEOUT=SILENCE)
    wait_until((run / "checkpoint-10").exists, "at the first checkpoint")
    lost, other = commands[at], commands[1 - at]
    if what == "cable":
        hosts.pull_the_cable()
    else:
        workers = lost.workers()
        if what == "command":
            os.kill(lost.process.pid, signal.SIGKILL)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    codes = {"worker": (6, 6), "command": (-signal.SIGKILL, 1), "cable": (1, 1)}[what]
    ended = [done.finish() for done in (lost, other)]
    assert tuple(done.code for done in ended) == codes, ended
    for done in ended:
        if done.code > 0:
            assert done.err.count("error:") == 1 and "Traceback" not in done.err and "frame #" not in done.err
    assert not (run / "final").exists()
    hosts.plug_in()
    finish_well(hosts.start_both(*command, cwd=alone.parent.parent))
    assert_equal(run, alone)
