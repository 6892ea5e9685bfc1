from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptcli.errors import RecipeError
from gptcli.model.build import Counts
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.train.decisions import Hardware
from gptcli.train.memory import memory_estimate
from gptcli.train.plan import Plan, dry_step_sizes, make_plan, step_of, with_micro_batch
from gptcli.train.strategy import HEAD_ROOM

COUNTS = Counts(total=1_200_000, matrix=1_000_000, hidden_matrices=800_000, head=200_000, layers=4, width=128)
CPU = Hardware("cpu", fast_bf16=False, processes=1, memory_bytes=2**34, bf16_reason="no AVX512-BF16")
GPU = Hardware("cuda", fast_bf16=True, processes=1, memory_bytes=2**36, bf16_reason="Ampere")


def recipe(tmp_path: Path, *overrides: str) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(
        "data: {train: builtin:pydocs, sequence_length: 128}\n"
        "model: {type: llama, preset: 1m}\n"
        "tokenizer: {train: {algorithm: bytes}}\n"
        "train: {max_steps: 100, global_batch_size: 16}\n"
    )
    return load_recipe(str(path), overrides)


def plan(loaded: LoadedRecipe, hardware: Hardware = CPU, rows: int | None = 1000) -> Plan:
    return make_plan(loaded, COUNTS, hardware, rows_per_epoch=rows)


def test_tokens_become_steps_rounded_up(tmp_path: Path) -> None:
    made = plan(recipe(tmp_path, "train.max_tokens=10K"))
    assert made.steps == 5  # 10,000 / (16 * 128) = 4.88
    assert made.total_tokens == 5 * 16 * 128


def test_epochs_end_with_a_smaller_step(tmp_path: Path) -> None:
    made = plan(recipe(tmp_path, "train.epochs=1.5"), rows=101)
    assert made.total_rows == 152  # ceil(1.5 * 101)
    assert made.steps == 10
    assert made.total_tokens == 152 * 128


def test_epochs_are_counted_in_decimal(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path, "train.epochs=1.1"), rows=10).total_rows == 11


def test_on_cpu_the_micro_batch_is_the_smallest_that_holds_8k_tokens(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path, "train.global_batch_size=256")).micro_batch_size == 64
    # 96 rows have no divisor of exactly 64; the next that holds 8,192 tokens is 96.
    assert plan(recipe(tmp_path, "train.global_batch_size=96")).micro_batch_size == 96
    assert plan(recipe(tmp_path, "data.sequence_length=8192")).micro_batch_size == 1


def test_the_micro_batch_never_changes_the_global_batch(tmp_path: Path) -> None:
    for size in (1, 2, 4, 8, 16):
        made = plan(recipe(tmp_path, f"train.micro_batch_size={size}"))
        assert made.micro_batch_size * made.gradient_accumulation_steps == 16


def test_a_micro_batch_that_does_not_divide_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(recipe(tmp_path, "train.micro_batch_size=5"))
    assert "4 and 8" in str(caught.value.remedy)


def test_on_a_gpu_the_micro_batch_is_an_estimate_until_a_dry_step(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "train.global_batch_size=1024")
    made = plan(loaded, GPU)
    assert made.dry_step
    assert made.micro_batch_size == 512  # 64K tokens
    assert dry_step_sizes(made) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    small = replace(GPU, memory_bytes=256 << 20)
    made = plan(loaded, small)
    twice = with_micro_batch(made, loaded.recipe.train, COUNTS, 2 * made.micro_batch_size, "why")
    assert made.memory_bytes <= (1 - HEAD_ROOM) * small.memory_bytes < twice.memory_bytes
    assert made.memory == memory_estimate(COUNTS, loaded.recipe.train, step_of(made))
    assert not plan(recipe(tmp_path, "train.micro_batch_size=4"), GPU).dry_step
    assert not plan(loaded, replace(GPU, kind="mps")).dry_step
    assert not plan(loaded).dry_step
    # Rows that are longer than a GPU's limit go one by one.
    assert dry_step_sizes(plan(recipe(tmp_path, "data.sequence_length=100000"), GPU)) == [1]


def test_a_resume_keeps_the_micro_batch_where_it_divides(tmp_path: Path) -> None:
    for overrides in ((), ("train.micro_batch_size=16",)):
        loaded = recipe(tmp_path, *overrides)
        made = make_plan(loaded, COUNTS, GPU, rows_per_epoch=10, decided={"train.micro_batch_size": "2"})
        assert (made.micro_batch_size, made.gradient_accumulation_steps, made.dry_step) == (2, 8, False)
        assert made.decided["train.micro_batch_size"] == "2"
        other = make_plan(loaded, COUNTS, CPU, rows_per_epoch=10, decided={"train.micro_batch_size": "3"})
        assert other.micro_batch_size == 16


def test_another_micro_batch_is_planned_as_if_the_recipe_had_it(tmp_path: Path) -> None:
    settings = ("data.sequence_length=2048", "train.global_batch_size=64")
    large = replace(COUNTS, head=128 * 32_000)
    made = make_plan(recipe(tmp_path, *settings), large, CPU, rows_per_epoch=10)
    for rows in (1, 2, 32):
        loaded = recipe(tmp_path, *settings, f"train.micro_batch_size={rows}")
        expected = make_plan(loaded, large, CPU, rows_per_epoch=10)
        found = with_micro_batch(made, loaded.recipe.train, large, rows, "why")
        assert {d.key: d for d in found.decisions}["train.micro_batch_size"].reason == "why"
        others = tuple(d for d in found.decisions if d.key != "train.micro_batch_size")
        assert replace(found, decisions=others) == expected


def test_warmup_is_steps_or_a_share(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path, "train.warmup=7")).warmup_steps == 7
    assert plan(recipe(tmp_path, "train.warmup=5%")).warmup_steps == 5
    assert plan(recipe(tmp_path, "train.warmup=0")).warmup_steps == 0
    assert plan(recipe(tmp_path, "train.warmup=1000")).warmup_steps == 100


def test_no_length_is_an_error_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(recipe(tmp_path, "train.max_steps=null"))
    assert "max_tokens" in str(caught.value.remedy)


def test_precision_auto_is_bf16_only_where_it_is_fast(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path)).precision == "fp32"
    assert plan(recipe(tmp_path), GPU).precision == "bf16"
    assert plan(recipe(tmp_path), replace(GPU, fast_bf16=False)).precision == "fp32"
    assert plan(recipe(tmp_path, "train.precision=bf16")).precision == "bf16"


def test_a_resume_keeps_the_precision_that_auto_stood_for(tmp_path: Path) -> None:
    made = make_plan(recipe(tmp_path), COUNTS, GPU, rows_per_epoch=10, decided={"train.precision": "fp32"})
    assert made.precision == "fp32"


def test_every_auto_is_a_printed_decision_with_a_reason(tmp_path: Path) -> None:
    made = plan(recipe(tmp_path))
    assert {d.key for d in made.decisions} >= {"train.micro_batch_size", "train.precision", "train.compile"}
    assert all(d.reason for d in made.decisions)


def test_flops_are_the_standard_formula(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path)).flops_per_token == 6 * 1_000_000 + 12 * 4 * 128 * 128
