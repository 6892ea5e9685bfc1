"""Runs that are disturbed, and what it means that one ends the same as if it had never been."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from gptcli.train.checkpoint import verify
from tests.conftest import REPOSITORY, Finished

# Where the second save of a run of `Bench` begins, for a fault of tests/driver.py.
SAVE = r"os\.mkdir .*/\.checkpoint-6\.tmp-"
Disk = Callable[[str], Path]
TIMES = ("seconds", "tokens_per_second", "mfu", "memory")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_model(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all((mine[name] == theirs[name]).all() for name in mine)


def assert_same(run: Path, undisturbed: Path) -> None:
    """Log, texts, weights and the names of all files are those of the other run; each checkpoint is good."""
    assert lines(run) == lines(undisturbed)
    assert lines(run, "samples.jsonl") == lines(undisturbed, "samples.jsonl")
    assert_same_model(run / "final", undisturbed / "final")
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
    assert_all_good(run)


def assert_all_good(run: Path) -> list[int]:
    """Every checkpoint verifies; their steps."""
    found = sorted(run.glob("checkpoint-*"))
    assert {path.name: verify(path) for path in found} == {path.name: None for path in found}
    return sorted(int(path.name.partition("-")[2]) for path in found)


def truncate(path: Path) -> None:
    """Cut the last bytes off."""
    os.truncate(path, path.stat().st_size - 10)


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fill(folder: Path, room: int) -> Path:
    """Write a file that leaves `room` bytes of the disk."""
    path = folder / "filler"
    with path.open("wb") as file:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        os.posix_fallocate(file.fileno(), 0, free - room)
    assert os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize <= room
    return path


@dataclass
class Forks:
    """Commands as children of one process that has imported everything; see tests/driver.py."""

    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen[str]
    alive: set[int] = field(default_factory=set)
    _numbers: Iterator[int] = field(default_factory=count)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: str,
        cwd: Path,
        fault: dict[str, Any] | None = None,
        namespace: str | None = None,
        stdin: str = "",
        terminal: str | None = None,
        **variables: str,
    ) -> Started:
        """Start `gptcli`, with what is to happen to it, in a network namespace or a terminal if one is named."""
        number = next(self._numbers)
        given = self.folder / f"{number}.in"
        given.write_text(stdin)
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        pid = self._ask(
            {
                "arguments": arguments,
                "cwd": str(cwd),
                "environment": {**self.environment, **variables},
                "in": str(given),
                "out": str(out),
                "err": str(err),
                "fault": fault or {},
                "namespace": namespace,
                "terminal": terminal,
            }
        )
        self.alive.add(pid)
        return Started(self, pid, out, err)

    def __call__(
        self, *arguments: str, cwd: Path, fault: dict[str, Any] | None = None, stdin: str = "", **variables: str
    ) -> Finished:
        """Run `gptcli` to its end."""
        return self.start(*arguments, cwd=cwd, fault=fault, stdin=stdin, **variables).finish()

    def wait(self, pid: int, *, stopped: bool) -> int | None:
        code: int | None = self._ask({"wait": pid, "stopped": stopped})
        if code is not None:
            self.alive.discard(pid)
        return code


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    forks: Forks
    pid: int
    out: Path
    err: Path

    def send(self, *signals: signal.Signals) -> None:
        for number in signals:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.pid in self.forks.alive:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, however long; its exit code, or 0 if it was waited for before."""
        del timeout
        return (self.forks.wait(self.pid, stopped=False) or 0) if self.pid in self.forks.alive else 0

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def until_stopped(self) -> None:
        """Wait until its fault has stopped it (SIGSTOP)."""
        code = self.forks.wait(self.pid, stopped=True)
        assert code is None, f"it ended with {code}: {self.err.read_text()}"

    def finish(self) -> Finished:
        """Wait for its end; the code is negative when a signal ended it."""
        code = self.forks.wait(self.pid, stopped=False)
        assert code is not None
        return Finished(code, self.out.read_text(), self.err.read_text())


@contextlib.contextmanager
def forking(folder: Path, environment: dict[str, str]) -> Iterator[Forks]:
    """A `Forks`; what is still running in the end is killed."""
    paths = (str(REPOSITORY), environment.get("PYTHONPATH"))
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "driver.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    forks = Forks(folder, environment, process)
    try:
        yield forks
    finally:
        for pid in forks.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)


@dataclass(frozen=True)
class Bench:
    """A project, a run of it that was never disturbed, and commands on others of its runs."""

    folder: Path
    undisturbed: Path
    forks: Forks
    output: Path | None = None  # where its runs go, if not into runs/

    def run(self, name: str) -> Path:
        return (self.output or self.undisturbed.parent) / name

    def copy(self, name: str) -> Path:
        """A copy of the finished run under another name."""
        return Path(shutil.copytree(self.undisturbed, self.run(name)))

    def start(self, name: str, *arguments: str, fault: dict[str, Any] | None = None) -> Started:
        output = [] if self.output is None else [f"output_dir={self.output}"]
        settings = [f"name={name}", *output, *arguments]
        return self.forks.start("pretrain", "tiny.yaml", *settings, cwd=self.folder, fault=fault)

    def pretrain(self, name: str, *arguments: str, fault: dict[str, Any] | None = None) -> Finished:
        return self.start(name, *arguments, fault=fault).finish()

    def resume_to_the_same(self, name: str, *arguments: str) -> Finished:
        """Go on with a run to its end, which has to be that of the undisturbed one."""
        done = self.pretrain(name, *arguments)
        assert done.code == 0, done.err
        assert_same(self.run(name), self.undisturbed)
        return done

    def resume_to_the_same_weights(self, name: str, *arguments: str) -> Finished:
        """As `resume_to_the_same`, for a run that logs or saves at other steps."""
        done = self.pretrain(name, *arguments)
        assert done.code == 0, done.err
        assert_same_model(self.run(name) / "final", self.undisturbed / "final")
        assert_all_good(self.run(name))
        return done
