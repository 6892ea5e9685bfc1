"""Preference tuning: trl's losses on our rows, in runs that keep what all runs promise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptcli.errors import CheckpointError, DivergedError, RecipeError, StoppedError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.begin import Options
from gptcli.train.run import train
from tests.pairs_data import METHODS, make_pairs, write_rows
from tests.runs import assert_same
from tests.tiny import shared_tokenizer

pytest.importorskip("trl", reason="preference tuning needs the extra rl")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


def run(folder: Path, name: str, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    loaded = load_recipe(str(folder / "pairs.yaml"), [f"output_dir={folder}/runs", f"name={name}", *overrides])
    return train(loaded, Options("finetune", stop_after=stop_after), Silent())


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def log_probability(model: Any, prompt: str, answer: str) -> float:
    """Of an answer and the token that ends it, by transformers alone."""
    tokenizer = shared_tokenizer()
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(before) - 1 + place, token]) for place, token in enumerate(after))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_and_goes_on_is_the_run_that_never_stopped(project: Path, method: str) -> None:
    run(project, f"{method}-whole", *METHODS[method])
    with pytest.raises(StoppedError):
        run(project, f"{method}-stopped", *METHODS[method], "train.save_every=0", stop_after=2)
    run(project, f"{method}-stopped", *METHODS[method], "train.save_every=2")
    assert_same(project / "runs" / f"{method}-stopped", project / "runs" / f"{method}-whole")


def test_the_margin_that_is_logged_is_that_of_the_weights_and_dpo_raises_it(project: Path) -> None:
    held_out = [{"prompt": "the mat", "chosen": " the cat", "rejected": " hello"}]
    held_out += [{"prompt": "hello world", "chosen": " the cat", "rejected": " world sat on"}]
    file = write_rows(project / "held-out.jsonl", held_out)
    run(project, "margin", *METHODS["dpo"], "finetune.beta=0.2", "train.max_steps=12", f"data.validation={file}")
    first, *_, last = (line["validation"] for line in lines(project, "margin") if "validation" in line)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (project / "base", project / "runs" / "margin" / "final")
    )

    def gain(row: dict[str, str], side: str) -> float:
        return log_probability(after, row["prompt"], row[side]) - log_probability(before, row["prompt"], row[side])

    margins = [0.2 * (gain(row, "chosen") - gain(row, "rejected")) for row in held_out]
    assert last["margin"] == pytest.approx(sum(margins) / 2, abs=1e-4)
    assert last["loss"] == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 2, abs=1e-4)
    assert last["margin"] > first["margin"] > 0
    assert last["accuracy"] == 1.0


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_loss_begins_where_model_and_reference_are_the_same(project: Path, method: str) -> None:
    run(project, f"{method}-first", *METHODS[method], "train.max_steps=1", "train.log_every=1")
    first = lines(project, f"{method}-first")[0]
    assert first["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-5)
    assert first["rewards/chosen"] == first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert first["tokens"] > 0


def test_accumulation_does_not_change_the_result(project: Path) -> None:
    losses = []
    for size in (8, 2):
        run(project, f"micro-{size}", *METHODS["dpo"], f"train.micro_batch_size={size}", "train.log_every=1")
        losses.append([line["loss"] for line in lines(project, f"micro-{size}") if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_loss_that_is_not_finite_names_the_rows(project: Path) -> None:
    with pytest.raises(DivergedError, match="not finite") as raised:
        run(project, "nan", *METHODS["dpo"], "train.learning_rate=1e30", "train.max_grad_norm=0", "train.warmup=0")
    assert "pairs.jsonl:" in (raised.value.remedy or "")


def test_a_changed_starting_model_is_no_reference_of_the_run(tmp_path: Path) -> None:
    folder = make_pairs(tmp_path)
    with pytest.raises(StoppedError):
        run(folder, "changed", *METHODS["dpo"], stop_after=2)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder / "base")
    with pytest.raises(CheckpointError) as raised:
        run(folder, "changed", *METHODS["dpo"])
    assert "reference model" in (raised.value.remedy or "")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.compile=true"], "train.compile"),
        (["train.max_steps=null", "train.max_tokens=1000"], "train.max_tokens"),
        (["train.trainer_args.beta=1"], "train.trainer_args.beta"),
        (["train.trainer_args.sync_ref_model=true"], "train.trainer_args.sync_ref_model"),
        (["data.overlong=split"], "data.overlong"),
        (["data.preference.label=label"], "data.preference"),
        (["train.early_stopping_patience=1", "train.best_metric=validation.bits_per_byte"], "train.best_metric"),
    ],
)
def test_what_it_cannot_do_is_refused_by_its_key(project: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError, match=f"^{key}"):
        run(project, "refused", *METHODS["dpo"], *overrides)
    assert not (project / "runs" / "refused").exists()


def test_the_completions_of_a_prompt_divide_a_step(project: Path) -> None:
    with pytest.raises(RecipeError, match="no multiple of the 3 of a prompt"):
        run(project, "groups", *METHODS["grpo"], "train.trainer_args.num_generations=3")


def test_grpo_raises_the_mean_reward(project: Path) -> None:
    run(
        project,
        "reward",
        *METHODS["grpo"],
        "finetune.reward={regex: a}",
        "train.max_steps=40",
        "train.global_batch_size=32",
        "train.micro_batch_size=32",
        "train.learning_rate=1e-2",
        "train.log_every=10",
        "train.eval_every=0",
        "train.save_every=0",
    )
    rewards = [line["reward"] for line in lines(project, "reward") if "reward" in line]
    assert rewards[-1] > rewards[0] + 0.2
