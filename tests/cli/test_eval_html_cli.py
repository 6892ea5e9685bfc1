"""`--html` of `gptcli eval` and `gptcli runs compare`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.tiny import save_model

TASK = """\
eval:
  data: {path: rows.jsonl, text: prompt}
  references: answer
  metrics: [perplexity, accuracy]
  labels: [" mat", " sat"]
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    save_model(folder / "one")
    save_model(folder / "two", "gpt2")
    rows = [{"prompt": f"the <script> cat {i}", "answer": ("mat", "sat")[i % 2]} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    return folder


def test_a_page_of_losses_and_a_task_and_its_numbers_in_json(here: Path, run_cli: Cli) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    done = run_cli("eval", "one", "task.yaml", "--json", "--html", "page.html", cwd=here)
    assert done.code == 0, done.err
    result, content = done.json(), (here / "page.html").read_text(encoding="utf-8")
    curves = result["curves"]
    assert sum(each["tokens"] for each in curves["positions"]) == result["tokens"]
    assert sum(each["count"] for each in curves["calibration"]["bins"]) == result["tokens"]
    assert sum(each["count"] for each in curves["labels"]["bins"]) == 12
    for part in ("Confusion matrix", "Calibration of the labels", "Loss by position in context", "Surprise"):
        assert part in content
    assert f"{curves['calibration']['expected_calibration_error']:.4f}" in content and "<script" not in content


def test_a_comparison_takes_what_was_kept_and_scores_what_was_kept_without_it(here: Path, run_cli: Cli) -> None:
    data = ("--data", "rows.jsonl", "--text", "prompt")
    assert run_cli("eval", "one", *data, "--html", "one.html", cwd=here).code == 0
    assert run_cli("eval", "two", *data, cwd=here).code == 0
    done = run_cli("runs", "compare", "one", "two", *data, "--html", "both.html", cwd=here)
    assert done.code == 0 and done.out.count("as kept of an earlier evaluation") == 1, done.err
    assert "kept without what the pictures show" in done.out and "page: both.html" in done.out
    content = (here / "both.html").read_text(encoding="utf-8")
    assert "two beside one" in content and "probability" in content


def test_a_page_that_cannot_be_is_said_before_anything_is_scored(here: Path, run_cli: Cli) -> None:
    for arguments in (["one", "--data", "rows.jsonl", "--html", "."], ["task.yaml", "--smoke", "--html", "page.html"]):
        done = run_cli("eval", *arguments, cwd=here)
        assert done.code == 2 and "--html" in done.err
