"""`gptcli plan` for machines that are not here, as a user types it (its figures: tests/unit/train/test_estimate.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli


@pytest.mark.slow_fault
def test_eight_of_a_card_that_is_not_here(run_cli: Cli, project: Path, tmp_path: Path) -> None:
    settings = ("train.global_batch_size=16", "train.precision=auto")
    arguments = ("plan", "tiny.yaml", *settings, "--processes", "8", "--device", "h100")
    cache = {"GPTCLI_CACHE": str(tmp_path / "cache")}
    shown = run_cli(*arguments, cwd=project, **cache)
    assert shown.code == 0, shown.err
    assert "8 x H100, bf16" in shown.out and "ddp (chosen)" in shown.out
    found = run_cli(*arguments, "--json", cwd=project, **cache).json()
    assert found["processes"] * found["micro_batch_size"] * found["gradient_accumulation_steps"] == 16
    assert set(found["strategies"]) == {"ddp", "fsdp", "zero1", "zero2", "zero3"}
    assert not (tmp_path / "cache" / "choices").exists(), "something was timed here"


def test_a_card_that_is_not_known_is_a_usage_error_with_the_nearest(run_cli: Cli, project: Path) -> None:
    done = run_cli("plan", "tiny.yaml", "--device", "rtx4090", cwd=project)
    assert done.code == 2
    assert "rtx-4090" in done.err
