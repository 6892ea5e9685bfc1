"""Small preference data and a tiny model to train on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny import save_model

WORDS = ["the", "cat", "sat", "on", "mat", "hello", "world"]

RECIPE = """\
name: pairs
model: {from: base}
data:
  train: pairs.jsonl
  format: preference
  validation: 15%
  sequence_length: 64
train:
  max_steps: 4
  global_batch_size: 8
  micro_batch_size: 4
  learning_rate: 1e-3
  log_every: 3
  eval_every: 2
  save_every: 2
  sample_every: 2
  precision: fp32
generate: {prompts: [the cat], max_new_tokens: 6}
"""
METHODS = {
    "dpo": ["finetune.method=dpo"],
    "dpo-lora": ["finetune.method=dpo", "finetune.adapter=lora", "finetune.merge=true"],
    "kto": ["finetune.method=kto"],
    "orpo": ["finetune.method=orpo"],
    "grpo": ["finetune.method=grpo", "finetune.reward={regex: e}", "train.trainer_args.num_generations=4"],
}


def pair(number: int) -> dict[str, Any]:
    """A row with the columns of all methods; answers that begin with a cat are the good ones."""
    draw = random.Random(number)
    good, bad = " the cat", f" {draw.choice(['hello', 'world'])} {draw.choice(WORDS)}"
    return {
        "prompt": " ".join(draw.choices(WORDS, k=4)),
        "chosen": good,
        "rejected": bad,
        "completion": good if number % 2 else bad,
        "label": bool(number % 2),
        "reference": good,
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def make_pairs(folder: Path, count: int = 60) -> Path:
    """A folder with a recipe, its pairs and the model that it begins with."""
    write_rows(folder / "pairs.jsonl", [pair(number) for number in range(count)])
    (folder / "pairs.yaml").write_text(RECIPE, encoding="utf-8")
    save_model(folder / "base", context=128)
    return folder
