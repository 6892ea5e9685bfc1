"""What is said when memory runs out: each change is one that can be typed, and it saves what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.device import free_memory, is_out_of_memory
from gptcli.model.build import TokenIds, build_config, count_parameters
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.train.decisions import Hardware
from gptcli.train.plan import Plan, make_plan
from gptcli.train.shortage import out_of_memory, savings
from tests.conftest import make_project

IDS = TokenIds(258, 256, 256, 257)
CPU = Hardware("cpu", False, 1, 1 << 34)


def planned(loaded: LoadedRecipe) -> tuple[Plan, tuple]:  # type: ignore[type-arg]
    config, _ = build_config(loaded, IDS)
    counts = count_parameters(config)
    return make_plan(loaded, counts, CPU, rows_per_epoch=100), (loaded, config, counts)


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        ((), "model.config.num_hidden_layers=1"),
        (("model.config=null", "model={type: llama, preset: 124m}"), "model.preset=30m"),
        (
            ("model.config=null", "model={type: gpt2, config: {n_layer: 6, n_embd: 64, n_head: 2}}"),
            "model.config.n_layer=3",
        ),
        (("model.preset=10m",), "model.config.num_hidden_layers=1"),
        (("train.optimizer=muon", "model.config=null", "model={type: qwen3, preset: 10m}"), "model.preset=1m"),
    ],
)
def test_each_change_is_an_override_that_saves_what_is_said(
    tmp_path: Path, overrides: tuple[str, ...], model: str
) -> None:
    path = str(make_project(tmp_path) / "tiny.yaml")
    settings = ("train.micro_batch_size=4", *overrides)
    plan, known = planned(load_recipe(path, settings))
    found = savings(*known, plan)
    changes = {each.change.split("=")[0] for each in found}
    assert "train.optimizer" in changes
    # Where most is in use when all gradients are there, fewer activations save little or nothing.
    fewer = {"train.micro_batch_size", "train.activation_checkpointing", "data.sequence_length"}
    assert fewer <= changes or plan.memory["gradients"] == 4 * plan.parameters
    assert model in {each.change for each in found}
    for each in found:
        then, _ = planned(load_recipe(path, (*settings, each.change)))
        saved = plan.memory_bytes - then.memory_bytes
        # Shorter rows make GPT-2's table of positions smaller as well, which is little.
        assert each.saved_bytes == pytest.approx(saved, rel=0.01) and saved > 0, each.change


def test_the_most_stands_first_and_all_fit_on_the_screen(tmp_path: Path) -> None:
    settings = ["model.config=null", "model.preset=1.5b", "train.micro_batch_size=4", "data.sequence_length=1024"]
    plan, known = planned(load_recipe(str(make_project(tmp_path) / "tiny.yaml"), settings))
    error = out_of_memory("full", *known, plan, torch.device("cpu"))
    lines = error.lines()
    assert lines[0] == "full"
    assert len(lines) == 8
    by_saving = sorted(savings(*known, plan), key=lambda each: each.saved_bytes, reverse=True)
    assert [line.split()[0] for line in lines[2:]] == [each.change for each in by_saving[:6]]


def test_a_model_that_is_continued_keeps_its_size(tmp_path: Path) -> None:
    plan, (loaded, config, counts) = planned(load_recipe(str(make_project(tmp_path) / "tiny.yaml")))
    continued = load_recipe(str(tmp_path / "tiny.yaml"), ["model={from: somewhere}", "train.micro_batch_size=1"])
    found = {each.change.split("=")[0] for each in savings(continued, config, counts, plan)}
    assert found == {
        "train.activation_checkpointing",
        "data.sequence_length",
        "train.optimizer",
        "train.micro_batch_size",
    }
    assert loaded.recipe.model is not None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_freeing_lets_go_of_what_the_frames_of_an_error_hold() -> None:
    freed = []

    class Large:
        def __del__(self) -> None:
            freed.append(True)

    def fill() -> None:
        held = Large()
        raise MemoryError(str(type(held)))

    try:
        fill()
    except MemoryError as error:
        assert not freed
        free_memory(error)
        assert freed
        assert error.__traceback__ is not None
