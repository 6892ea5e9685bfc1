"""The peers of `train.py` that need a script: run_clm's Trainer, and a bare loop over our own model (the limit).

    python benchmarks/peers_train.py trainer|trainer-plain|bare RECIPE

Prints the seconds of each step as a JSON list.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main() -> None:
    way, path = sys.argv[1:]
    recipe = json.loads(Path(path).read_text())
    times = bare(path) if way == "bare" else trainer(recipe, dropout=way == "trainer")
    print(json.dumps(times))


def trainer(recipe: dict[str, Any], *, dropout: bool) -> list[float]:
    """transformers' examples/pytorch/language-modeling/run_clm.py behind its tokenizing: blocks of ids, GPT-2."""
    from datasets import Dataset
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )

    data, train = recipe["data"], recipe["train"]
    length, batch, steps = data["sequence_length"], train["micro_batch_size"], train["max_steps"]
    vocabulary = len(json.loads((Path(recipe["tokenizer"]["from"]) / "tokenizer.json").read_text())["model"]["vocab"])
    ids = np.fromfile(data["train"]["tokens"], dtype=np.uint16)[: length * batch * (steps + 1)].reshape(-1, length)
    rows = ids.astype(np.int64).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * length] * len(rows)})
    none = {} if dropout else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, bos_token_id=0, eos_token_id=0, **recipe["model"]["config"], **none
    )
    times: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each step ends."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir="run_clm",
        per_device_train_batch_size=batch,
        max_steps=steps,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
        callbacks=[Clock()],
    ).train()
    return np.diff(times).tolist()


def bare(path: str) -> list[float]:
    """Our model, rows, loss and optimizer in the shortest loop."""
    from gptcli.cli.console import console
    from gptcli.data.dataset import TrainingRows
    from gptcli.model.activation import keep_derivatives
    from gptcli.model.attention import attend_in_blocks
    from gptcli.model.build import build_model
    from gptcli.recipe.load import load_recipe
    from gptcli.runs.folder import RunFolder
    from gptcli.train.assemble import assemble
    from gptcli.train.halves import Halves
    from gptcli.train.loss import TrainingLoss
    from gptcli.train.modes import BLOCKS
    from gptcli.train.optim import build_optimizer

    loaded = load_recipe(path, ())
    assembly = assemble(loaded, RunFolder(Path("runs/bare")), console(quiet=True))
    plan, train = assembly.plan, loaded.recipe.train
    model = build_model(loaded, assembly.config, seed=1, attention=None)
    keep_derivatives(model)
    if plan.attention == BLOCKS:
        attend_in_blocks(model)
    model.train()
    model.config.use_cache = False
    optimizer = build_optimizer(model, train)
    assert optimizer is not None and train.max_grad_norm is not None
    rows = TrainingRows(assembly.prepared.train, sequence_length=plan.sequence_length, seed=1, shuffle=True)
    loss_of = TrainingLoss(model, block=plan.loss_block, z_loss=train.z_loss)
    parameters = list(model.parameters())
    halves = Halves(parameters) if plan.halves else None
    batch = plan.micro_batch_size

    def run(inputs: dict[str, torch.Tensor]) -> None:
        ids = inputs["ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            _, _, objective = loss_of(model, {"input_ids": ids[:, :-1]}, ids[:, 1:])
            loss = objective / (batch * plan.sequence_length)
        loss.backward()

    times: list[float] = []
    for step in range(plan.steps):
        started = time.perf_counter()
        inputs = {"ids": torch.from_numpy(rows.batch(np.arange(step * batch, (step + 1) * batch)))}
        if halves is None:
            run(inputs)
        else:
            halves(inputs, run)
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
