"""What tests share: the command line as a subprocess, a small recipe, and the shared data when it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.runs import Forks

REPOSITORY = Path(__file__).parent.parent

TINY_RECIPE = """\
name: tiny
tokenizer: {train: {algorithm: bytes}}
data:
  train: {path: text.txt, documents: blank-line}
  validation: {tail: 10%}
  sequence_length: 32
model:
  type: llama
  config: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}
train:
  max_steps: 8
  global_batch_size: 4
  learning_rate: 3e-3
  log_every: 2
  eval_every: 4
  save_every: 4
  sample_every: 4
  precision: fp32
generate: {prompts: ["The "], max_new_tokens: 8}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-recipes", action="store_true", help="smoke every recipe, not one of each folder")
    parser.addoption("--all-faults", action="store_true", help="faults at full length, and those that are slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow_fault: is run with --all-faults only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-faults"):
        for item in items:
            if item.get_closest_marker("slow_fault"):
                item.add_marker(pytest.mark.skip(reason="slow: make faults, make distributed"))


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)


Cli = Callable[..., Finished]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this test process, so that no test reads or writes the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def environment(cache: Path) -> dict[str, str]:
    """The environment of a command: offline, its own cache, one thread."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("GPTCLI_", "HF_"))},
        "GPTCLI_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GPTCLI_CACHE", str(cache))
    monkeypatch.delenv("GPTCLI_RUNS", raising=False)
    yield


@pytest.fixture(scope="session")
def run_cli(environment: dict[str, str], forks: Forks) -> Cli:
    """Run `gptcli` as a user would, in another process.

    It is a fork of one that has imported torch already, at a tenth of the price, unless `variables` are given, which an
    import may look at, or it is to be `cold`.
    """

    def run(*arguments: str, cwd: Path, stdin: str = "", cold: bool = False, **variables: str) -> Finished:
        if not cold and variables.keys() <= {"COLUMNS"}:
            return forks(*arguments, cwd=cwd, stdin=stdin, **{"COLUMNS": environment["COLUMNS"], **variables})
        done = subprocess.run(
            [sys.executable, "-m", "gptcli", *arguments],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            env={**environment, **variables},
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Forks]:
    """Processes that have imported everything, which fork commands."""
    from tests.runs import forking

    with forking(tmp_path_factory.mktemp("forks"), {**environment, "COLUMNS": "1000"}) as found:
        yield found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a text and a small recipe of it."""
    return make_project(tmp_path)


def make_project(folder: Path) -> Path:
    """Write text.txt (about 20 KB of distinct sentences) and tiny.yaml into a folder."""
    nouns = ("model", "token", "shard", "recipe", "step", "loss", "row", "batch")
    verbs = ("reads", "writes", "keeps", "checks", "counts", "moves")
    lines = [
        f"The {nouns[i % 8]} {verbs[i % 6]} {i} {nouns[(i * 5 + 3) % 8]}s and {verbs[(i // 7) % 6]} them."
        for i in range(400)
    ]
    paragraphs = [" ".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder


def shared_data(name: str) -> Path:
    """A file of the shared data sets, which lie beside a checkout; skips the test when they are not there."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not here: the shared data sets lie beside a checkout, in ../shared/data")
    return path
