from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.errors import RecipeError
from gptcli.recipe.availability import SECTIONS, TABLE, check_available, usable_by
from gptcli.recipe.load import dump_yaml, load_recipe, resolved
from gptcli.recipe.problems import fields_of, sections_of
from gptcli.recipe.schema import Recipe

TEXT = """\
tokenizer: {train: {vocab_size: 2K}}
data: {train: corpus.txt}
model: {type: llama, preset: 1m}
train: {max_steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    return "r.yaml"


@pytest.mark.parametrize(
    "override",
    [
        "train.objective=masked",
        "train.profile={start: 1}",
    ],
)
def test_what_does_not_exist_yet_is_refused_with_its_place(recipe: str, override: str) -> None:
    with pytest.raises(RecipeError, match="not available yet") as caught:
        check_available(load_recipe(recipe, [override]), "pretrain")
    assert caught.value.where == f"override {override}"
    assert caught.value.exit_code == 2


def test_preference_data_and_its_methods_are_for_finetune_and_belong_together(recipe: str) -> None:
    pairs = ["data.format=preference", "finetune.method=dpo", "model={from: base}"]
    check_available(load_recipe(recipe, ["model=null", *pairs]), "finetune")
    for command in ("tokenize", "pretrain", "eval"):
        with pytest.raises(RecipeError, match=f"preference is not available to {command} yet"):
            check_available(load_recipe(recipe, ["model=null", *pairs]), command)
    with pytest.raises(RecipeError, match=r"learns from preference data, and data\.format is text"):
        check_available(load_recipe(recipe, ["finetune.method=kto"]), "finetune")


@pytest.mark.parametrize("override", ["eval.data={tokens: x}"])
def test_eval_refuses_metrics_of_later(recipe: str, override: str) -> None:
    with pytest.raises(RecipeError, match="not available yet"):
        check_available(load_recipe(recipe, [override]), "eval")


@pytest.mark.parametrize(
    "override",
    [
        "train.precision=bf16",
        "train.precision=fp8",
        "train.attention=sdpa",
        "train.attention=flash_attention_2",
        "train.compile=true",
        "train.optimizer=lion",
        "train.lr_scheduler=polynomial",
        "train.micro_batch_size=4",
        "train.max_time=1h",
        "train.trainer_args={tf32: true}",
        "train.z_loss=0",
        "launch.processes=2",
        "launch.nodes=2",
        "launch.rendezvous=head:29400",
        "launch.strategy=ddp",
        "launch.strategy=deepspeed",
        "launch.deepspeed={zero_optimization: {stage: 3}}",
        "tracking.to=[wandb]",
        "data.validation={tail: 10%}",
        "data.train=[a.txt, b.txt]",
        "data.train=[{path: a, weight: 1}, {path: b, weight: 2}]",
        "data.train=hub:a/b",
        "model.trust_remote_code=true",
    ],
)
def test_what_exists_is_not_refused(recipe: str, override: str) -> None:
    check_available(load_recipe(recipe, [override]), "pretrain")


def test_defaults_written_out_are_not_refused(recipe: str, tmp_path: Path) -> None:
    text = dump_yaml(resolved(load_recipe(recipe)))
    (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
    loaded = load_recipe("resolved.yaml")
    for command in SECTIONS:
        check_available(loaded, command)


def test_every_row_names_a_key_of_the_schema() -> None:
    for row in TABLE:
        models: list[type] = [Recipe]
        for key in row.key.split("."):
            if key != "*":
                fields = fields_of(models)
                assert key in fields, row.key
                models = list(sections_of(fields[key]))


def test_usable_by_says_what_a_command_lacks(recipe: str) -> None:
    reasons = usable_by(load_recipe(recipe))
    assert reasons["pretrain"] is None
    assert reasons["tokenize"] is None
    assert "model.from" in str(reasons["finetune"])
