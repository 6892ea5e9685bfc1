"""A run of two processes, and others beside it with faults in one of them.

The processes are the real command as torchrun would start it (tests/team.py), forked so that a fault is exact; or
started by the command itself (`launch.processes=2`), with faults that come through the environment.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import team
from tests.conftest import REPOSITORY, Finished
from tests.distributed.groups import wait_until
from tests.runs import SAVE, Bench, Started, assert_same

# Where rank 0 is when something happens to one of them. The other one is in the same step, or waits for it there.
STEP = {"at": r"os\.rename .*/checkpoint-3$", "then": 2}  # step 4, before the line of the log
VALIDATION = {"at": r"open .*/samples\.jsonl", "then": 1}  # step 6, before the line of the log; then comes validation
SAVING = {"at": SAVE, "then": 8}
TOKENS = {"at": r"os\.rename .*/cache\d+/", "then": 0}  # rank 0 prepares data that nobody has prepared
UNREADABLE = {"at": r"open .*\.tokens\.npy", "do": "error", "reading": True}
# More rows at once than a process holds that may have little more memory.
LARGE = (
    *("data.sequence_length=256", "data.validation=0", "train.global_batch_size=128", "train.micro_batch_size=64"),
    *("model.config={num_hidden_layers: 4, hidden_size: 64, num_attention_heads: 4}", "train.max_steps=1"),
)


@dataclass(frozen=True)
class Pair:
    """A run of two processes that was never disturbed, and commands on others beside it."""

    bench: Bench
    undisturbed: Path
    began: list[str]  # what it said before its first step

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.bench.run(name)

    def start(self, name: str, *arguments: str, faults: dict[int, dict[str, Any]] | None = None) -> team.Team:
        """Start two processes, with what is to happen to each of them."""
        return team.start(
            self.bench.forks,
            2,
            "pretrain",
            "tiny.yaml",
            f"name={name}",
            *arguments,
            cwd=self.bench.folder,
            faults=faults,
        )

    def pretrain(self, name: str, *arguments: str, faults: dict[int, dict[str, Any]] | None = None) -> list[Finished]:
        """Run two processes to their end."""
        return self.start(name, *arguments, faults=faults).finish()

    def resume_to_the_same(self, name: str, *arguments: str) -> Finished:
        """Go on with two processes to the end, which has to be that of the undisturbed two."""
        first, other = self.pretrain(name, *arguments)
        assert (first.code, other.code) == (0, 0), first.err + other.err
        assert_same(self.run(name), self.undisturbed)
        return first

    def launching(self, name: str, *arguments: str) -> list[str]:
        """The command that starts its two processes itself."""
        return ["pretrain", "tiny.yaml", f"name={name}", "launch.processes=2", *arguments]

    def launched(self, name: str, *arguments: str, faults: dict[int, dict[str, Any]] | None = None) -> Started:
        """Start it, with what is to happen to its workers."""
        command = self.launching(name, *arguments)
        return self.bench.forks.start(*command, cwd=self.bench.folder, **faulty(faults))


def faulty(faults: dict[int, dict[str, Any]] | None) -> dict[str, str]:
    """The environment that brings faults to workers, by their rank."""
    path = os.pathsep.join((str(Path(__file__).parent / "faults" / "faulty"), str(REPOSITORY)))
    return {"PYTHONPATH": path, "GPTCLI_FAULTS": json.dumps(faults or {})}


def workers(pid: int) -> list[int]:
    """The processes of the workers that a command has started, by rank."""
    found: dict[bytes, int] = {}

    def look() -> bool:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found.update({value: int(child) for value in variables if value.startswith(b"RANK=")})
        return len(found) == 2

    wait_until(look, "started")
    return [found[b"RANK=0"], found[b"RANK=1"]]


def until_stopped(pid: int) -> None:
    """Wait until the fault of a worker has stopped it."""
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "stopped")


def until_signalled(pid: int, number: int) -> None:
    """Wait until a stopped process has a signal to look at."""

    def look() -> bool:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return bool(int(rows["ShdPnd"], 16) >> (number - 1) & 1)

    wait_until(look, "signalled")


def codes(ended: list[Finished]) -> list[int]:
    """The exit codes, of processes that had nothing unexpected to say."""
    assert not [done.err for done in ended if "Traceback" in done.err or "unexpected" in done.err]
    return [done.code for done in ended]
