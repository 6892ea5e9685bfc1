"""`gptcli eval A B --fuse mean`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Cli
from tests.tiny import fallback_tokenizer, make_model, save_model, shared_tokenizer, wrapped

TASK = """\
eval:
  data: {path: rows.jsonl, text: prompt}
  references: answer
  metrics: [perplexity, accuracy, f1]
  labels: [" mat", " sat on", " hello"]
"""
LABELS = (" mat", " sat on", " hello")
KINDS = {"one": "llama", "two": "gpt2"}
ROWS = [{"prompt": f"the cat {i}", "answer": LABELS[i % 3]} for i in range(21)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuse")
    for name, kind in KINDS.items():
        save_model(folder / name, kind)
    save_model(folder / "other")
    wrapped(fallback_tokenizer()).save_pretrained(str(folder / "other"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    return folder


def log_probabilities(model: Any, before: list[int], ids: list[int]) -> list[float]:
    with torch.no_grad():
        scores = model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
    return [float(scores[len(before) - 1 + at, token]) for at, token in enumerate(ids)]


def test_two_models_together_are_what_transformers_gives_by_hand(here: Path, run_cli: Cli) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
    files = ("--predictions", "answers.jsonl", "--html", "page.html", "--markdown", "table.md")
    done = run_cli("eval", "one", "two", "task.yaml", "--fuse", "mean", "--json", *files, cwd=here)
    assert done.code == 0, done.err
    *_, found = results = done.json()
    assert [each["model"] for each in results] == ["one", "two", "mean of one, two"]

    models, tokenizer = [make_model(kind) for kind in KINDS.values()], shared_tokenizer()
    answered, tokens = [], []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        labels = [tokenizer(label)["input_ids"] for label in LABELS]
        scores = torch.tensor([[sum(log_probabilities(each, prompt, ids)) for ids in labels] for each in models])
        answered.append(LABELS[int(scores.softmax(-1).mean(0).argmax())].strip())
        tokens += np.exp([log_probabilities(each, [0], prompt) for each in models]).mean(0).tolist()
    right = [row["answer"].strip() for row in ROWS]
    lines = [json.loads(line) for line in (here / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == answered
    assert all(sum(np.exp(list(line["label_scores"].values()))) == pytest.approx(1) for line in lines)
    assert found["metrics"]["accuracy"] == sklearn.accuracy_score(right, answered)
    assert found["metrics"]["label_scores"] == "mean of probabilities by likelihood"
    assert found["tokens"] == len(tokens) and found["loss"] == pytest.approx(-np.log(tokens).mean(), rel=1e-5)
    assert found["compared"]["with"] == "one" and found["compared"]["by"] == "loss"
    assert sum(each["count"] for each in found["curves"]["labels"]["bins"]) == len(ROWS)
    for name in ("page.html", "table.md"):
        content = (here / name).read_text(encoding="utf-8")
        assert "mean of one, two" in content and f"{found['loss']:.4f}" in content


def test_a_model_fused_with_itself_is_itself(here: Path, run_cli: Cli) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    done = run_cli("eval", "one", "one", "task.yaml", "--fuse", "mean", "--json", cwd=here)
    assert done.code == 0, done.err
    first, _, both = done.json()
    assert both["model"] == "mean of one, one" and both["compared"]["verdict"] == "no difference"
    assert both["loss"] == pytest.approx(first["loss"], rel=1e-6)
    for each in (first, both):
        del each["metrics"]["label_scores"]
    assert both["metrics"] == first["metrics"]


def test_labels_are_fused_whatever_the_tokenizers(here: Path, run_cli: Cli) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    done = run_cli("eval", "one", "other", "task.yaml", "eval.metrics=[accuracy]", "--fuse", "mean", cwd=here)
    assert done.code == 0 and done.out.count("mean of one, other") == 2, done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["one", "task.yaml", "--fuse", "mean"], 2, "two models or more"),
        (["one", "two", "task.yaml", "--fuse", "median"], 2, "--fuse median"),
        (["one", "gone", "task.yaml", "--fuse", "mean"], 7, "gone"),
        (["one", "other", "task.yaml", "--fuse", "mean"], 2, "the tokenizer of other is not that of one"),
        (["one", "two", "task.yaml", "eval.metrics=[accuracy, bleu]", "--fuse", "mean"], 2, "What can be fused are"),
        (["one", "two", "--tasks", "hellaswag", "--fuse", "mean"], 2, "hellaswag"),
        (["task.yaml", "--smoke", "--fuse", "mean"], 2, "--smoke"),
    ],
)
def test_what_cannot_be_fused_is_said_before_a_model_is_loaded(
    here: Path, run_cli: Cli, arguments: list[str], code: int, said: str
) -> None:
    done = run_cli("eval", *arguments, cwd=here)
    assert done.code == code and said in done.err, done.err
    assert "float32" not in done.out + done.err and "Traceback" not in done.err
