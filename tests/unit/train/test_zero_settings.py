"""What DeepSpeed is told: the plan's numbers, whatever the recipe repeats, and nothing that contradicts them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import MissingError, RecipeError
from gptcli.train.plan import make_plan
from gptcli.train.zero_settings import BUCKET, check_zero, zero_settings
from tests.unit.train.test_plan import COUNTS, CPU, GPU, recipe

TWO = replace(CPU, processes=2)
ZERO = "launch.strategy=deepspeed"


def settings(tmp_path: Path, section: str, *overrides: str) -> dict[str, Any]:
    loaded = recipe(tmp_path, ZERO, f"launch.deepspeed={section}", "train.micro_batch_size=2", *overrides)
    return zero_settings(loaded, make_plan(loaded, COUNTS, TWO, rows_per_epoch=1000))


def test_the_plan_is_filled_in(tmp_path: Path) -> None:
    found = settings(tmp_path, "{}")
    assert found == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": min(BUCKET, COUNTS.total)},
    }


def test_what_is_written_goes_on_and_may_repeat_the_plan(tmp_path: Path) -> None:
    section = (
        "{train_batch_size: 16, train_micro_batch_size_per_gpu: auto, gradient_clipping: 1.0, bf16: {enabled: auto}, "
        "optimizer: {type: AdamW, params: {lr: auto, weight_decay: 0.1}}, wall_clock_breakdown: true, "
        "zero_optimization: {stage: 3, reduce_bucket_size: 1000, offload_optimizer: {device: none}}}"
    )
    found = settings(tmp_path, section)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["wall_clock_breakdown"] is True
    assert "optimizer" not in found


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{train_batch_size: 32}", "train_batch_size: 32 contradicts train.global_batch_size, by which it is 16"),
        ("{gradient_accumulation_steps: 1}", "contradicts train.micro_batch_size"),
        ("{gradient_clipping: 2.0}", "contradicts train.max_grad_norm"),
        ("{bf16: {enabled: true}}", "contradicts train.precision"),
        ("{fp16: {enabled: true}}", "contradicts train.precision"),
        ("{optimizer: {type: Lamb}}", "contradicts train.optimizer"),
        ("{optimizer: {params: {lr: 0.5}}}", "contradicts train.learning_rate"),
        ("{scheduler: {type: WarmupLR}}", "scheduler.type is not known"),
        ("{amp: {enabled: true}}", "amp.enabled is not known"),
        ("{zero_optimization: {stage: 0}}", "expected 1, 2 or 3, got 0"),
        ("{zero_optimization: {stage: 4}}", "expected 1, 2 or 3, got 4"),
        ("{zero_optimization: {stage: true}}", "expected 1, 2 or 3"),
        ("{zero_optimization: {offload_optimizer: {device: cpu}}}", "offload_optimizer is not available yet"),
    ],
)
def test_a_contradiction_is_refused_with_its_place(tmp_path: Path, section: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"launch\.deepspeed") as caught:
        settings(tmp_path, section)
    assert said in caught.value.what
    assert caught.value.where is not None and caught.value.where.startswith("override launch.deepspeed=")


@pytest.mark.parametrize(
    "override",
    ["train.optimizer=muon", "train.precision=fp16", "train.compile=true", "launch.parallel={tp: 2}"],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, override: str) -> None:
    loaded = recipe(tmp_path, ZERO, override)
    plan = make_plan(loaded, COUNTS, replace(GPU, processes=2), rows_per_epoch=1000)
    with pytest.raises(RecipeError, match=r"is not known to work with launch\.strategy: deepspeed"):
        check_zero(loaded, plan, here=False)


def test_bf16_begins_with_stage_2(tmp_path: Path) -> None:
    found = settings(tmp_path, "{}", "train.precision=bf16")
    assert found["bf16"] == {"enabled": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(RecipeError, match="stage: 1 is for fp32"):
        settings(tmp_path, "{zero_optimization: {stage: 1}}", "train.precision=bf16")


def test_it_is_not_compiled_by_itself(tmp_path: Path) -> None:
    gpu = replace(GPU, processes=2, compiler=True, packages=frozenset({"triton"}))
    by_strategy = [
        make_plan(recipe(tmp_path, f"launch.strategy={name}", "train.max_steps=10000"), COUNTS, gpu, rows_per_epoch=9)
        for name in ("ddp", "deepspeed")
    ]
    assert [plan.compile for plan in by_strategy] == [True, False]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_where_it_is_not_installed_the_command_is_said(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, ZERO)
    plan = make_plan(loaded, COUNTS, TWO, rows_per_epoch=1000)
    check_zero(loaded, plan, here=False)  # a plan for another machine needs none
    with pytest.raises(MissingError, match="needs the package deepspeed") as caught:
        check_zero(loaded, plan, here=True)
    assert caught.value.exit_code == 7
    assert "pip install 'gptcli[deepspeed]'" in str(caught.value.remedy)
