"""What `--smoke` trains and evaluates on: first rows of what is here, else synthetic ones with the recipe's columns."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.recipe.schema import Source, Tail
from gptcli.recipe.template import Template, parse_template
from gptcli.train.pairs import is_preference
from gptcli.train.preference_smoke import reward_cuts, synthetic_pair
from gptcli.train.smoke_media import media_columns, media_parts, read_by

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter

ROWS = 64
WORDS = ("the", "model", "reads", "a", "text", "and", "learns", "to", "write", "what", "comes", "next")
Row = dict[str, Any]


def data_cuts(loaded: LoadedRecipe, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """The keys of `data` for a toy; rows that are made are written into `folder`."""
    data = loaded.recipe.data
    sources = {"train": [Source(path="hub:none/none")] if data is None else data.train}
    if data is not None and isinstance(data.validation, list):
        sources["validation"] = data.validation
    cuts: dict[str, Any] = {}
    for side, listed in sources.items():
        names = [f"{side}-{index}" for index in range(len(listed))]
        cut = [cut_source(loaded, each, folder, name, reporter) for each, name in zip(listed, names, strict=True)]
        cuts[f"data.{side}"] = cut
        if is_preference(loaded) and any((folder / f"{name}.jsonl").exists() for name in names):
            cuts |= reward_cuts(loaded, reporter)
    if data is None or isinstance(data.validation, list):
        return cuts
    if isinstance(data.validation, Tail) or data.validation > 0:
        # A share of 64 documents may be none at all.
        cuts["data.validation"] = {"tail": 0.1} if data.format == "text" else 0.2
    return cuts


def cut_source(
    loaded: LoadedRecipe,
    source: Source,
    folder: Path,
    name: str,
    reporter: Reporter,
    row: Callable[[LoadedRecipe, Source, int, Path], Row] | None = None,
) -> dict[str, Any]:
    """The first rows of a source that is here; else a file in `folder` of rows that `row` makes (the recipe's own)."""
    written = source.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if isinstance(source.path, str) and _is_here(source.path):
        return {**written, "limit": min(ROWS, source.limit or ROWS)}
    path = folder / f"{name}.jsonl"
    shown = " and ".join(source.path.values()) if isinstance(source.path, dict) else source.path or source.tokens
    reporter.say(f"smoke: {shown} is not read; {ROWS} synthetic rows stand in for it")
    rows = [(row or _synthetic_row)(loaded, source, seed, folder) for seed in range(ROWS)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    weight = {} if source.weight is None else {"weight": source.weight}
    return {"path": str(path), "text": source.text, **weight}


def synthetic_question(loaded: LoadedRecipe, source: Source, seed: int, folder: Path) -> Row:
    """A row with the columns of `eval`, whose pictures and sounds are files in `folder`."""
    row: Row = {source.text: f"row {seed}: {_words(seed)}."}
    template = parse_template(loaded.recipe.asked)
    row |= {name: f"row {seed}" for name in template.columns}
    return row | media_columns(loaded, template, folder, seed) | _reference(loaded, seed)


def _synthetic_row(loaded: LoadedRecipe, source: Source, seed: int, folder: Path) -> Row:
    """A row with the columns of `data`, those of `eval` among them, which validation rows are asked for."""
    data = loaded.recipe.data
    if is_preference(loaded):
        return synthetic_pair(loaded, WORDS, seed)
    if data is None or data.format == "text":
        return {source.text: f"row {seed}: {_words(seed)}."}
    if data.format == "chat":
        return _conversation(loaded, seed, folder)
    template = parse_template(data.prompt or "")
    columns = [*template.columns, *parse_template(data.completion or "").columns]
    row: Row = {name: f"row {seed} {_words(seed + number, 6)}" for number, name in enumerate(dict.fromkeys(columns))}
    return row | media_columns(loaded, template, folder, seed) | _reference(loaded, seed)


def _reference(loaded: LoadedRecipe, seed: int) -> Row:
    asked = loaded.recipe.eval
    if asked.references is None:
        return {}
    return {asked.references: asked.labels[seed % len(asked.labels)] if asked.labels else f"row {seed}"}


def _conversation(loaded: LoadedRecipe, seed: int, folder: Path) -> Row:
    data, model = loaded.recipe.data, loaded.recipe.model
    given = data and data.messages
    shape = given.shape if given else "openai"
    asked, said = f"row {seed} {_words(seed, 6)}", _words(seed + 1, 6)
    if shape == "alpaca":
        return {"instruction": asked, "input": "", "output": said}
    row = media_columns(loaded, Template(()), folder, seed)
    places = "".join(f"<{kind}>" * len(columns) for kind, columns in (data.media if data else ()))
    if shape == "sharegpt":
        turns = [{"from": "human", "value": places + asked}, {"from": "gpt", "value": said}]
        return row | {(given and given.column) or "conversations": turns}
    # Without columns of media, a message brings its own.
    kinds = () if row or model is None else read_by(model.type or model.smoke_type)
    parts = media_parts(kinds, folder, seed)
    content: Any = [*parts, {"type": "text", "text": asked}] if parts else places + asked
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
    return row | {(given and given.column) or "messages": turns}


def _words(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def _is_here(path: str) -> bool:
    if path.startswith("hub:"):
        return False
    is_pattern = any(character in path for character in "*?[")
    return path.startswith("builtin:") or is_pattern or Path(path).exists()
