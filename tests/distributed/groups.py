"""Starting a parent with its workers, and knowing where they are by the files that worker.py leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Finished

HERE = Path(__file__).parent
PATIENCE = 90.0


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"not {what} within {PATIENCE:.0f} s"
        time.sleep(0.02)


@dataclass
class Parent:
    """A launching command that runs, with a process group of its own as a shell gives to it."""

    folder: Path
    process: subprocess.Popen[str]

    def until_ready(self, *ranks: int) -> list[int]:
        """Wait for workers; their process ids."""
        files = [self.folder / f"ready-{rank}" for rank in ranks]
        wait_until(lambda: all(f.exists() and f.read_text().endswith("\n") for f in files), f"ready: {ranks}")
        return [int(file.read_text()) for file in files]

    def until_signalled(self, *ranks: int) -> None:
        wait_until(lambda: all(self.signals(rank) for rank in ranks), f"signalled: {ranks}")

    def signals(self, rank: int) -> list[str]:
        """The signals that a worker got."""
        file = self.folder / f"signals-{rank}"
        return file.read_text().split() if file.exists() else []

    def send(self, number: int) -> None:
        """What Ctrl+C in a terminal does: a signal to the whole process group."""
        os.killpg(self.process.pid, number)

    def finish(self) -> Finished:
        out, err = self.process.communicate(timeout=PATIENCE)
        return Finished(self.process.returncode, out, err)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def start(behaviour: str, folder: Path, environment: dict[str, str], options: dict[str, Any] | None = None) -> Parent:
    """Start `launch` with workers that behave so; two on this machine unless `options` say otherwise."""
    folder.mkdir(exist_ok=True)
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "parent.py"),
            json.dumps({"processes": 2, **(options or {})}),
            behaviour,
            str(folder),
        ],
        env={**environment, "TMPDIR": str(temporary), "PYTHONPATH": str(HERE.parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Parent(folder, process)
