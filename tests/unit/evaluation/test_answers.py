"""The answers of several shares of the rows are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.evaluation.answers import Answers, Share, answer, encode, merged
from gptcli.evaluation.corpus import from_recipe
from gptcli.evaluation.tasks import Task, measure, read_task
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.tiny import make_model, shared_tokenizer

TASK: dict[str, Any] = {
    "references": "answer",
    "metrics": ["accuracy", "f1", "exact_match", "quality"],
    "labels": [" mat", " sat on"],
}


@pytest.fixture
def task(tmp_path: Path, request: pytest.FixtureRequest) -> Task:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    rows = [{"prompt": "the cat" * (1 + i % 4) + f" {i}", "answer": ("mat", "sat on")[i % 2]} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = {**TASK, "data": "rows.jsonl", **getattr(request, "param", {})}
    (tmp_path / "task.yaml").write_text(json.dumps({"generate": {"max_new_tokens": 5}, "eval": section}))
    recipe = load_recipe(str(tmp_path / "task.yaml"))
    return read_task(from_recipe(recipe), recipe, Silent())


def of_shares(model: Any, task: Task, shares: list[Share]) -> list[Answers]:
    prompts = encode(model, shared_tokenizer(), task)
    return [answer(model, shared_tokenizer(), task, prompts, Silent(), share) for share in shares]


@pytest.mark.parametrize("task", [{}, {"label_scores": "calibrated"}, {"label_scores": "normalized"}], indirect=True)
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_rows_dealt_out_give_the_answers_of_one_process(task: Task, parts: int) -> None:
    model = make_model()
    whole = of_shares(model, task, [Share()])[0]
    every = of_shares(model, task, [Share(part, parts) for part in range(parts)])
    assert sorted(row for each in every for row in each.texts) == list(range(9)), "each row once"
    counts = sum(~np.isnan(each.scores) for each in every if each.scores is not None)
    assert (counts == 1).all(), "each label of each row once"
    together = merged(every)
    assert together.texts == whole.texts
    np.testing.assert_allclose(together.scores, whole.scores, rtol=1e-6)  # type: ignore[arg-type]
    assert measure(task, together)[0] == measure(task, whole)[0]


def test_processes_of_a_divided_model_make_every_text_and_each_counts_once(task: Task) -> None:
    model = make_model()
    whole = of_shares(model, task, [Share()])[0]
    every = of_shares(model, task, [Share(part, 2, together=True) for part in range(2)])
    assert [each.texts for each in every] == [whole.texts] * 2
    assert measure(task, merged(every)) == measure(task, whole)


def test_mode_of_every_module_and_random_state_are_left_alone(task: Task) -> None:
    model = make_model("gpt2", attn_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    of_shares(model, task, [Share()])
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()  # type: ignore[index]
