"""The rows of preference data: read, checked and encoded before the first step, and kept in memory.

A prompt is encoded as `generate` encodes it and an answer by itself with the token that ends it behind, so that the
model is trained on the ids that it sees when it is used. Answers that are messages come after the chat template's
prompt and end with the token that ends a turn. Rows with the same prompt are on the same side of the split.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.sources import source_name
from gptcli.data.split import split_of
from gptcli.data.tokenizer import tokenizer_fingerprint
from gptcli.errors import DataError, RecipeError
from gptcli.files import fingerprint
from gptcli.train.pair_encoder import Encoder
from gptcli.train.reward import check_reward

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Source
    from gptcli.reporting import Reporter


@dataclass
class Side:
    """The encoded rows of one side.

    Attributes:
        rows: what trl reads of each: lists of ids under `prompt_ids` and the names of the answers, `label` for kto; of
            grpo the row itself with its prompt under `prompt`.
        places: the file and line of each row.
        sequences: tokens of each sequence of each row: the prompt with each of its answers.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    sequences: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(map(sum, self.sequences))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(max, self.sequences))

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PreparedPairs:
    """Preference data, ready to train on; see `gptcli.data.tokenize.Prepared`."""

    tokenizer: Path
    tokenizer_fingerprint: str
    vocab_size: int
    train: Side
    validation: Side | None
    fingerprint: str
    report: dict[str, Any]


def is_preference(loaded: LoadedRecipe) -> bool:
    """Whether a recipe trains on preference data."""
    data = loaded.recipe.data
    return data is not None and data.format == "preference"


def prepare_pairs(loaded: LoadedRecipe, reporter: Reporter) -> PreparedPairs:
    """Read and encode the preference data of a recipe.

    Raises:
        RecipeError: keys that do not go with preference data.
        DataError: a row that is bad (unless they are skipped), or no rows on a side.
    """
    from gptcli.data.tokenize import find_tokenizer
    from gptcli.model.load import load_tokenizer

    data = loaded.recipe.data
    assert data is not None
    check_data(loaded)
    if loaded.recipe.finetune.method == "grpo":
        check_reward(loaded)
    unused: Any = None  # a tokenizer that is not trained needs no texts
    folder, _ = find_tokenizer(loaded, unused, reporter)
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(loaded, tokenizer)
    held_out = data.validation if isinstance(data.validation, list) else None
    split = split_of(data.validation)
    train, validation = Side(), Side()
    dropped: Counter[str] = Counter()
    for source, where in _sources(loaded, "train", data.train):
        for place, row, key in encoder.rows(source, where, dropped):
            _add(validation if split.holds_out(key.encode()) else train, place, row, encoder)
    for source, where in _sources(loaded, "validation", held_out or []):
        for place, row, _ in encoder.rows(source, where, dropped):
            _add(validation, place, row, encoder)
    _check_sides(loaded, train, validation, dropped)
    if encoder.method == "grpo":  # a reward function is given a value of every column for every row
        columns = dict.fromkeys(name for side in (train, validation) for row in side.rows for name in row)
        for side in (train, validation):
            side.rows[:] = [{**columns, **row} for row in side.rows]
    for reason, count in dropped.items():
        reporter.say(f"data: {count:,} {'row' if count == 1 else 'rows'} {reason}")
    of_tokenizer = tokenizer_fingerprint(folder)
    names = [source_name(source) for source in data.train]
    report = {
        "format": "preference",
        "rows": len(train),
        "train": {"rows": len(train), "tokens": train.tokens, "longest": train.longest, "sources": names},
        "validation": {"rows": len(validation), "tokens": validation.tokens} if len(validation) else None,
        "dropped": dict(dropped),
    }
    return PreparedPairs(
        folder,
        of_tokenizer,
        len(tokenizer),
        train,
        validation if len(validation) else None,
        fingerprint([of_tokenizer, train.rows, validation.rows]),
        report,
    )


def check_data(loaded: LoadedRecipe) -> None:
    """Refuse by name what preference data cannot have.

    Raises:
        RecipeError: the first of such keys.
    """
    data, recipe = loaded.recipe.data, loaded.recipe
    assert data is not None
    sources = [*data.train, *(data.validation if isinstance(data.validation, list) else [])]
    method = recipe.finetune.method
    refused = (
        ("finetune.method", method == "sft", "data.format preference is for dpo, kto, orpo and grpo", "method: dpo"),
        ("data.overlong", data.overlong == "split", "a pair is not split", "truncate, drop or error"),
        ("data.packing", "packing" in loaded.written.get("data", {}), "pairs are not packed", "leave it out"),
        ("data.deduplicate", data.deduplicate != "none", "pairs are not compared", "leave it out"),
        ("data.validation", hasattr(data.validation, "tail"), "pairs have no tail", "validation: 5%"),
        ("data.train", data.weights is not None, "pairs are not mixed by weights", "leave weight out"),
        ("data.train", any(source.tokens for source in sources), "tokens are no pairs", "path: pairs.jsonl"),
        ("tokenizer.train", bool(recipe.tokenizer and recipe.tokenizer.train), "the model has its own", "leave it out"),
    )
    for key, wrong, what, remedy in refused:
        if wrong:
            raise RecipeError(f"{key}: {what}", where=loaded.where(key), remedy=remedy)


def _add(side: Side, place: str, row: dict[str, Any], encoder: Encoder) -> None:
    side.rows.append(row)
    side.places.append(place)
    side.sequences.append(encoder.lengths(row))


def _sources(loaded: LoadedRecipe, side: str, sources: list[Source]) -> list[tuple[Source, str]]:
    return [(source, loaded.where(f"data.{side}.{index}.path")) for index, source in enumerate(sources)]


def _check_sides(loaded: LoadedRecipe, train: Side, validation: Side, dropped: Counter[str]) -> None:
    data = loaded.recipe.data
    assert data is not None
    why = f" ({', '.join(f'{count:,} {reason}' for reason, count in dropped.items())})" if dropped else ""
    if not len(train) + len(validation):
        raise DataError(f"data.train has no rows{why}", where=loaded.where("data.train"))
    if data.validation != 0 and not (len(train) and len(validation)):
        rows, side = len(train) + len(validation), "training" if not len(train) else "validation"
        raise DataError(
            f"data.validation: of {rows:,} {'row' if rows == 1 else 'rows'} none is left for {side}{why}",
            where=loaded.where("data.validation"),
            remedy="Hold out a larger share (validation: 10%), a file (validation: held-out.jsonl), or 0 for none.",
        )
