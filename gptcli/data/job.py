"""What a recipe's data consists of, found before anything is read: the inputs of every source and their content.

A `Job` holds all that decides the shards but the tokenizer; its `spec` has content in place of paths, and is the key
under which prepared data is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data import sources
from gptcli.data.contents import content_hashes
from gptcli.data.hub import HubSet
from gptcli.data.readers import shown
from gptcli.data.split import Split, splitter
from gptcli.errors import RecipeError

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Data, Source
    from gptcli.reporting import Progress, Reporter

MEGA = 1e6
HASH_PROGRESS_BYTES = 500_000_000


@dataclass(frozen=True)
class Part:
    """A source with its inputs found: `spec` is all that decides its documents, with content in place of paths."""

    source: Source
    name: str
    where: str
    inputs: list[sources.Input]
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

    @property
    def size(self) -> int:
        """Bytes to read for one pass over everything."""
        return sum(
            sources.input_size(part) for side in (self.train, self.validation) for each in side for part in each.inputs
        )


def find_job(loaded: LoadedRecipe, reporter: Reporter) -> Job:
    """Find the inputs of every source and hash their content (as far as it is not remembered)."""
    data = loaded.recipe.data
    if data is None:
        raise RecipeError("tokenize needs data, which the recipe does not have", where=loaded.label)
    held_out = data.validation if isinstance(data.validation, list) else []
    found = [
        (source, loaded.where(f"data.{side}.{index}.path"))
        for side, listed in (("train", data.train), ("validation", held_out))
        for index, source in enumerate(listed)
    ]
    inputs = [sources.find_inputs(source, where=where) for source, where in found]
    _refuse_overlap(inputs[: len(data.train)], inputs[len(data.train) :], loaded.where("data.validation"))
    hashes = _hashes([part for each in inputs for part in each], reporter)
    parts = [
        Part(source, sources.source_name(source), where, each, _source_spec(source, data, each, hashes))
        for (source, where), each in zip(found, inputs, strict=True)
    ]
    train, validation = parts[: len(data.train)], parts[len(data.train) :]
    rule = (
        data.validation
        if isinstance(data.validation, int | float)
        else {"tail": getattr(data.validation, "tail", None)}
    )
    spec = {
        "train": [part.spec for part in train],
        "validation": [part.spec for part in validation] if held_out else rule,
        "on_bad_row": data.on_bad_row,
    }
    return Job(data, train, validation, splitter(data.validation), spec, loaded.where("data.validation"))


class Meter:
    """Turns bytes read, source after source, into progress with a rate."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._base = 0
        self._position = 0
        self._shown = self._started = time.monotonic()

    def update(self, position: int) -> None:
        """Set the bytes read of the present source."""
        self._position = position
        now = time.monotonic()
        if now - self._shown > 0.1:
            self._shown = now
            self._show(now)

    def end_source(self) -> None:
        """Count the present source as done."""
        self._base += self._position
        self._position = 0
        self._show(time.monotonic())

    def _show(self, now: float) -> None:
        done = (self._base + self._position) / MEGA
        self._progress.update(done, rate=f"{done / max(now - self._started, 1e-3):.1f} MB/s")


def _refuse_overlap(train: list[list[sources.Input]], validation: list[list[sources.Input]], where: str) -> None:
    trained = {_identity(part) for each in train for part in each}
    for part in (part for each in validation for part in each):
        if _identity(part) in trained:
            name = f"hub:{part.name}" if isinstance(part, HubSet) else shown(part.path)
            remedy = "Name other files, or hold out a share: data.validation: 1%."
            raise RecipeError(f"{name} is in both data.train and data.validation", where=where, remedy=remedy)


def _identity(part: sources.Input) -> object:
    return part if isinstance(part, HubSet) else part.path.resolve()


def _hashes(inputs: Iterable[sources.Input], reporter: Reporter) -> dict[Path, str]:
    paths = list(dict.fromkeys(part.path for part in inputs if isinstance(part, sources.FileInput)))
    total = sum(path.stat().st_size for path in paths)
    if total < HASH_PROGRESS_BYTES:
        return dict(zip(paths, content_hashes(paths), strict=True))
    with reporter.progress("checking files", total / MEGA, "MB") as progress:
        meter = Meter(progress)
        return dict(zip(paths, content_hashes(paths, on_bytes=meter.update), strict=True))


def _source_spec(source: Source, data: Data, inputs: list[sources.Input], hashes: dict[Path, str]) -> dict[str, Any]:
    content = [
        [part.name, part.config, part.split, part.commit]
        if isinstance(part, HubSet)
        else [sources.input_format(part), hashes[part.path]]
        for part in inputs
    ]
    return {
        "name": sources.source_name(source) if str(source.path).startswith((sources.BUILTIN, "hub:")) else "files",
        "content": content,
        "documents": source.documents or data.documents,
        "text": source.text,
        "columns": source.columns,
        "limit": source.limit,
    }
