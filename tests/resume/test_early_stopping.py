"""Early stopping: the best weights are the result, and a resume stops where an undisturbed run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.conftest import Cli, make_project

# One line over and over is learnt, and another text is understood less and less.
RECIPE = (
    *("data.validation={path: other.txt}", "train.lr_scheduler=constant", "train.warmup=0", "generate.prompts=[]"),
    *("train.max_steps=60", "train.learning_rate=1e-2", "train.eval_every=2", "train.save_every=10"),
    *("train.save_total_limit=1", "train.early_stopping_patience=4", "train.sample_every=0"),
)


def overfitting(folder: Path) -> Path:
    make_project(folder)
    (folder / "other.txt").write_text("Quite unlike: 0123456789 GHIJKLMNOP vwxyz; [brackets] {braces} @#!? " * 20)
    (folder / "text.txt").write_text("the same line again and again and again\n" * 300)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, run_cli: Cli) -> Path:
    folder = overfitting(tmp_path_factory.mktemp("early"))
    done = run_cli("pretrain", "tiny.yaml", *RECIPE, "--json", cwd=folder)
    assert done.code == 0, done.err
    (folder / "result.json").write_text(done.out)
    return folder / "runs" / "tiny"


def validations(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation"]["loss"] for line in lines if "validation" in line}


def test_training_stops_after_the_patience_and_the_best_weights_are_final(stopped: Path, run_cli: Cli) -> None:
    found = validations(stopped)
    best = min(found, key=lambda step: found[step])
    last = max(found)
    assert 2 < best < last < 60
    assert last == best + 2 * 4
    result = json.loads((stopped.parent.parent / "result.json").read_text())
    assert (result["status"], result["step"], result["best_step"]) == ("done", last, best)
    assert result["validation"]["loss"] == found[best]
    # One checkpoint is kept by its age, and the best one.
    assert {path.name for path in stopped.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{last}"}
    final, kept = (
        load_file(folder / "model.safetensors") for folder in (stopped / "final", stopped / f"checkpoint-{best}")
    )
    assert all((final[name] == kept[name]).all() for name in kept)
    assert not (stopped / "final" / "optimizer.pt").exists()
    done = run_cli("eval", str(stopped / "final"), "--data", "other.txt", "--json", cwd=stopped.parent.parent)
    assert done.json()["loss"] == pytest.approx(found[best], rel=1e-5)


@pytest.mark.slow_fault
def test_a_run_that_stopped_early_is_finished_unless_the_patience_grows(stopped: Path, run_cli: Cli) -> None:
    folder = stopped.parent.parent
    again = run_cli("pretrain", "tiny.yaml", *RECIPE, cwd=folder)
    assert again.code == 0
    assert "is finished" in again.out
    before = validations(stopped)
    more = (*RECIPE, "train.early_stopping_patience=6", "--allow-changes", "train.early_stopping_patience")
    done = run_cli("pretrain", "tiny.yaml", *more, cwd=folder)
    assert done.code == 0, done.err
    after = validations(stopped)
    assert max(after) == max(before) + 2 * 2
    assert {step: after[step] for step in before} == before


@pytest.mark.slow_fault
def test_the_patience_is_counted_on_over_a_resume(tmp_path: Path, run_cli: Cli) -> None:
    folder = overfitting(tmp_path)
    whole = run_cli("pretrain", "tiny.yaml", *RECIPE, "name=whole", "--json", cwd=folder).json()
    halfway = whole["step"] - 2
    assert run_cli("pretrain", "tiny.yaml", *RECIPE, "name=parts", f"train.max_steps={halfway}", cwd=folder).code == 0
    done = run_cli("pretrain", "tiny.yaml", *RECIPE, "name=parts", "--json", cwd=folder)
    assert done.code == 0, done.err
    for key in ("step", "best_step", "validation"):
        assert done.json()[key] == whole[key]


@pytest.mark.slow_fault
def test_a_run_killed_before_final_writes_the_best_without_training_on(tmp_path: Path, run_cli: Cli) -> None:
    folder = overfitting(tmp_path)
    first = run_cli("pretrain", "tiny.yaml", *RECIPE, "--json", cwd=folder).json()
    weights = (folder / "runs" / "tiny" / "final" / "model.safetensors").read_bytes()
    for path in (folder / "runs" / "tiny" / "final").iterdir():
        path.unlink()
    (folder / "runs" / "tiny" / "final").rmdir()
    done = run_cli("pretrain", "tiny.yaml", *RECIPE, "--json", cwd=folder)
    assert done.code == 0, done.err
    assert (folder / "runs" / "tiny" / "final" / "model.safetensors").read_bytes() == weights
    assert done.json()["step"] == first["step"]
