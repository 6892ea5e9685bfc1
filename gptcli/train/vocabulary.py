"""Whether the recipe's tokenizer is that of `model.from`, and which of its tokens are new to the model.

A tokenizer may have more tokens than the model's own (a chat template's, say): those get rows of embeddings. One whose
ids mean other texts is refused: the model would have to be trained anew, and nothing but a bad loss would tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.data.tokenizer import load_fast
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import DataError, MissingError, RecipeError
from gptcli.train.pairs import PreparedPairs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from gptcli.data.tokenize import Prepared
    from gptcli.recipe.load import LoadedRecipe

SHOWN = 4


@dataclass(frozen=True)
class Vocabulary:
    """Rows that a model's embeddings need at least, and the tokens, by their ids, that it was not trained on."""

    size: int
    new: Mapping[int, str]

    def __str__(self) -> str:
        names = [*self.new.values()][:SHOWN]
        more = f" and {len(self.new) - SHOWN:,} more" if len(self.new) > SHOWN else ""
        return (
            f"{len(self.new):,} tokens are new to it ({', '.join(names)}{more}): they begin at the mean of the others"
        )


def vocabulary_of(loaded: LoadedRecipe, prepared: Prepared | PreparedPairs, config: PreTrainedConfig) -> Vocabulary:
    """Compare the tokenizer of the data with the one that lies beside `model.from`, if one does.

    Raises:
        RecipeError: their ids mean different texts.
    """
    model = loaded.recipe.model
    assert model is not None and model.from_ is not None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    entries = prepared.vocab_size if isinstance(prepared, PreparedPairs) else prepared.train.vocab_size
    rows = rows if isinstance(rows, int) else entries
    given = _entries(prepared.tokenizer)
    size = max(rows, entries, max(given, default=0) + 1)
    try:
        own = import_tokenizer(model.from_, revision=model.revision)
    except (MissingError, DataError):  # the model comes without one: nothing is known but its size
        return Vocabulary(size, {number: token for number, token in sorted(given.items()) if number >= rows})
    if own == prepared.tokenizer:
        return Vocabulary(size, {})
    known = _entries(own)
    other = {number for number in given.keys() & known.keys() if given[number] != known[number]}
    # Tokens that were reserved for later use are often renamed.
    other -= _added(prepared.tokenizer) & _added(own)
    if other:
        first = min(other)
        raise RecipeError(
            f"the tokenizer is not that of {model.from_}: {len(other):,} of the ids of both mean other texts "
            f"({first} is {known[first]!r} to the model and {given[first]!r} here)",
            where=loaded.where("tokenizer"),
            remedy="Leave out tokenizer: to use the model's own.",
        )
    new = {number: token for number, token in sorted(given.items()) if known.get(number) != token}
    return Vocabulary(size, new)


def _entries(folder: Path) -> dict[int, str]:
    return {number: token for token, number in load_fast(folder).get_vocab(with_added_tokens=True).items()}


def _added(folder: Path) -> set[int]:
    """The ids of the tokens that are whole texts and not made by merges."""
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {int(token["id"]) for token in told.get("added_tokens") or ()}
