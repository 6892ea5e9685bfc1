"""File jobs of `generate`, and what it means that one ends as if it had never been disturbed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Finished
from tests.runs import Forks, Started
from tests.tiny import save_model

PROMPTS = 40
SAVE_EVERY = 4
SETTINGS = ("--save-every", str(SAVE_EVERY), "--max-new-tokens", "6", "--seed", "1", "--precision", "fp32")


@dataclass(frozen=True)
class Jobs:
    """A folder with a tiny model and `in.jsonl`, and commands that complete it to outputs of any name."""

    folder: Path
    forks: Forks

    def output(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def partial(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl.partial"

    def arguments(self, name: str, *more: str, file: str = "in.jsonl") -> list[str]:
        return ["generate", "model", "--file", file, "--output", f"{name}.jsonl", *SETTINGS, *more]

    def start(self, name: str, *more: str, fault: dict[str, Any] | None = None, file: str = "in.jsonl") -> Started:
        return self.forks.start(*self.arguments(name, *more, file=file), cwd=self.folder, fault=fault)

    def run(self, name: str, *more: str, fault: dict[str, Any] | None = None, file: str = "in.jsonl") -> Finished:
        return self.start(name, *more, fault=fault, file=file).finish()

    def ends_the_same(self, name: str, *more: str) -> Finished:
        """Go on with a job to its end, which has to be that of the undisturbed one."""
        done = self.run(name, *more)
        assert done.code == 0, done.err
        assert self.output(name).read_bytes() == self.output("undisturbed").read_bytes()
        assert not self.partial(name).exists()
        return done


def rows() -> list[dict[str, Any]]:
    """Prompts of many lengths, some of them the same, among other columns."""
    words = "hello world, the cat sat on the mat. "
    return [
        {"id": n, "prompt": (words * 2)[: n * 7 % 50] + "世界" * (n % 3), "more": {"x": n / 2}} for n in range(PROMPTS)
    ]


def make_jobs(folder: Path, forks: Forks) -> Jobs:
    """A folder whose job `undisturbed` is finished."""
    save_model(folder / "model")
    (folder / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))
    jobs = Jobs(folder, forks)
    done = jobs.run("undisturbed")
    assert done.code == 0, done.err
    return jobs
