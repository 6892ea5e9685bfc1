"""Tasks at the evaluations of training: what `gptcli eval` measures, with training undisturbed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_project
from tests.runs import Forks, assert_same_model, lines

TASK = """\
eval:
  data: {path: rows.jsonl, text: prompt}
  references: answer
  metrics: [perplexity, accuracy, chrf, quality]
  labels: [reads, writes]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The folder of a run with a task, and of one without."""
    for package in ("sklearn", "sacrebleu"):
        pytest.importorskip(package, reason="the extra eval is not installed")
    folder = make_project(tmp_path_factory.mktemp("tasks"))
    rows = [{"prompt": f"The model {i}", "answer": ("reads", "writes")[i % 2]} for i in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text((folder / "tiny.yaml").read_text().replace("name: tiny", "name: task") + TASK)
    dropout = "model.config.attention_dropout=0.1"
    for recipe in ("tiny.yaml", "task.yaml"):
        done = forks("pretrain", recipe, dropout, "--json", cwd=folder)
        assert done.code == 0, done.err
    (folder / "result.json").write_text(done.out)
    assert "step 8  validation loss" in done.err and "  accuracy 0." in done.err
    return folder


def measured(run: Path) -> list[dict[str, Any]]:
    return [line["validation"] for line in lines(run) if "validation" in line]


def test_the_last_evaluation_is_that_of_gptcli_eval(trained: Path, forks: Forks) -> None:
    done = forks("eval", "runs/task/final", "task.yaml", "--json", cwd=trained)
    assert done.code == 0, done.err
    last = measured(trained / "runs" / "task")[-1]
    assert done.out.count("\n") == 1 and json.loads(done.out)["metrics"] == last["metrics"]
    assert last["metrics"]["confusion_matrix"]["labels"] == ["reads", "writes"]
    result = json.loads((trained / "result.json").read_text())
    assert result["validation"] == {key: last[key] for key in ("loss", "bits_per_byte", "metrics")}
    assert "| accuracy |" in (trained / "runs" / "task" / "final" / "README.md").read_text()


def test_training_is_that_of_a_run_without_tasks(trained: Path) -> None:
    with_tasks, without = trained / "runs" / "task", trained / "runs" / "tiny"
    assert_same_model(with_tasks / "final", without / "final")
    assert [{**each, "metrics": None} for each in measured(without)] == [
        {**each, "metrics": None} for each in measured(with_tasks)
    ]
    assert lines(with_tasks, "samples.jsonl") == lines(without, "samples.jsonl")


def test_a_resume_ends_as_the_undisturbed_run(trained: Path, forks: Forks) -> None:
    run = trained / "runs" / "parts"
    shutil.copytree(trained / "runs" / "task", run)
    for name in ("final", "checkpoint-8"):
        shutil.rmtree(run / name)
    done = forks("pretrain", "task.yaml", "name=parts", "model.config.attention_dropout=0.1", cwd=trained)
    assert done.code == 0, done.err
    assert lines(run) == lines(trained / "runs" / "task")
    assert_same_model(run / "final", trained / "runs" / "task" / "final")


def test_early_stopping_by_a_task_keeps_the_first_of_equals(trained: Path, forks: Forks) -> None:
    settings = ("train.learning_rate=1e-12", "train.eval_every=1", "train.early_stopping_patience=2")
    stop = (*settings, "train.best_metric=validation.accuracy", "train.sample_every=0", "data.validation=0")
    done = forks("pretrain", "task.yaml", "name=early", *stop, "--json", cwd=trained)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["step"], result["best_step"]) == (3, 1)
    assert result["validation"]["loss"] is None and 0 <= result["validation"]["metrics"]["accuracy"] <= 1
    assert "no better validation.accuracy in 2 evaluations" in done.err


def test_a_wrong_row_ends_a_run_before_it_begins(trained: Path, forks: Forks) -> None:
    (trained / "wrong.jsonl").write_text('{"prompt": "The"}\n', encoding="utf-8")
    done = forks("pretrain", "task.yaml", "name=wrong", "eval.data.path=wrong.jsonl", cwd=trained)
    assert done.code == 3 and "wrong.jsonl:1" in done.err
    assert not (trained / "runs" / "wrong").exists()
