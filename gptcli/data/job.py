"""What a recipe's data consists of, found before anything is read: the inputs of every source and their content.

A `Job` holds all that decides the shards but the tokenizer; its `spec` has content in place of paths, and is the key
under which prepared data is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data import sources
from gptcli.data.contents import content_hashes
from gptcli.data.first_rows import check_columns
from gptcli.data.formats import format_of
from gptcli.data.hub import HubSet
from gptcli.data.infill import Infill
from gptcli.data.pieces import Chain, Piece, Stream, divide
from gptcli.data.readers import shown
from gptcli.data.split import SIDES, Split, split_of
from gptcli.data.tokens import TokensInput
from gptcli.errors import RecipeError

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Data, Source
    from gptcli.reporting import Reporter

MEGA = 1e6
HASH_PROGRESS_BYTES = 500_000_000


@dataclass(frozen=True)
class Part:
    """A source with its inputs found: `spec` is all that decides its documents, with content in place of paths."""

    source: Source
    name: str
    where: str
    inputs: Sequence[sources.Input]
    stream: Stream
    spec: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """All that decides the shards but the tokenizer."""

    data: Data
    train: list[Part]
    validation: list[Part]
    split: Split
    spec: dict[str, Any]
    validation_where: str
    infill: Infill | None = None
    reads_media: bool = False

    @property
    def parts(self) -> list[Part]:
        """Training sources, then validation sources: the order of the pieces."""
        return [*self.train, *self.validation]

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that the recipe asks for."""
        return SIDES[:1] if self.data.validation == 0 else SIDES

    @functools.cached_property
    def chains(self) -> list[Chain]:
        """The pieces into which the input is divided."""
        return divide([(part.stream, part.inputs) for part in self.parts])

    @property
    def pieces(self) -> list[Piece]:
        """The pieces in the order of their output."""
        return [piece for chain in self.chains for piece in chain]

    @property
    def has_tokens(self) -> bool:
        """Whether a source is tokens made before, whose tokenizer has to be known."""
        return any(isinstance(part, TokensInput) for each in self.parts for part in each.inputs)


def find_job(loaded: LoadedRecipe, reporter: Reporter, *, verify: bool = False, reads_media: bool = False) -> Job:
    """Find the inputs of every source and hash their content: what is not remembered, or with `verify` all of it.

    `reads_media`: the rows are for a model that reads images or sounds.
    """
    data = loaded.recipe.data
    if data is None:
        raise RecipeError("tokenize needs data, which the recipe does not have", where=loaded.label)
    if data.media and not reads_media:
        kind = data.media[0][0]
        why = "the model reads text alone" if loaded.recipe.model is not None else "the recipe names no model"
        raise RecipeError(
            f"data.{kind}s: {why}",
            where=loaded.where(f"data.{kind}s"),
            remedy="Name one that reads more: model: {type: llava, preset: vision-1m}, for one (docs/multimodal.md).",
        )
    held_out = data.validation if isinstance(data.validation, list) else []
    found = [
        (source, loaded.where(f"data.{side}.{index}.{'path' if source.tokens is None else 'tokens'}"))
        for side, listed in (("train", data.train), ("validation", held_out))
        for index, source in enumerate(listed)
    ]
    inputs = [sources.find_inputs(source, where=where) for source, where in found]
    _refuse_overlap(inputs[: len(data.train)], inputs[len(data.train) :], loaded.where("data.validation"))
    names = _names([source for source, _ in found])
    parts = [
        Part(
            source,
            names[number],
            where,
            each,
            Stream(
                sources.reading_of(
                    source,
                    data.documents,
                    data.on_bad_row,
                    row_format=format_of(data, source, reads=reads_media),
                    where=where,
                ),
                source.limit,
                number >= len(data.train),
            ),
            _source_spec(source, data, content_of(each, reporter, verify)),
        )
        for number, ((source, where), each) in enumerate(zip(found, inputs, strict=True))
    ]
    check_columns(loaded, [(part.inputs, part.stream.reading) for part in parts])
    train, validation = parts[: len(data.train)], parts[len(data.train) :]
    rule = (
        data.validation
        if isinstance(data.validation, int | float)
        else {"tail": getattr(data.validation, "tail", None)}
    )
    spec: dict[str, Any] = {
        "train": [part.spec for part in train],
        "validation": [part.spec for part in validation] if held_out else rule,
        "on_bad_row": data.on_bad_row,
        "deduplicate": data.deduplicate,
    }
    if data.format != "text":
        messages = data.messages.model_dump() if data.messages is not None else None
        spec["format"] = [data.format, data.prompt, data.completion, messages]
    if reads_media:
        # Where the files lie that rows name: the same rows elsewhere are other media.
        folders = [
            os.path.realpath(part.path.parent) for each in inputs for part in each if not isinstance(part, HubSet)
        ]
        spec["media"] = [data.media, data.allow_urls, data.allow_outside, list(dict.fromkeys(folders))]
    infill, where_held_out = _infill(loaded), loaded.where("data.validation")
    if infill is not None:
        spec["fim"] = vars(infill)
    return Job(data, train, validation, split_of(data.validation), spec, where_held_out, infill, reads_media)


def _infill(loaded: LoadedRecipe) -> Infill | None:
    train, data = loaded.recipe.train, loaded.recipe.data
    if train.objective != "fim":
        return None
    if data is not None and data.format != "text":
        raise RecipeError(
            f"train.objective: fim cuts texts, and data.format is {data.format}",
            where=loaded.where("train.objective"),
            remedy="Use format: text, or objective: causal.",
        )
    return Infill(train.fim.rate, train.fim.spm_rate, loaded.recipe.seed)


@contextlib.contextmanager
def megabytes(reporter: Reporter, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of `total` bytes: yields a function that is told those done, and shows them with a rate."""
    megas = max(1, round(total / MEGA))
    with reporter.progress(name, megas, "MB") as progress:
        started = shown = time.monotonic()

        def on_bytes(done: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown > 0.1 or done >= total:
                shown = now
                rate = f"{done / MEGA / max(now - started, 1e-3):.1f} MB/s"
                progress.update(megas if done >= total else done / MEGA, rate=rate)

        yield on_bytes


def _names(listed: list[Source]) -> list[str]:
    """What sources are called: as short as tells them apart, so that no more of this machine's folders is shown."""
    names = [sources.source_name(source) for source in listed]
    firsts = [next(iter(each.path.values())) if isinstance(each.path, dict) else each.path for each in listed]
    paths = [Path(str(path or source.tokens)).parts for path, source in zip(firsts, listed, strict=True)]
    for name in {name for name in names if names.count(name) > 1}:
        alike = [number for number, other in enumerate(names) if other == name]
        if len({paths[number] for number in alike}) == 1:  # one path, written twice
            continue
        for depth in range(len(Path(name).parts) + 1, max(len(paths[number]) for number in alike) + 1):
            for number in alike:
                names[number] = "/".join(paths[number][-depth:])
            if len({names[number] for number in alike}) == len({paths[number] for number in alike}):
                break
    return names


def _refuse_overlap(
    train: list[Sequence[sources.Input]], validation: list[Sequence[sources.Input]], where: str
) -> None:
    if not validation:
        return
    trained = {identity for each in train for part in each for identity in _identities(part)}
    for part in (part for each in validation for part in each):
        if trained.intersection(_identities(part)):
            name = f"hub:{part.name}" if isinstance(part, HubSet) else shown(part.path)
            remedy = "Name other files, or hold out a share: data.validation: 1%."
            raise RecipeError(f"{name} is in both data.train and data.validation", where=where, remedy=remedy)


def _identities(part: sources.Input) -> list[object]:
    if isinstance(part, sources.ParallelFiles):
        return [Path(name).resolve() for name in part.names]
    return [part if isinstance(part, HubSet) else part.path.resolve()]


def content_of(inputs: Sequence[sources.Input], reporter: Reporter, verify: bool = False) -> str:
    """A hash of what the inputs hold and how they are read, in their order."""
    total = sum(os.path.getsize(path) for part in inputs for path in _files(part))
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        on_bytes = None
        if total >= HASH_PROGRESS_BYTES:
            on_bytes = stack.enter_context(megabytes(reporter, "checking files", total))
        paths = (path for part in inputs for path in _files(part))
        hashes = content_hashes(paths, again=verify, on_bytes=on_bytes)
        for part in inputs:
            if isinstance(part, HubSet):
                about = [part.name, part.config, part.split, part.commit]
            else:
                about = [sources.input_format(part), *(next(hashes) for _ in _files(part))]
            digest.update(json.dumps(about).encode("utf-8"))
        hashes.close()
    return digest.hexdigest()[:32]


def _files(part: sources.Input) -> tuple[str, ...]:
    if isinstance(part, HubSet):
        return ()
    if isinstance(part, sources.ParallelFiles):
        return part.names
    return tuple(map(str, part.files)) if isinstance(part, TokensInput) else (part.name,)


def _source_spec(source: Source, data: Data, content: str) -> dict[str, Any]:
    return {
        "name": sources.source_name(source) if str(source.path).startswith((sources.BUILTIN, "hub:")) else "files",
        "content": content,
        "documents": source.documents or data.documents,
        "text": source.text,
        "columns": source.columns,
        "limit": source.limit,
        **({"map": source.map} if source.map else {}),
    }
