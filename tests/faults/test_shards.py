"""Faults 21 and 22: prepared data that is damaged or replaced is found before a step, with code 3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gptcli.data.encode import Encoded
from gptcli.data.shards import Shards
from tests.conftest import Cli, Finished, make_project
from tests.shards import write_side

# Some 1.2 M tokens of two bytes in shards of 1.1 MB: a file of tokens has two blocks of checksums.
# The run has more steps than it has time for: it saves and stops with code 75 whenever its second is over.
RECIPE = (
    *("data.validation=0", "tokenize.shard_tokens=550000", "generate.prompts=[]"),
    *("train.max_steps=1M", "train.max_time=1s", "train.save_every=1M", "train.log_every=1K"),
)


@dataclass(frozen=True)
class Project:
    """A project whose data is prepared and whose run has stopped half-way."""

    folder: Path
    cache: Path
    cli: Cli

    @property
    def data(self) -> Path:
        """The folder of the prepared data."""
        (only,) = (self.cache / "data").iterdir()
        return only

    def shard(self, index: int) -> Path:
        return self.data / "train" / f"source-000-shard-{index:05}.tokens.npy"

    def pretrain(self, *arguments: str) -> Finished:
        # Wide enough that no path is broken into lines.
        variables = {"GPTCLI_CACHE": str(self.cache), "COLUMNS": "1000"}
        return self.cli("pretrain", "tiny.yaml", *RECIPE, *arguments, cwd=self.folder, **variables)

    def run_files(self) -> dict[str, bytes]:
        """All that the run has written."""
        run = self.folder / "runs" / "tiny"
        found = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(run)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, run_cli: Cli) -> Project:
    """A run that its time limit has stopped half-way."""
    folder = make_project(tmp_path_factory.mktemp("stopped"))
    lines = [f"The {index}th line has {index * index} and {index % 97} in it." for index in range(32_000)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    project = Project(folder, tmp_path_factory.mktemp("stopped-cache"), run_cli)
    done = project.pretrain()
    assert done.code == 75, done.err
    assert any("checkpoint-" in name for name in project.run_files())
    return project


@pytest.fixture
def intact(stopped: Project, tmp_path: Path) -> Iterator[Project]:
    """The project, whose prepared data and run are put back after the test."""
    for name, folder in (("cache", stopped.cache), ("folder", stopped.folder)):
        shutil.copytree(folder, tmp_path / name)
    yield stopped
    for name, folder in (("cache", stopped.cache), ("folder", stopped.folder)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / name, folder)


def assert_refused(done: Finished, code: int, *said: str) -> None:
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 8
    for each in said:
        assert each in done.err


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[(1 << 20) + 1000] ^= 1
    path.write_bytes(data)


def _text(path: Path) -> None:
    path.write_text("This is no shard.\n" * 1000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "has 1,100,028 bytes, not 1,100,128"),
        (_flip, "bytes 1,048,576 to 1,100,128 are not what was written"),
        pytest.param(_text, "is not a shard", marks=pytest.mark.slow_fault),
        pytest.param(Path.unlink, "is missing", marks=pytest.mark.slow_fault),
    ],
    ids=["truncated", "flipped", "not a shard", "missing"],
)
def test_a_damaged_shard_is_found_before_the_first_step(
    intact: Project, damage: Callable[[Path], object], said: str
) -> None:
    shutil.rmtree(intact.folder / "runs")
    damage(intact.shard(1))
    done = intact.pretrain()
    assert_refused(done, 3, f"{intact.shard(1)}: {said}", f"rm -r {intact.data}")
    assert not (intact.folder / "runs" / "tiny").exists()


@pytest.mark.slow_fault
def test_shards_swapped_before_a_resume_are_found_and_nothing_is_trained(intact: Project) -> None:
    before = intact.run_files()
    aside = intact.folder / "aside"
    intact.shard(0).rename(aside)
    intact.shard(1).rename(intact.shard(0))
    aside.rename(intact.shard(1))
    done = intact.pretrain()
    assert_refused(done, 3, f"{intact.shard(0)}: bytes 0 to 1,048,576 are not what was written (2 of its 2")
    assert intact.run_files() == before


def replace_prepared(data: Path) -> None:
    """Write the documents anew in another order: every file fits its manifest, under the same key."""
    folder = data / "train"
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = np.concatenate(Shards.open(folder).streams[0].shards)
    shutil.rmtree(folder)
    about = {key: manifest[key] for key in ("tokenizer", "vocab_size", "specials", "recipe")}
    one = Encoded(np.roll(tokens, 1000), np.array([len(tokens)]), np.array([manifest["bytes"]]))
    write_side(folder, tokens.dtype, 550_000, [(manifest["sources"][0]["name"], [one])], **about)


@pytest.mark.slow_fault
def test_prepared_data_replaced_before_a_resume_is_refused_with_both_ways_on(intact: Project) -> None:
    before = intact.run_files()
    replace_prepared(intact.data)
    done = intact.pretrain()
    assert_refused(
        done, 3, "the data's fingerprint is", "and that of checkpoint-", f"rm -r {intact.data}", "--allow-changes data"
    )
    assert intact.run_files() == before
    allowed = intact.pretrain("--allow-changes", "data")
    assert allowed.code == 75, allowed.err
    assert "resuming tiny from checkpoint-" in allowed.out


@pytest.mark.slow_fault
def test_deleting_replaced_data_as_the_message_says_lets_the_run_go_on(intact: Project) -> None:
    replace_prepared(intact.data)
    shutil.rmtree(intact.data)
    done = intact.pretrain()
    assert done.code == 75, done.err
    assert "resuming tiny from checkpoint-" in done.out


@pytest.mark.slow_fault
def test_sources_that_changed_before_a_resume_are_refused_as_a_changed_data_set(intact: Project) -> None:
    before = intact.run_files()
    with (intact.folder / "text.txt").open("a") as file:
        file.write("\nOne more line.")
    assert_refused(
        intact.pretrain(), 4, "data: the content is not what this run was trained on", "--allow-changes data"
    )
    assert intact.run_files() == before
