"""What tests of faults share: one finished run, and processes that have imported everything, which fork commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests import team
from tests.conftest import Cli, make_project
from tests.pairs import Pair
from tests.runs import Bench, Disk, Forks
from tests.warm import Warm

DISKS = count()
# Dropout, so that a lost random state shows; numbers of checkpoints whose order by name is another (6, 9, 12).
CHANGES = {
    "num_attention_heads: 2}": "num_attention_heads: 2, attention_dropout: 0.1}",
    "max_steps: 8": "max_steps: 12",
    "log_every: 2": "log_every: 1",
    "eval_every: 4": "eval_every: 6",
    "save_every: 4": "save_every: 3",
    "sample_every: 4": "sample_every: 6",
}


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, run_cli: Cli, forks: Forks) -> Bench:
    """A project whose run `tiny` was made by the plain command and never disturbed."""
    folder = make_project(tmp_path_factory.mktemp("bench"))
    recipe = (folder / "tiny.yaml").read_text()
    for old, new in CHANGES.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (folder / "tiny.yaml").write_text(recipe)
    done = run_cli("pretrain", "tiny.yaml", cwd=folder)
    assert done.code == 0, done.err
    return Bench(folder, folder / "runs" / "tiny", forks)


@pytest.fixture(scope="session")
def pair(bench: Bench) -> Pair:
    """The run of `bench` on two processes."""
    done = team.run(bench.forks, 2, "pretrain", "tiny.yaml", "name=pair", cwd=bench.folder)
    said = done.out.splitlines()
    return Pair(bench, bench.run("pair"), said[: next(n for n, line in enumerate(said) if line.startswith("step "))])


@pytest.fixture
def disk(bench: Bench) -> Iterator[Disk]:
    """Mount a small disk of memory; the test is skipped where that is not allowed."""
    with ExitStack() as undo:

        def mount(options: str) -> Path:
            folder = bench.folder / f"disk-{next(DISKS)}"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                pytest.skip(f"needs to mount a small disk: {error}")
            if done.returncode:
                pytest.skip(f"needs to mount a small disk: {done.stderr.strip()}")
            undo.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            return folder

        yield mount


@pytest.fixture(scope="session")
def warm(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Commands that need torch, at a tenth of a second each."""
    if sys.platform != "linux":
        pytest.skip("only Linux holds a process to RLIMIT_AS")
    # transformers copies code that it was allowed to run into its own cache.
    home = str(tmp_path_factory.mktemp("huggingface"))
    with Warm({**environment, "HF_HOME": home}, tmp_path_factory.mktemp("warm")) as warm:
        yield warm


@pytest.fixture(scope="session")
def cold(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Commands that end before anything heavy is imported, and tell whether that is so."""
    if sys.platform != "linux":
        pytest.skip("only Linux holds a process to RLIMIT_AS")
    light = ("gptcli.recipe.load", "gptcli.recipe.availability", "ruamel.yaml", "rich.table", "gptcli.runs.summary")
    commands = ("gptcli.cli.pretrain", "gptcli.cli.tokenize", "gptcli.cli.recipes", "gptcli.cli.runs")
    with Warm(environment, tmp_path_factory.mktemp("cold"), (*light, *commands)) as cold:
        yield cold
