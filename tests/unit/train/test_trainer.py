"""The trainer against plain loops: what is trained, in which order, with which loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptcli.data.dataset import TrainingRows
from gptcli.data.tokenize import prepare
from gptcli.errors import DivergedError
from gptcli.evaluation.loss import LossResult
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train import loss as loss_module
from gptcli.train import trainer as trainer_module
from gptcli.train.begin import Options
from gptcli.train.run import train
from tests.conftest import make_project


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, name: str, *overrides: str) -> Path:
    loaded = load_recipe(str(folder / "tiny.yaml"), [f"output_dir={folder}/runs", f"name={name}", *overrides])
    train(loaded, Options("pretrain"), Silent())
    return folder / "runs" / name


def losses(run_folder: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_training_equals_a_plain_loop_over_the_same_rows(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    overrides = ("train.log_every=1", "train.lr_scheduler=constant", "train.warmup=0", "train.max_steps=6")
    done = run(folder, "ours", *overrides)
    loaded = load_recipe(str(folder / "tiny.yaml"), overrides)
    prepared = prepare(loaded, Silent())
    rows = TrainingRows(prepared.train, sequence_length=32, seed=1337, shuffle=True)

    # The starting weights are those of a run of the same seed that never moved.
    start = run(folder, "start", *overrides, "train.learning_rate=1e-30", "train.weight_decay=0", "train.max_steps=1")
    model = AutoModelForCausalLM.from_pretrained(start / "final")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    expected = []
    for step in range(6):
        batch = torch.from_numpy(rows.batch(np.arange(step * 4, step * 4 + 4)))
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses(done) == pytest.approx(expected, abs=1e-5)


def test_accumulation_does_not_change_the_result(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    whole = run(folder, "whole", "train.micro_batch_size=4", "train.log_every=1")
    split = run(folder, "split", "train.micro_batch_size=1", "train.log_every=1")
    assert losses(whole) == pytest.approx(losses(split), abs=1e-5)
    one, other = (load_file(folder_ / "final" / "model.safetensors") for folder_ in (whole, split))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_weights_of_the_recipe_reach_the_rows_and_are_told_with_the_epochs(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    (folder / "more.txt").write_text("One more sentence stands here. " * 300, encoding="utf-8")
    said: list[str] = []

    class Lines(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    def weighted(name: str, sources: str) -> list[float]:
        overrides = [f"output_dir={folder}/runs", f"name={name}", "train.log_every=1", "train.max_steps=3"]
        train(load_recipe(str(folder / "tiny.yaml"), [*overrides, sources]), Options("pretrain"), Lines())
        return losses(folder / "runs" / name)

    text = "{path: %s, weight: %s}"
    one, other = ((text % (folder / "text.txt", a), text % (folder / "more.txt", b)) for a, b in ((7, 3), (0.7, 0.3)))
    first = weighted("a", f"data.train=[{', '.join(one)}]")
    lines = [line for line in said if line.startswith("mixing: ")]
    assert [line.split(",")[0] for line in lines] == [
        "mixing: text.txt: 70% of the rows",
        "mixing: more.txt: 30% of the rows",
    ]
    assert weighted("b", f"data.train=[{', '.join(other)}]") == first
    assert weighted("c", f"data.train=[{folder}/text.txt, {folder}/more.txt]") != first


def test_epochs_end_with_a_smaller_token_weighted_step(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    done = run(folder, "epoch", "train.max_steps=null", "train.epochs=0.05", "train.micro_batch_size=2")
    rows = json.loads((done / "run.json").read_text())["plan"]
    last = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines() if "tokens_per" in line][-1]
    assert last["tokens"] == rows["total_rows"] * 32
    assert rows["total_rows"] % 4 != 0


def test_final_loads_in_transformers_and_keeps_the_cache_on(tmp_path: Path) -> None:
    final = run(make_project(tmp_path), "x") / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.decode(tokenizer("Grüße, 世界 🎉")["input_ids"]) == "Grüße, 世界 🎉"
    assert not (final / "training_args.bin").exists()
    assert (final / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_a_gradient_that_is_not_finite_stops_before_the_update_and_names_step_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(tmp_path)
    real = loss_module.summed_loss
    calls = 0

    def poisoned(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(logits, labels) * (float("nan") if calls == 6 else 1.0)

    monkeypatch.setattr(loss_module, "summed_loss", poisoned)
    with pytest.raises(DivergedError, match="step 6") as caught:
        run(folder, "nan")
    assert "rows are 20 to 23" in str(caught.value.remedy)
    assert caught.value.exit_code == 5
    checkpoint = folder / "runs" / "nan" / "checkpoint-4" / "model.safetensors"
    assert all(torch.isfinite(value).all() for value in load_file(checkpoint).values())
    assert json.loads((folder / "runs" / "nan" / "run.json").read_text())["status"] == "failed"


def test_evaluating_and_sampling_do_not_change_training(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    often = run(folder, "often", "train.eval_every=1", "train.sample_every=1", "train.eval_at_start=true")
    never = run(folder, "never", "train.eval_every=0", "train.sample_every=0", "data.validation={tail: 10%}")
    assert losses(often) == losses(never)


@pytest.mark.parametrize(
    "overrides", [("train.optimizer=adafactor", "train.lr_scheduler=polynomial"), ("train.optimizer=sgd",)]
)
def test_optimizers_and_schedules_of_transformers_work(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert all(np.isfinite(losses(run(make_project(tmp_path), "x", *overrides))))


def test_the_short_ways_through_a_step_change_nothing(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    short = run(folder, "short")
    usual = run(folder, "usual", "train.trainer_args={torch_empty_cache_steps: 1000}")
    assert losses(short) == losses(usual)
    one, other = (load_file(each / "final" / "model.safetensors") for each in (short, usual))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_in_blocks_trains_as_whole_logits_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_project(tmp_path)
    whole = losses(run(folder, "whole", "train.z_loss=0.01"))
    monkeypatch.setattr("gptcli.train.plan.LOGIT_BYTES", 4 * 258 * 4)
    monkeypatch.setattr("gptcli.train.plan.LEAST_BLOCK", 4)
    blocks = run(folder, "blocks", "train.z_loss=0.01")
    assert json.loads((blocks / "run.json").read_text())["plan"]["loss_block"] == 4
    assert losses(blocks) == pytest.approx(whole, abs=1e-4)


def test_z_loss_is_trained_on_and_left_out_of_the_logged_loss(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    without, strong = losses(run(folder, "without")), losses(run(folder, "strong", "train.z_loss=1.0"))
    assert strong[0] == without[0]
    assert strong[1:] != without[1:]


@pytest.mark.slow_fault
def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    half = losses(run(folder, "half", "train.precision=bf16", "train.max_steps=4"))
    full = losses(run(folder, "full", "train.precision=fp32", "train.max_steps=4"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow_fault)])
def test_the_validation_loss_is_the_evaluations(tmp_path: Path, precision: str) -> None:
    folder = make_project(tmp_path)
    done = run(folder, "x", f"train.precision={precision}")
    loaded = load_recipe(str(folder / "tiny.yaml"))
    validation = prepare(loaded, Silent()).validation
    assert validation is not None
    model = AutoModelForCausalLM.from_pretrained(done / "final")
    result: LossResult = trainer_module.validation_loss(model, validation, loaded.recipe, "fp32")
    said = json.loads((done / "run.json").read_text())["result"]["validation"]
    assert said["loss"] == pytest.approx(result.loss, abs=1e-6)
