"""A timed choice: measured once, kept, the same the next time, without a trace in the random state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.device import has_fast_bf16
from gptcli.train import choices
from gptcli.train.choices import choose_bf16, timed_products

CPU = torch.device("cpu")
SHAPES = (((64, 32), 2), ((32, 32), 4))


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "SHAPE_SECONDS", 0.0)


def stored(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "choices").iterdir())


def test_products_are_timed_once(tmp_path: Path) -> None:
    first = timed_products(SHAPES, 256)
    assert all(seconds > 0 for seconds in first)
    assert timed_products(SHAPES, 256) == first
    assert len(stored(tmp_path)) == 1
    timed_products(SHAPES, 512)
    timed_products(SHAPES[:1], 256)
    assert len(stored(tmp_path)) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"fp32": 1}', '{"fp32": "x", "bf16": 1}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    timed_products(SHAPES, 256)
    stored(tmp_path)[0].write_text(content)
    again = timed_products(SHAPES, 256)
    assert timed_products(SHAPES, 256) == again


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    timed_products(SHAPES, 256)
    assert torch.equal(torch.get_rng_state(), before)


def test_large_products_are_timed_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def timed(outputs: int, inputs: int, count: int) -> tuple[float, float]:
        rows.append(count)
        return 0.001 * count, 0.002 * count

    monkeypatch.setattr(choices, "_product_seconds", timed)
    full, half = timed_products((((4096, 4096), 3), ((64, 64), 1)), 1 << 14)
    assert rows == [198, 1 << 14]
    assert full == pytest.approx(0.001 * 4 * (1 << 14))
    assert half == pytest.approx(2 * full)


@pytest.mark.parametrize(
    "full, half, expected", [(1.9, 1.0, True), (1.21, 1.0, True), (1.1, 1.0, False), (0.5, 1.0, False)]
)
def test_bf16_needs_the_margin(monkeypatch: pytest.MonkeyPatch, full: float, half: float, expected: bool) -> None:
    monkeypatch.setattr(choices, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(choices, "timed_products", lambda shapes, tokens: (full, half))
    fast, reason = choose_bf16(CPU, SHAPES, 256)
    assert fast is expected
    assert f"{full / half:.2f} times as fast" in reason
    assert ("less than 1.2" in reason) is not expected


def test_what_this_machine_gets_is_told_with_its_reason() -> None:
    fast, reason = choose_bf16(CPU, SHAPES, 256)
    if has_fast_bf16(CPU):
        assert "times as fast in bf16" in reason
    else:
        assert not fast
        assert reason == "this CPU has neither AVX512-BF16 nor AMX"
