from __future__ import annotations

import math
from pathlib import Path

import pytest

from gptcli.errors import RecipeError
from gptcli.recipe.availability import check_available
from gptcli.recipe.load import load_recipe
from gptcli.train.best import Best

TEXT = """\
tokenizer: {train: {vocab_size: 2K}}
data: {train: corpus.txt}
model: {type: llama, preset: 1m}
train: {max_steps: 10}
eval: {data: rows.jsonl, references: answer, metrics: [perplexity, accuracy, f1, wer, rouge], labels: [" a", " b"]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "metric", ["loss", "bits_per_byte", "perplexity", "accuracy", "f1_macro", "f1_micro", "wer", "rouge1", "rougeLsum"]
)
def test_what_a_recipe_measures_can_choose_the_best_checkpoint(recipe: str, metric: str) -> None:
    check_available(load_recipe(recipe, [f"train.best_metric=validation.{metric}"]), "pretrain")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.best_metric=validation.acuracy"], "Did you mean validation.accuracy?"),
        (["train.best_metric=validation.f1"], "Did you mean validation.f1_"),
        (["train.best_metric=accuracy"], "Did you mean validation.accuracy?"),
        (["train.best_metric=validation.bleu"], "eval.data with eval.metrics adds more"),
        (
            ["train.best_metric=validation.accuracy", "eval.data=null"],
            "This recipe measures loss, bits_per_byte, perplexity;",
        ),
        (["train.best_metric=validation.loss", "eval=null", "data.validation=0"], "measures nothing"),
    ],
)
def test_what_is_not_measured_is_a_wrong_recipe(recipe: str, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match="is not measured") as caught:
        check_available(load_recipe(recipe, overrides), "finetune")
    assert said in str(caught.value.remedy)
    assert caught.value.where == f"override {overrides[0]}" and caught.value.exit_code == 2


def test_a_recipe_that_is_only_evaluated_may_measure_something_else(recipe: str) -> None:
    loaded = load_recipe(recipe, ["train.best_metric=validation.accuracy", "eval.metrics=[wer]", "eval.labels=null"])
    check_available(loaded, "eval")


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("validation.loss", [3.0, 2.0, 2.0, 2.5], 2),
        ("validation.wer", [0.5, 0.7, 0.4, 0.4], 3),
        ("validation.accuracy", [0.5, 0.7, 0.4, 0.7], 2),
        ("validation.bleu", [0.0, math.nan, 1.0, None], 3),
        ("validation.loss", [math.inf, 9.0, math.nan, None], 2),
        ("validation.accuracy", [None, None, None, None], 0),
    ],
)
def test_the_best_is_the_lowest_or_the_highest_by_the_metric(
    metric: str, values: list[float | None], best: int
) -> None:
    found = Best(patience=2, metric=metric)
    told = [found.observe(step, value) for step, value in enumerate(values, start=1)]
    assert found.step == best and found.waited == len(values) - best and found.over == (found.waited >= 2)
    assert [step for step, is_best in enumerate(told, start=1) if is_best][-1:] == ([best] if best else [])


def test_the_best_goes_on_from_a_checkpoint_by_the_same_metric_alone() -> None:
    before = Best(patience=3, metric="validation.accuracy")
    before.observe(4, 0.5)
    before.observe(8, 0.4)
    for metric, expected in (("validation.accuracy", (4, 0.5, 1)), ("validation.loss", (0, None, 0))):
        after = Best(patience=3, metric=metric)
        after.start_at(before.state())
        assert (after.step, after.value, after.waited) == expected
