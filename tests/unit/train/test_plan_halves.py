"""When the plan takes micro-batches in halves: on a CPU, for two threads, with enough work, as the run began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptcli.model.build import Counts
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.train.decisions import Hardware
from gptcli.train.plan import HALVES, HALVES_FLOPS, Plan, make_plan, with_micro_batch

COUNTS = Counts(total=1_200_000, matrix=1_000_000, hidden_matrices=800_000, head=200_000, layers=4, width=128)
TWO = Hardware("cpu", fast_bf16=False, processes=1, memory_bytes=2**34, threads=2)


def recipe(tmp_path: Path, *overrides: str) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(
        "data: {train: builtin:pydocs, sequence_length: 1000}\n"
        "model: {type: llama, preset: 1m}\n"
        "tokenizer: {train: {algorithm: bytes}}\n"
        "train: {max_steps: 100, global_batch_size: 16, micro_batch_size: 4}\n"
    )
    return load_recipe(str(path), overrides)


def plan(loaded: LoadedRecipe, hardware: Hardware = TWO, decided: dict[str, str] | None = None) -> Plan:
    return make_plan(loaded, COUNTS, hardware, rows_per_epoch=1000, decided=decided)


def decision(made: Plan) -> str | None:
    return next((d.reason for d in made.decisions if d.key == HALVES), None)


def test_halves_are_planned_for_two_threads_with_enough_work(tmp_path: Path) -> None:
    made = plan(recipe(tmp_path))  # 6 FLOPs x 1 M x 4,000 tokens
    assert made.halves and decision(made) is not None
    one = plan(recipe(tmp_path), replace(TWO, threads=1))
    assert not one.halves and decision(one) is None
    just = HALVES_FLOPS / (6 * COUNTS.matrix)  # tokens
    for tokens_of_two, expected in ((just + 2, True), (just - 2, False)):
        length = f"data.sequence_length={int(tokens_of_two / 2)}"
        made = plan(recipe(tmp_path, "train.micro_batch_size=2", length))
        assert made.halves is expected
        assert (decision(made) is not None) is expected


@pytest.mark.parametrize(
    "hardware, overrides",
    [
        (replace(TWO, processes=2), ()),
        (replace(TWO, kind="cuda", memory_bytes=2**36), ()),
        (replace(TWO, kind="mps"), ()),
        (TWO, ("train.micro_batch_size=1",)),
        (TWO, ("train.compile=true",)),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_halves_are_not_planned(tmp_path: Path, hardware: Hardware, overrides: tuple[str, ...], resumed: bool) -> None:
    before = {HALVES: "two threads, half of the rows each"} if resumed else None
    made = plan(recipe(tmp_path, *overrides), hardware, before)
    assert not made.halves
    assert decision(made) is None


def test_a_resume_keeps_what_the_run_began_with(tmp_path: Path) -> None:
    began = plan(recipe(tmp_path)).decided
    one = plan(recipe(tmp_path), replace(TWO, threads=1), began)
    assert one.halves and decision(one) == "as this run began"
    assert one.decided[HALVES] == began[HALVES]
    without = {key: value for key, value in began.items() if key != HALVES}
    assert not plan(recipe(tmp_path), decided=without).halves


def test_halves_hold_more_gradients_and_half_a_block_of_logits_each(tmp_path: Path) -> None:
    large = replace(COUNTS, total=100_000_000)  # so that the backward pass is fullest when all gradients are there
    whole, made = (
        make_plan(recipe(tmp_path), large, replace(TWO, threads=threads), rows_per_epoch=1000) for threads in (1, 2)
    )
    assert made.gradient_accumulation_steps > 1
    assert made.memory["gradients"] == 2 * 4 * large.total
    assert whole.memory["gradients"] == 4 * large.total
    wide = replace(COUNTS, head=50_000 * COUNTS.width)
    whole, made = (
        make_plan(recipe(tmp_path), wide, replace(TWO, threads=threads), rows_per_epoch=1000) for threads in (1, 2)
    )
    assert whole.loss_block is not None and made.loss_block is not None
    assert made.loss_block <= whole.loss_block


def test_one_row_after_a_back_off_is_whole(tmp_path: Path) -> None:
    loaded = recipe(tmp_path)
    made = plan(loaded)
    assert with_micro_batch(made, loaded.recipe.train, COUNTS, 2, "x").halves
    assert not with_micro_batch(made, loaded.recipe.train, COUNTS, 1, "x").halves
