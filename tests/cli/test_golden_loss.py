"""Training through the command line against a stored curve: a change of what is computed shows in thirty numbers.

python -m tests.cli.test_golden_loss        writes the curve anew, after a change that is meant
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli, make_project

CURVE = Path(__file__).with_name("golden_loss.json")
SETTINGS = (
    "train.max_steps=30",
    "train.log_every=1",
    "train.precision=fp32",
    "train.global_batch_size=8",
    "train.eval_every=0",
    "train.save_every=0",
    "data.validation=0",
)


def losses(run: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_thirty_steps_follow_the_stored_curve(tmp_path: Path, run_cli: Cli) -> None:
    done = run_cli("pretrain", "tiny.yaml", *SETTINGS, cwd=make_project(tmp_path))
    assert done.code == 0, done.err
    stored = json.loads(CURVE.read_text())
    found = losses(tmp_path / "runs" / "tiny")
    assert len(found) == len(stored) == 30
    assert found[0] == pytest.approx(stored[0], abs=1e-6)
    assert found == pytest.approx(stored, abs=1e-4)
    assert found[-1] < found[0] - 0.5  # the curve is one of learning


@pytest.mark.slow_fault
def test_one_micro_batch_of_eight_equals_eight_of_one(tmp_path: Path, run_cli: Cli) -> None:
    folder = make_project(tmp_path)
    # 0.3 epochs end in a step of fewer rows, which counts by its tokens.
    settings = [*SETTINGS[1:], "train.max_steps=null", "train.epochs=0.3"]
    for size in (1, 8):
        done = run_cli(
            "pretrain", "tiny.yaml", *settings, f"name=by{size}", f"train.micro_batch_size={size}", cwd=folder
        )
        assert done.code == 0, done.err
    one, eight = (losses(folder / "runs" / f"by{size}") for size in (1, 8))
    plan = json.loads((folder / "runs" / "by1" / "run.json").read_text())["plan"]
    assert plan["total_rows"] % 8
    assert one == pytest.approx(eight, abs=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "gptcli", "pretrain", "tiny.yaml", *SETTINGS]
        subprocess.run(command, cwd=make_project(Path(name)), check=True)
        CURVE.write_text(json.dumps(losses(Path(name) / "runs" / "tiny"), indent=0) + "\n")
