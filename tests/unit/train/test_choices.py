"""A timed choice: measured once, kept, the same the next time, without a trace in the random state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from gptcli.device import has_fast_bf16
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.train import choices
from gptcli.train.choices import choose_bf16, timed_passes

CPU = torch.device("cpu")


def config(**changes: int) -> GPT2Config:
    return GPT2Config(vocab_size=50, n_positions=256, n_embd=16, n_layer=2, n_head=2, **changes)


@pytest.fixture
def loaded() -> LoadedRecipe:
    return load_recipe("quickstart", ())


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "SECONDS", 0.0)


def stored(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "choices").iterdir())


def test_a_model_is_timed_once(tmp_path: Path, loaded: LoadedRecipe) -> None:
    first = timed_passes(loaded, config(), 2, 32)
    assert all(seconds > 0 for seconds in first)
    assert timed_passes(loaded, config(), 2, 32) == first
    assert len(stored(tmp_path)) == 1
    timed_passes(loaded, config(), 4, 32)
    timed_passes(loaded, config(n_inner=24), 2, 32)
    timed_passes(loaded, config(), 2, 32, halves=True)
    timed_passes(loaded, config(), 2, 32, short=True)
    assert len(stored(tmp_path)) == 5


@pytest.mark.parametrize("content", ["", "[]", '{"fp32": 1}', '{"fp32": "x", "bf16": 1}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, loaded: LoadedRecipe, content: str) -> None:
    timed_passes(loaded, config(), 2, 32)
    stored(tmp_path)[0].write_text(content)
    again = timed_passes(loaded, config(), 2, 32)
    assert timed_passes(loaded, config(), 2, 32) == again


def test_random_state_and_the_configuration_are_left_alone(loaded: LoadedRecipe) -> None:
    torch.manual_seed(3)
    before, shape = torch.get_rng_state(), config()
    timed_passes(loaded, shape, 2, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert shape.to_dict() == config().to_dict()


@pytest.mark.parametrize(
    "rows, length, flops, halves, expected",
    [
        (8, 32, 1e12, False, (8, 32)),
        (64, 32, 0.0, False, (4, 32)),
        (8, 256, 0.0, False, (1, 128)),
        (2, 32, 0.0, False, (2, 32)),
        (8, 256, 0.0, True, (2, 128)),  # halves of a row there are none
    ],
)
def test_a_large_micro_batch_is_timed_in_part(
    monkeypatch: pytest.MonkeyPatch,
    loaded: LoadedRecipe,
    rows: int,
    length: int,
    flops: float,
    halves: bool,
    expected: tuple[int, int],
) -> None:
    seen: list[tuple[int, int]] = []

    def timed(model: object, rows: int, length: int, halves: bool, seconds: float) -> tuple[float, float]:
        seen.append((rows, length))
        return 2.0, 1.0

    monkeypatch.setattr(choices, "PASS_FLOPS", flops)
    monkeypatch.setattr(choices, "_pass_seconds", timed)
    timed_passes(loaded, config(), rows, length, halves)
    assert seen == [expected]


@pytest.mark.parametrize(
    "full, half, expected", [(1.9, 1.0, True), (1.21, 1.0, True), (1.1, 1.0, False), (0.5, 1.0, False)]
)
def test_bf16_needs_the_margin(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedRecipe, full: float, half: float, expected: bool
) -> None:
    monkeypatch.setattr(choices, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(choices, "timed_passes", lambda *_: (full, half))
    fast, reason = choose_bf16(loaded, config(), CPU, rows=2, length=32)
    assert fast is expected
    assert f"{full / half:.2f} times as fast" in reason
    assert ("less than 1.2" in reason) is not expected


def test_what_this_machine_gets_is_told_with_its_reason(loaded: LoadedRecipe) -> None:
    fast, reason = choose_bf16(loaded, config(), CPU, rows=2, length=32)
    if has_fast_bf16(CPU):
        assert "times as fast in bf16" in reason
    else:
        assert not fast
        assert reason == "this CPU has neither AVX512-BF16 nor AMX"
