"""Rows with and without images or sounds on two processes: the step of one process, whoever has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import team
from tests.media import FAMILIES, media_project, needs_media
from tests.runs import Forks, lines
from tests.unit.train.test_features import project


@pytest.mark.slow_fault
@needs_media
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_processes_take_the_steps_of_one(kind: str, tmp_path: Path, forks: Forks) -> None:
    media_project(tmp_path, kind)
    settings = ("pretrain", "r.yaml", "train.micro_batch_size=1", "train.max_steps=4")
    alone = forks(*settings, "name=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    team.run(forks, 2, *settings, "name=ddp", "launch.strategy=ddp", cwd=tmp_path)
    assert_equal(tmp_path / "runs" / "ddp", tmp_path / "runs" / "alone")


@pytest.mark.slow_fault
@needs_media
def test_features_that_one_process_makes_are_those_of_both(
    tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, "llava", monkeypatch)
    settings = ("finetune", "r.yaml", "train.micro_batch_size=1")
    alone = forks(*settings, "name=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    kept = ("name=ddp", "launch.strategy=ddp", "data.cache_features=true")
    done = team.run(forks, 2, *settings, *kept, cwd=tmp_path)
    assert "features: the outputs of vision_tower for" in done.out
    assert_equal(tmp_path / "runs" / "ddp", tmp_path / "runs" / "alone")


def assert_equal(run: Path, undivided: Path) -> None:
    found, expected = lines(run), lines(undivided)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            assert np.isclose(mine.get(key, 0), theirs.get(key, 0), rtol=1e-5, atol=0)
        if "validation" in theirs:
            assert np.isclose(mine["validation"]["loss"], theirs["validation"]["loss"], rtol=1e-5)
