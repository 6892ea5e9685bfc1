"""A step that runs out of memory is begun again in smaller micro-batches, as if it had begun with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gptcli.errors import OutOfMemoryError, StoppedError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.begin import Options
from gptcli.train.run import train
from tests.conftest import make_project


class Warnings(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


@contextmanager
def running_out(*passes: int) -> Iterator[None]:
    """In the given passes (counted from 1) the backward pass fails at the first layer, half-way through."""
    seen = 0

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal seen
        if type(module).__name__ == "LlamaDecoderLayer" and getattr(module.self_attn, "layer_idx", None) == 0:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and not hidden.is_meta:  # the plan counts what a pass keeps without memory
                seen += 1
                if seen in passes:
                    hidden.register_hook(fail)

    handle = register_module_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def run(folder: Path, name: str, *overrides: str, stop_after: int | None = None) -> tuple[Path, list[str]]:
    warnings = Warnings()
    settings = [f"output_dir={folder}/runs", f"name={name}", "train.global_batch_size=8", "train.log_every=1"]
    loaded = load_recipe(str(folder / "tiny.yaml"), [*settings, "train.sample_every=0", *overrides])
    train(loaded, Options("pretrain", stop_after=stop_after), warnings)
    return folder / "runs" / name, warnings.said


def figures(run_folder: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("validation")) for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def by_twos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("by-twos"))
    return run(folder, "by-twos", "train.micro_batch_size=2")[0]


def test_what_the_failed_pass_and_those_before_it_left_is_dropped(tmp_path: Path, by_twos: Path) -> None:
    # The second of two micro-batches of the first step: what the first one left is there, and half of its own.
    with running_out(2):
        found, said = run(make_project(tmp_path), "x", "train.micro_batch_size=4")
    assert said == [
        "out of memory in step 1: the micro-batch is 2 rows from now on, accumulation 4; the global batch stays 8"
    ]
    assert figures(found) == figures(by_twos)
    assert_same_weights(found, by_twos)


def test_a_half_that_does_not_fit_either_is_halved_again(tmp_path: Path, by_twos: Path) -> None:
    with running_out(1, 2):
        found, said = run(make_project(tmp_path), "x", "train.micro_batch_size=8")
    assert [line.split(" rows")[0] for line in said] == [
        f"out of memory in step 1: the micro-batch is {n}" for n in (4, 2)
    ]
    assert figures(found) == figures(by_twos)
    assert_same_weights(found, by_twos)


def test_three_rows_become_one(tmp_path: Path) -> None:
    settings = ("train.global_batch_size=9", "train.max_steps=2")
    with running_out(2):
        found, said = run(make_project(tmp_path), "x", *settings, "train.micro_batch_size=3")
    assert "the micro-batch is 1 row from now on, accumulation 9" in said[0]
    by_ones, _ = run(make_project(tmp_path), "y", *settings, "train.micro_batch_size=1")
    assert figures(found) == figures(by_ones)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow_fault)])
@pytest.mark.parametrize("blocks_until_rows", [1, 4])
def test_a_resume_after_it_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, blocks_until_rows: int
) -> None:
    # Step 3 of 8. Whether logits are made in blocks depends on the micro-batch: 4 rows are, 2 rows in one of the cases.
    monkeypatch.setattr("gptcli.train.plan.LOGIT_BYTES", 4 * 258 * (32 * blocks_until_rows - 1))
    monkeypatch.setattr("gptcli.train.plan.LEAST_BLOCK", 16)
    through, broken = tmp_path / "through", tmp_path / "broken"
    for folder in (through, broken):
        folder.mkdir()
        make_project(folder)
    settings = ("train.micro_batch_size=4", f"train.precision={precision}")
    with running_out(6):
        whole, _ = run(through, "x", *settings)
    with running_out(6), pytest.raises(StoppedError):
        run(broken, "x", *settings, stop_after=5)
    resumed, said = run(broken, "x", *settings)
    block = json.loads((resumed / "run.json").read_text())["plan"]["loss_block"]
    assert (block is not None) == (blocks_until_rows == 1)
    assert not said
    assert json.loads((resumed / "run.json").read_text())["plan"]["micro_batch_size"] == 2
    assert figures(resumed) == figures(whole)
    assert_same_weights(resumed, whole)


def test_one_row_that_does_not_fit_ends_with_code_6(tmp_path: Path) -> None:
    with (
        running_out(1, 2, 3),
        pytest.raises(OutOfMemoryError, match=r"one row of 32 tokens does not fit \(step 1\)") as caught,
    ):
        run(make_project(tmp_path), "x", "train.micro_batch_size=4")
    assert caught.value.exit_code == 6
    assert "train.micro_batch_size" not in str(caught.value.remedy)


def test_memory_that_runs_out_in_the_optimizer_is_not_tried_again(tmp_path: Path) -> None:
    def fail(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = register_optimizer_step_pre_hook(fail)
    try:
        with pytest.raises(
            OutOfMemoryError, match="after 0 finished steps, outside of a forward or backward"
        ) as caught:
            run(make_project(tmp_path), "x")
    finally:
        handle.remove()
    assert "train.optimizer=adafactor saves about" in str(caught.value.remedy)


def test_another_error_of_a_pass_is_not_taken_for_it(tmp_path: Path) -> None:
    def fail(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "LlamaDecoderLayer" and output[0].requires_grad:
            raise RuntimeError("shapes cannot be multiplied")

    handle = register_module_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="shapes"):
            run(make_project(tmp_path), "x")
    finally:
        handle.remove()
