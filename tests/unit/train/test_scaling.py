"""fp16's loss scaling with torch's own scaler (which runs on a CPU too): skipped steps are no divergence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from gptcli.errors import DivergedError, StoppedError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train import loss as loss_module
from gptcli.train.begin import Options
from gptcli.train.run import train
from tests.conftest import make_project


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def scaled() -> Iterator[None]:
    """fp16 on this CPU, which torch can and accelerate leaves out, with a scale that overflows at first."""
    real = Trainer.create_accelerator_and_postprocess

    def create(self: Trainer) -> None:
        real(self)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "create_accelerator_and_postprocess", create)
        yield


def run(folder: Path, name: str, *overrides: str) -> tuple[Path, list[str]]:
    # One that the short ways through a step leave out, as they do with fp16.
    usual = "train.trainer_args={torch_empty_cache_steps: 1000}"
    given = [f"output_dir={folder}/runs", f"name={name}", usual, "train.precision=fp32", *overrides]
    lines = Lines()
    train(load_recipe(str(folder / "tiny.yaml"), given), Options("pretrain"), lines)
    return folder / "runs" / name, lines.said


def steps(run_folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


# The fused AdamW is told on the device and skips there; Muon's step is not called.
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_is_said_keeps_its_place_and_leaves_the_weights_alone(tmp_path: Path, optimizer: str) -> None:
    folder = make_project(tmp_path)
    settings = (f"train.optimizer={optimizer}", "train.log_every=1")
    with scaled():
        done, said = run(folder, "scaled", *settings)
    lines = [line for line in said if "fp16:" in line]
    skipped = [row["step"] for row in steps(done) if row["grad_norm"] is None]
    assert 1 <= len(skipped) == len(lines) < 8
    assert skipped == list(range(1, len(skipped) + 1))
    assert "1 skipped, the gradient overflowed; loss scale 2.09715e+06 now" in lines[0]
    assert (done / "final" / "model.safetensors").exists()
    # Skipped or not, a step has the learning rate of its place.
    plain, _ = run(folder, "plain", *settings)
    assert [row["learning_rate"] for row in steps(done)] == [row["learning_rate"] for row in steps(plain)]


def test_ten_skipped_steps_in_a_row_are_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_project(tmp_path)
    real = loss_module.summed_loss
    monkeypatch.setattr(loss_module, "summed_loss", lambda *inputs: real(*inputs) * float("nan"))
    with scaled(), pytest.raises(DivergedError, match="10 steps in a row, up to step 10") as caught:
        run(folder, "nan", "train.max_steps=20", "train.log_every=1", "train.save_every=0", "train.eval_every=0")
    assert caught.value.exit_code == 5


def test_the_scale_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    with scaled():
        whole, _ = run(folder, "whole", "train.log_every=1")
    stopped = [f"output_dir={folder}/runs", "name=parts", "train.log_every=1", "train.precision=fp32"]
    stopped.append("train.trainer_args={torch_empty_cache_steps: 1000}")
    loaded = load_recipe(str(folder / "tiny.yaml"), stopped)
    with scaled():
        with pytest.raises(StoppedError):
            train(loaded, Options("pretrain", stop_after=4), Silent())
        train(loaded, Options("pretrain"), Silent())
    assert [row["loss"] for row in steps(folder / "runs" / "parts")] == [row["loss"] for row in steps(whole)]
