"""Rows of documents on two processes: unlike numbers of labels on each, and the step of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import team
from tests.runs import Forks, lines
from tests.unit.train.test_packed import project


@pytest.mark.slow_fault
@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_two_processes_end_as_one(packing: str, tmp_path: Path, forks: Forks) -> None:
    folder = project(tmp_path, packing)
    settings = ("pretrain", "r.yaml", "train.micro_batch_size=2")
    alone = forks(*settings, "name=alone", cwd=folder)
    assert alone.code == 0, alone.err
    expected = lines(folder / "runs" / "alone")
    for strategy in ("ddp", "fsdp"):
        team.run(forks, 2, *settings, f"name={strategy}", f"launch.strategy={strategy}", cwd=folder)
        found = lines(folder / "runs" / strategy)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for mine, theirs in zip(found, expected, strict=True):
            for key in ("loss", "grad_norm", "tokens"):
                assert np.isclose(mine.get(key, 0), theirs.get(key, 0), rtol=1e-5, atol=0)
            if "validation" in theirs:
                assert mine["validation"]["tokens"] == theirs["validation"]["tokens"]
                assert np.isclose(mine["validation"]["loss"], theirs["validation"]["loss"], rtol=1e-5)
