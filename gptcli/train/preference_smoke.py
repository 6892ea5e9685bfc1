"""What `--smoke` puts in the place of a preference recipe's model, rows and reward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.train.pair_encoder import columns_of

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter

# Bytes, which the stand-in's tokens are: some four times the tokens of a recipe's own tokenizer.
BYTES_LENGTH = 1024


def preference_cuts(loaded: LoadedRecipe, tiny: Path, reporter: Reporter) -> dict[str, Any]:
    """The keys of a toy that begins with the model in `tiny`."""
    recipe = loaded.recipe
    assert recipe.model is not None
    reporter.say(f"smoke: a tiny random {recipe.model.smoke_type} that reads bytes stands in for {recipe.model.from_}")
    cuts: dict[str, Any] = {
        "model": {"from": str(tiny)},
        "tokenizer": {
            "from": str(tiny),
            "chat_template": (recipe.tokenizer and recipe.tokenizer.chat_template) or "chatml",
        },
    }
    if recipe.finetune.method == "grpo":
        cuts["train.trainer_args.num_generations"] = 2
    return cuts


def reward_cuts(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    """A reward for rows that a function of the recipe does not know."""
    reward = loaded.recipe.finetune.reward
    if loaded.recipe.finetune.method != "grpo" or not isinstance(reward, str) or ".py:" not in reward:
        return {}
    reporter.say("smoke: a pattern stands in for the reward, whose rows are not here")
    return {"finetune.reward": {"regex": "e"}}


def synthetic_pair(loaded: LoadedRecipe, words: Sequence[str], seed: int) -> dict[str, Any]:
    """A row with the columns that a recipe names."""
    draw = random.Random(seed)
    preference = loaded.recipe.data.preference if loaded.recipe.data else None
    texts = {name: f"{name} {seed} {' '.join(draw.choices(words, k=4))}" for name in ("prompt", "chosen", "rejected")}
    values = {**texts, "completion": texts["chosen"], "label": bool(seed % 2)}
    row: dict[str, Any] = {column: values[name] for name, column in columns_of(loaded).items()}
    row[preference.reference if preference else "reference"] = texts["chosen"]
    return row


def save_tiny(toy: LoadedRecipe, folder: Path) -> Path:
    """A Hugging Face folder of a model of the toy's type and sizes, with random weights, and a tokenizer of bytes."""
    from gptcli.data.tokenizer import load_fast, save_bytes_tokenizer, special_ids
    from gptcli.model.build import TokenIds, build_config, build_model
    from gptcli.reporting import quiet

    folder.mkdir()
    save_bytes_tokenizer(folder)
    special = special_ids(folder)
    ids = TokenIds(load_fast(folder).get_vocab_size(), special.bos, special.eos, special.pad)
    config, _ = build_config(toy, ids)
    with quiet():
        build_model(toy, config, seed=toy.recipe.seed, attention=None).save_pretrained(folder)
    return folder
