"""One copy a batch, labels counted without a look at them, nothing within a step that waits for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.device import best_device
from gptcli.errors import MissingError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.runs.folder import RunFolder
from gptcli.train.arguments import training_arguments
from gptcli.train.assemble import assemble, look_at
from gptcli.train.begin import Options
from gptcli.train.rows import inputs_and_labels, label_count
from gptcli.train.run import train
from gptcli.train.trainer import CausalTrainer
from tests.conftest import make_project

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_labels_are_the_next_tokens_and_their_count_is_known() -> None:
    batch = torch.arange(12).view(3, 4)
    found = inputs_and_labels(batch, torch.device("cpu"))
    assert found["input_ids"].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert found["labels"].tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    assert found["labels"].numel() == label_count(batch) == 9


def test_a_step_gets_one_tensor_a_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[type, tuple[int, ...]]] = []
    real = CausalTrainer.training_step

    def step(self: CausalTrainer, model: object, inputs: torch.Tensor, count: object = None) -> torch.Tensor:
        seen.append((type(inputs), tuple(inputs.shape)))
        return real(self, model, inputs, count)

    monkeypatch.setattr(CausalTrainer, "training_step", step)
    folder = make_project(tmp_path)
    overrides = [f"output_dir={folder}/runs", "train.max_steps=1", "train.micro_batch_size=2"]
    train(load_recipe(str(folder / "tiny.yaml"), overrides), Options("pretrain"), Silent())
    assert seen == [(torch.Tensor, (2, 33))] * 2


def test_the_copy_to_a_gpu_is_pinned_and_not_waited_for(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    loaded = load_recipe(str(folder / "tiny.yaml"), ["train.precision=fp32"])
    plan = assemble(loaded, RunFolder(tmp_path / "run"), Silent()).plan
    made = training_arguments(loaded, plan, tmp_path / "run", "cuda")
    assert made.dataloader_pin_memory
    assert made.accelerator_config.non_blocking
    other = load_recipe(str(folder / "tiny.yaml"), ["train.trainer_args={accelerator_config: {non_blocking: false}}"])
    assert not training_arguments(other, plan, tmp_path / "run", "cuda").accelerator_config.non_blocking


def test_this_machine_is_looked_at() -> None:
    device = best_device()
    found = look_at(device)
    assert found.kind == device.type
    assert (found.capability is None) == (device.type != "cuda")
    assert found.memory_bytes > 0


@needs_none
@pytest.mark.parametrize("override", ["train.precision=fp16", "train.precision=fp8", "train.attention=flex_attention"])
def test_what_needs_a_gpu_is_refused_before_anything_is_spent(tmp_path: Path, override: str) -> None:
    folder = make_project(tmp_path)
    loaded = load_recipe(str(folder / "tiny.yaml"), [f"output_dir={folder}/runs", override])
    with pytest.raises(MissingError, match="needs a GPU"):
        train(loaded, Options("pretrain"), Silent())
    assert not (folder / "runs" / "tiny").exists()


@needs_gpu
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_no_step_between_log_lines_waits_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    real = CausalTrainer.training_step
    steps: list[int] = []

    def step(self: CausalTrainer, *inputs: object) -> torch.Tensor:
        # From here to the next call is a whole step: update, callbacks, the next batch.
        steps.append(self.state.global_step)
        torch.cuda.set_sync_debug_mode("error" if 3 <= self.state.global_step < 8 else "default")
        return real(self, *inputs)

    monkeypatch.setattr(CausalTrainer, "training_step", step)
    folder = make_project(tmp_path)
    settings = ["train.max_steps=12", "train.log_every=50", "train.eval_every=0", "train.save_every=0"]
    settings += ["train.sample_every=0", "data.validation=0", f"model.type={model}", "train.compile=false"]
    loaded = load_recipe(str(folder / "tiny.yaml"), [f"output_dir={folder}/runs", *settings])
    try:
        train(loaded, Options("pretrain"), Silent())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert max(steps) == 11


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_precision_trains_on_this_gpu(tmp_path: Path, precision: str, compiled: bool) -> None:
    folder = make_project(tmp_path)
    settings = [f"output_dir={folder}/runs", f"train.precision={precision}", f"train.compile={str(compiled).lower()}"]
    result = train(load_recipe(str(folder / "tiny.yaml"), settings), Options("pretrain"), Silent())
    assert result["status"] == "done"
    assert result["loss"] < 6.0
