"""`gptcli eval` on tasks, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.tiny import save_model

RECIPE = """\
eval:
  data: {path: rows.jsonl, text: prompt}
  references: answer
  metrics: [perplexity, accuracy, f1]
  labels: [" mat", " sat"]
"""
TEXTS = """\
eval:
  data: rows.jsonl
  references: answer
  metrics: [bleu, chrf, rouge, wer, cer, exact_match, f1, quality]
generate: {max_new_tokens: 4}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    save_model(folder / "model")
    rows = [{"prompt": f"the cat {i}", "answer": ("mat", "sat")[i % 2]} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "labels.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "texts.yaml").write_text(TEXTS, encoding="utf-8")
    return folder


def test_loss_and_task_stand_in_one_result(here: Path, run_cli: Cli) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
    done = run_cli("eval", "model", "labels.yaml", "--json", "--predictions", "answers.jsonl", cwd=here)
    assert done.code == 0, done.err
    result = done.json()
    assert result["loss"] > 0 and result["documents"] == 6
    lines = [json.loads(line) for line in (here / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["where"] for line in lines] == [f"rows.jsonl:{number}" for number in range(1, 7)]
    right, answered = [line["references"][0] for line in lines], [line["label"] for line in lines]
    assert right == ["mat", "sat"] * 3
    assert result["metrics"]["accuracy"] == sklearn.accuracy_score(right, answered)
    assert result["metrics"]["f1_micro"] == sklearn.f1_score(right, answered, average="micro", labels=["mat", "sat"])


def test_a_task_alone_has_no_loss_and_a_table(here: Path, run_cli: Cli) -> None:
    for package in ("sacrebleu", "rouge_score", "jiwer"):
        pytest.importorskip(package, reason="the extra eval is not installed")
    done = run_cli("eval", "model", "texts.yaml", cwd=here)
    assert done.code == 0, done.err
    for name in ("rows", "bleu_signature", "rougeLsum", "wer", "exact_match", "distinct_1", "ended"):
        assert name in done.out + done.err
    assert "perplexity" not in done.out + done.err


def test_smoke_proves_a_task_whose_data_is_not_here(here: Path, run_cli: Cli) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    of_lm_eval = "eval.tasks=[lambada_openai]"
    done = run_cli("eval", "labels.yaml", "eval.data=gone.jsonl", of_lm_eval, "--smoke", "--json", cwd=here)
    assert done.code == 0, done.err
    assert "eval.tasks are not run, they bring their own data: lambada_openai" in done.err
    assert done.json()["evaluation"]["metrics"]["confusion_matrix"]["labels"] == ["mat", "sat"]


def test_predictions_without_a_task_are_code_2(here: Path, run_cli: Cli) -> None:
    done = run_cli("eval", "model", "--data", "rows.jsonl", "--text", "prompt", "--predictions", "x.jsonl", cwd=here)
    assert done.code == 2 and "--predictions" in done.err
    done = run_cli("eval", "model", "texts.yaml", "--predictions", ".", cwd=here)
    assert done.code == 2 and "is a folder" in done.err
