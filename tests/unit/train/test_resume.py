from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CheckpointError, DataError, UsageError
from gptcli.reporting import Silent
from gptcli.runs.folder import RunFolder
from gptcli.train.checkpoint import committing
from gptcli.train.resume import Start, check_unchanged, clear, decided_before, find_start, locked

RECIPE: dict[str, Any] = {
    "name": "x",
    "data": {"train": [{"path": "/a/text.txt"}], "sequence_length": 128},
    "train": {"max_steps": 100, "learning_rate": 0.003, "log_every": 10},
}
PRINTS = {"data": "d", "tokenizer": "t", "recipe": "r"}


def check(
    change: dict[str, Any], *, prints: dict[str, str] | None = None, steps: int = 100, allowed: tuple[str, ...] = ()
) -> list[str]:
    recipe = copy.deepcopy(RECIPE)
    for key, value in change.items():
        section, field = key.split(".")
        recipe[section][field] = value
    start = Start(Path("run/checkpoint-50"), {"step": 50, "steps": 100, "recipe": RECIPE, "fingerprints": PRINTS})
    return check_unchanged(
        start,
        recipe=recipe,
        fingerprints=prints or PRINTS,
        steps=steps,
        allowed=allowed,
        prepared=Path("cache/data/key"),
    )


def test_the_same_recipe_goes_on() -> None:
    assert check({}) == []


def test_a_changed_recipe_is_refused_with_the_difference_and_the_way_out() -> None:
    with pytest.raises(CheckpointError) as caught:
        check({"train.learning_rate": 0.001})
    text = "\n".join(caught.value.lines())
    assert "train.learning_rate: 0.003 -> 0.001" in text
    assert "--allow-changes train.learning_rate" in text
    assert caught.value.exit_code == 4


def test_harmless_changes_are_listed_and_go_on() -> None:
    assert check({"train.log_every": 20, "train.save_every": 5}) == [
        "train.log_every: 10 -> 20",
        "train.save_every: not set -> 5",
    ]


def test_what_was_decided_is_taken_but_for_a_micro_batch_that_the_recipe_changed() -> None:
    decided = {"train.precision": "bf16", "train.micro_batch_size": "4"}
    for written in ("auto", 8):
        recipe = {**RECIPE, "train": {**RECIPE["train"], "micro_batch_size": written}}
        start = Start(Path("run/checkpoint-50"), {"step": 50, "recipe": recipe, "decided": decided})
        assert decided_before(start, recipe) == decided
        recipe = {**RECIPE, "train": {**RECIPE["train"], "micro_batch_size": 2}}
        assert decided_before(start, recipe) == {"train.precision": "bf16"}
    assert decided_before(Start(None, {}), RECIPE) == {}


def test_a_longer_run_goes_on_and_a_shorter_one_does_not() -> None:
    assert check({"train.max_steps": 200}, steps=200) == ["train.max_steps: 100 -> 200"]
    with pytest.raises(CheckpointError):
        check({"train.max_steps": 80}, steps=80)


def test_allowed_changes_go_on() -> None:
    assert check({"train.learning_rate": 0.001}, allowed=("train.learning_rate",)) == [
        "train.learning_rate: 0.003 -> 0.001"
    ]
    assert check({"data.sequence_length": 64}, allowed=("data",)) == ["data.sequence_length: 128 -> 64"]


def test_data_that_moved_goes_on_and_data_that_changed_does_not() -> None:
    moved = {"data.train": [{"path": "/b/text.txt"}]}
    assert check(moved) == ["data.train.0.path: /a/text.txt -> /b/text.txt"]
    with pytest.raises(CheckpointError):
        check(moved, prints={**PRINTS, "data": "other"})
    with pytest.raises(CheckpointError) as caught:
        check({}, prints={**PRINTS, "data": "other"})
    assert "--allow-changes data" in str(caught.value.remedy)
    assert check({}, prints={**PRINTS, "data": "other"}, allowed=("data",)) == []


def test_prepared_data_that_was_replaced_is_told_from_sources_that_changed() -> None:
    prints = {**PRINTS, "prepared": "k"}
    start = Start(Path("run/checkpoint-50"), {"step": 50, "steps": 100, "recipe": RECIPE, "fingerprints": prints})

    def now(changed: dict[str, str], recipe: dict[str, Any] = RECIPE, allowed: tuple[str, ...] = ()) -> list[str]:
        found, folder = {**prints, **changed}, Path("cache/data/k")
        return check_unchanged(start, recipe=recipe, fingerprints=found, steps=100, allowed=allowed, prepared=folder)

    with pytest.raises(DataError, match="the data's fingerprint is other, and that of checkpoint-50 is d") as caught:
        now({"data": "other"})
    assert "rm -r cache/data/k" in str(caught.value.remedy) and "--allow-changes data" in str(caught.value.remedy)
    assert now({"data": "other"}, allowed=("data",)) == []
    for changed, recipe in (
        ({"data": "other", "prepared": "l"}, RECIPE),
        ({"data": "other"}, {**RECIPE, "train": {**RECIPE["train"], "learning_rate": 1.0}}),
    ):
        with pytest.raises(CheckpointError, match="not the recipe or the data"):
            now(changed, recipe)


def find(run: RunFolder, resume: str = "auto", overwrite: bool = False) -> Start:
    return find_start(run, resume=resume, overwrite=overwrite, reporter=Silent())


def used(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.update(status="stopped")
    with committing(run, 5, {"steps": 10}) as work:
        (work / "model.safetensors").write_bytes(b"x")
    return run


def test_a_new_folder_starts_from_nothing(tmp_path: Path) -> None:
    assert find(RunFolder(tmp_path / "new")).checkpoint is None


def test_auto_takes_the_newest_checkpoint(tmp_path: Path) -> None:
    start = find(used(tmp_path))
    assert start.step == 5


def test_never_refuses_a_used_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        find(used(tmp_path), resume="never")


def test_overwrite_starts_anew_and_empties_the_folder_only_when_told(tmp_path: Path) -> None:
    run = used(tmp_path)
    assert find(run, overwrite=True).checkpoint is None
    assert run.checkpoint(5).is_dir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run.path / "final").symlink_to(elsewhere)
    clear(run)
    assert list(run.path.iterdir()) == []
    assert elsewhere.is_dir(), "a link is removed, not what it leads to"


def test_overwrite_never_empties_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not a run"):
        find(RunFolder(tmp_path / "home"), overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_named_checkpoint_is_verified(tmp_path: Path) -> None:
    run = used(tmp_path)
    assert find(run, resume=str(run.checkpoint(5))).step == 5
    with pytest.raises(CheckpointError, match="no such folder"):
        find(run, resume=str(run.checkpoint(6)))


def test_a_second_run_in_one_folder_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    script = (
        "import sys; from pathlib import Path; from gptcli.runs.folder import RunFolder;"
        "from gptcli.train.resume import locked\n"
        "with locked(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"process {holder.pid}"), locked(run):
        pass
    holder.communicate("", timeout=30)
    with locked(run):
        assert (run.path / ".lock").read_text() == f"{os.getpid()}\n"


def test_another_tokenizer_is_refused_and_cannot_be_allowed() -> None:
    with pytest.raises(CheckpointError, match="not the tokenizer") as caught:
        check({}, prints={**PRINTS, "tokenizer": "other"}, allowed=("tokenizer", "data"))
    assert "--allow-changes" not in str(caught.value.remedy)
