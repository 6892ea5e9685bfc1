"""Faults 19 and 20: a step whose numbers are not finite, or far above the last ones, changes no weight unless it may.

The poison is in the input, not in the code: a model whose embedding of one letter is NaN, so that every batch with that
letter has a NaN loss and no other has; and a text of one line over and over, in the middle of which is noise.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gptcli.data.dataset import TrainingRows
from gptcli.data.tokenize import prepare
from gptcli.model.load import load_tokenizer
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.conftest import Cli, Finished, make_project

LETTER = "Z"
STEPS = 12
RECIPE = ("model.from=poisoned", f"train.max_steps={STEPS}", "train.log_every=1", "train.save_every=4")
PLAIN = ("train.lr_scheduler=linear", "train.warmup=0", "train.optimizer=adamw", "generate.prompts=[]")


def poison(folder: Path, letter: str) -> None:
    """A model as in the recipe, whose embedding of one letter is no number."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[letter_id(folder, letter)] = float("nan")
    model.save_pretrained(folder / "poisoned")


def letter_id(folder: Path, letter: str) -> int:
    prepared = prepare(load_recipe(str(folder / "tiny.yaml"), RECIPE), Silent())
    tokenizer = load_tokenizer(prepared.tokenizer)
    (token,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
    return int(token)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_poisoned(tmp_path_factory.mktemp("poisoned"))


def make_poisoned(folder: Path) -> Path:
    """A project of which some rows hold the letter."""
    make_project(folder)
    recipe = (folder / "tiny.yaml").read_text()
    start, end = recipe.index("model:"), recipe.index("train:\n  max_steps")
    (folder / "tiny.yaml").write_text(recipe[:start] + "model: {from: poisoned}\n" + recipe[end:])
    text = (folder / "text.txt").read_text()
    paragraphs = text.split("\n\n")
    for index in range(0, len(paragraphs), 2):
        paragraphs[index] = f"{paragraphs[index][:20]}{LETTER}{paragraphs[index][20:]}"
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    poison(folder, LETTER)
    return folder


def batches(folder: Path, *overrides: str) -> list[torch.Tensor]:
    """What each step of the run reads: [4, 33]."""
    loaded = load_recipe(str(folder / "tiny.yaml"), [*RECIPE, *PLAIN, *overrides])
    rows = TrainingRows(prepare(loaded, Silent()).train, sequence_length=32, seed=1337, shuffle=True)
    return [torch.from_numpy(rows.batch(np.arange(4 * step, 4 * step + 4))) for step in range(STEPS)]


def poisoned_steps(folder: Path) -> list[int]:
    poison = letter_id(folder, LETTER)
    steps = [step for step, ids in enumerate(batches(folder), 1) if (ids[:, :-1] == poison).any()]
    assert steps and 1 < steps[0] < STEPS
    return steps


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pretrain(cli: Cli, folder: Path, *overrides: str) -> Finished:
    done = cli("pretrain", "tiny.yaml", *RECIPE, *PLAIN, *overrides, cwd=folder, COLUMNS="1000")
    assert "Traceback" not in done.err
    return done


def test_a_nan_stops_before_the_update_and_is_never_saved(project: Path, run_cli: Cli) -> None:
    first = poisoned_steps(project)[0]
    done = pretrain(run_cli, project, "name=stops", "train.save_every=1")
    assert done.code == 5
    rows = f"{4 * first - 4} to {4 * first - 1}"
    lines = done.err.strip().splitlines()
    where = f"error: {project}/runs/stops: the gradient of step {first} is not finite (norm nan, loss nan)"
    assert lines[0] == where
    assert lines[1].startswith(f"  The step's rows are {rows} of the run: ")
    assert lines[2:] == [
        "  Nothing was saved since; the last checkpoint is good.",
        "  Try a lower train.learning_rate, more train.warmup, or look at those rows.",
    ]
    run = project / "runs" / "stops"
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, first))
    assert {path.name for path in run.glob("checkpoint-*")} <= {f"checkpoint-{step}" for step in range(1, first)}
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow_fault
def test_skipped_steps_leave_weights_and_optimizer_and_keep_their_place(project: Path, run_cli: Cli) -> None:
    poisoned = poisoned_steps(project)
    done = pretrain(run_cli, project, "name=skips", "train.non_finite=skip")
    assert done.code == 0, done.err
    run = project / "runs" / "skips"
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines if line.get("skipped")] == poisoned
    assert [line["step"] for line in lines if line["loss"] is None] == poisoned
    for step in poisoned:
        assert f"the gradient of step {step} is not finite (norm nan, loss nan); it is skipped" in done.err

    model = AutoModelForCausalLM.from_pretrained(project / "poisoned")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    for step, ids in enumerate(batches(project), 1):
        if step in poisoned:
            continue
        for group in optimizer.param_groups:
            group["lr"] = lines[step - 1]["learning_rate"]
        logits = model(input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = load_file(run / "final" / "model.safetensors")
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    rates = [line["learning_rate"] for line in lines]
    assert np.diff(rates) == pytest.approx(np.diff(rates)[0])  # the schedule moves on over skipped steps


@pytest.mark.slow_fault
def test_skipping_is_the_same_after_a_resume(project: Path, run_cli: Cli) -> None:
    first = poisoned_steps(project)[0]
    keep = ("train.non_finite=skip", "train.lr_scheduler=constant", "train.log_every=5", f"train.save_every={first}")
    assert pretrain(run_cli, project, "name=whole", *keep).code == 0
    assert pretrain(run_cli, project, "name=parts", *keep, f"train.max_steps={first}").code == 0
    done = pretrain(run_cli, project, "name=parts", *keep)
    assert done.code == 0, done.err
    whole, parts = (project / "runs" / name for name in ("whole", "parts"))
    steps = {"step": None, "loss": None, "skipped": None}
    later = [
        [{key: line.get(key) for key in steps} for line in metrics(run) if line["step"] > first and "loss" in line]
        for run in (whole, parts)
    ]
    assert later[0] == later[1]
    one, other = (load_file(run / "final" / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(torch.nan_to_num(one[name]), torch.nan_to_num(other[name])) for name in one)


@pytest.mark.slow_fault
def test_ten_skipped_steps_in_a_row_stop(project: Path, run_cli: Cli) -> None:
    try:
        poison(project, "e")
        done = pretrain(run_cli, project, "name=all", "train.non_finite=skip")
    finally:
        poison(project, LETTER)
    assert done.code == 5
    assert "10 steps in a row were skipped; the gradient of step 10 is not finite" in done.err


def noisy(folder: Path) -> Path:
    """A line over and over, which is learnt at once, and noise in the steps 61 and 62."""
    make_project(folder)
    line = "The same line again and again. "
    step_bytes = 4 * 32
    noise = "".join(random.Random(0).choices([chr(code) for code in range(33, 127)], k=2 * step_bytes))
    text = (line * 400)[: 60 * step_bytes] + noise + (line * 400)[: 30 * step_bytes]
    (folder / "text.txt").write_text(text)
    return folder


SPIKY = (
    *("data.validation=0", "data.train={path: text.txt, documents: file}", "data.shuffle=false"),
    *("train.max_steps=70", "train.log_every=1", "train.save_every=60", "generate.prompts=[]", "train.optimizer=adamw"),
    *("train.learning_rate=1e-2", "train.warmup=0"),
)


@pytest.mark.slow_fault
def test_a_spike_is_said_and_counted(tmp_path: Path, run_cli: Cli) -> None:
    done = run_cli("pretrain", "tiny.yaml", *SPIKY, cwd=noisy(tmp_path), COLUMNS="1000")
    assert done.code == 0, done.err
    assert "step 61 is a spike: loss " in done.err
    spikes = [line["step"] for line in metrics(tmp_path / "runs" / "tiny") if line.get("spikes")]
    assert spikes[0] == 61
    assert set(spikes) <= {61, 62}


@pytest.mark.slow_fault
def test_a_spike_is_skipped_or_stops_where_the_recipe_says_so(tmp_path: Path, run_cli: Cli) -> None:
    noisy(tmp_path)
    arguments = ("pretrain", "tiny.yaml", *SPIKY)
    done = run_cli(*arguments, "name=skips", "train.loss_spike=skip", cwd=tmp_path, COLUMNS="1000")
    assert done.code == 0, done.err
    lines = metrics(tmp_path / "runs" / "skips")
    assert [line["step"] for line in lines if line.get("skipped")] == [61, 62]
    assert lines[62]["loss"] < lines[59]["loss"]  # what was learnt is not lost

    stopped = run_cli(*arguments, "name=stops", "train.loss_spike=stop", cwd=tmp_path, COLUMNS="1000")
    assert stopped.code == 5
    assert "step 61 is a spike: loss " in stopped.err
    assert "rows are 240 to 243" in stopped.err
    assert len(stopped.err.strip().splitlines()) <= 8
