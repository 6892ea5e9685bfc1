"""Training and evaluating models that see or hear, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.media import TINY, needs_media, write_media

pytestmark = needs_media

RECIPE = """\
name: {name}
model: {{type: {kind}, config: {config}}}
tokenizer: {{train: {{vocab_size: 300}}}}
data:
  train: rows.jsonl
  validation: held.jsonl
  format: prompt
  {column}s: [{column}]
  prompt: "{{{column}}}\\nThis is"
  completion: " {{label}}"
  sequence_length: 64
  packing: none
train: {{max_steps: 2, global_batch_size: 4, eval_every: 1, save_every: 2, sample_every: 0, precision: fp32}}
eval:
  data: rows.jsonl
  references: label
  metrics: [{metrics}]
generate: {{max_new_tokens: 4}}
"""


def write(folder: Path, kind: str, column: str, metrics: str, **more: str) -> None:
    names = write_media(folder / "files", kind, 8)
    rows = [{column: f"files/{name}", "label": ("one", "two")[at % 2]} for at, name in enumerate(names)]
    for name, part in (("rows", rows[:6]), ("held", rows[6:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    text = RECIPE.format(name=column, kind=kind, config=TINY[kind], column=column, metrics=metrics)
    (folder / "recipe.yaml").write_text(text + "".join(f"{key}: {value}\n" for key, value in more.items()), "utf-8")


def test_a_run_measures_its_task_as_eval_does(tmp_path: Path, run_cli: Cli) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    write(tmp_path, "llava", "image", "accuracy, f1")
    labels = 'eval.labels=[" one", " two"]'
    done = run_cli("pretrain", "recipe.yaml", labels, cwd=tmp_path)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "runs/image/metrics.jsonl").read_text().splitlines()]
    measured = [line["validation"]["metrics"] for line in lines if "validation" in line]
    assert len(measured) == 2
    validation = "eval.data=held.jsonl"
    done = run_cli("eval", "image", "recipe.yaml", labels, validation, "--html", "page.html", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json()["metrics"]["confusion_matrix"] == measured[-1]["confusion_matrix"]
    assert "files/6.png" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_is_heard_is_written_and_compared_as_speech_is(tmp_path: Path, run_cli: Cli) -> None:
    jiwer = pytest.importorskip("jiwer", reason="the extra eval is not installed")
    write(tmp_path, "qwen2_audio", "audio", "exact_match, wer, cer")
    done = run_cli("pretrain", "recipe.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    done = run_cli("eval", "audio", "recipe.yaml", "--json", "--predictions", "answers.jsonl", cwd=tmp_path)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["media"] for line in lines] == [[f"files/{at}.wav"] for at in range(6)]
    said, right = [line["prediction"] for line in lines], [line["references"][0] for line in lines]
    metrics = done.json()["metrics"]
    assert metrics["wer"] == jiwer.wer(right, said) and metrics["cer"] == jiwer.cer(right, said)
    assert metrics["exact_match"] == sum(a == b for a, b in zip(said, right, strict=True)) / 6
