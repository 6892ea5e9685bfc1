"""Preference tuning through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.pairs_data import METHODS, make_pairs

pytest.importorskip("trl", reason="preference tuning needs the extra rl")


def test_dpo_of_200_pairs_raises_the_margin_of_held_out_ones_and_goes_on(run_cli: Cli, tmp_path: Path) -> None:
    folder = make_pairs(tmp_path, 200)
    settings = ["pairs.yaml", *METHODS["dpo"], "train.max_steps=20", "train.eval_at_start=true", "train.sample_every=0"]
    done = run_cli("finetune", *settings, "--json", cwd=folder)
    assert done.code == 0, done.err
    result = done.json()
    assert "train: 20 steps of 8 pairs of at most" in done.err
    lines = [json.loads(line) for line in (folder / "runs" / "pairs" / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = (line["validation"] for line in lines if "validation" in line)
    assert before["margin"] == pytest.approx(0, abs=1e-6)
    assert after["margin"] > 0.3 and after["accuracy"] > 0.9 and after["loss"] < before["loss"]
    assert result["validation"] == {key: after[key] for key in ("loss", "bits_per_byte", "margin", "accuracy")}
    assert result["tokens"] == lines[-2]["tokens"]
    assert json.loads((folder / "runs" / "pairs" / "run.json").read_text())["loss_unit"] == "of dpo"
    # A longer run goes on from there, without a second look at what is done.
    more = run_cli("finetune", *settings, "train.max_steps=22", cwd=folder)
    assert more.code == 0 and "resuming pairs from checkpoint-20" in more.out
