"""One command as several processes of a group, each forked as torchrun would start it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Finished
from tests.runs import Forks, Started


@dataclass(frozen=True)
class Team:
    """The processes of a run, by rank."""

    members: tuple[Started, ...]

    def finish(self) -> list[Finished]:
        """Wait for the end of all."""
        return [member.finish() for member in self.members]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(
    forks: Forks, processes: int, *arguments: str, cwd: Path, faults: dict[int, dict[str, Any]] | None = None
) -> Team:
    """Start `gptcli` with so many processes; `faults` are what is to happen to some of them."""
    port = str(free_port())
    variables = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    members = [
        forks.start(
            *arguments,
            cwd=cwd,
            fault=(faults or {}).get(rank),
            **variables,
            MASTER_PORT=port,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(processes)
    ]
    return Team(tuple(members))


def run(forks: Forks, processes: int, *arguments: str, cwd: Path) -> Finished:
    """Run `gptcli` with so many processes to its end, which has to be a good one: what rank 0 said."""
    first, *others = start(forks, processes, *arguments, cwd=cwd).finish()
    assert first.code == 0, first.err + "".join(other.err for other in others)
    assert [(other.code, other.out) for other in others] == [(0, "")] * len(others), "only rank 0 talks"
    return first
