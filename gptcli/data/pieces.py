"""The parts into which a job's input is divided: each is read, encoded and kept on its own.

The division is a function of the inputs alone, so the output is the same on any number of processes and a killed job
goes on with what is missing. A piece is 8 to 256 MB of files, larger in a larger job: some hundred of them up to 25 GB.
The pieces of a source with a `limit` are a chain, done one after the other, since each needs to know how many documents
came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from gptcli.data import hub
from gptcli.data.readers import spans
from gptcli.data.sources import FileInput, Input, Reading, as_inputs, input_size

SMALLEST = 8_000_000
LARGEST = 256_000_000
PIECES = 96


@dataclass(frozen=True)
class Stream:
    """One source as the job reads it: `limit` documents at most, `held_out` when it is validation data."""

    reading: Reading
    limit: int | None
    held_out: bool


@dataclass(frozen=True)
class Piece:
    """A part of the input. `index` counts over the whole job, `source` over the training or the validation sources."""

    index: int
    source: int
    stream: Stream
    inputs: Sequence[Input]
    size: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.index:05}"


Chain: TypeAlias = list[Piece]


def divide(sources: Sequence[tuple[Stream, Sequence[Input]]]) -> list[Chain]:
    """The pieces of sources (training first, then validation), in the order of their output."""
    total = sum(input_size(part) for _, inputs in sources for part in inputs)
    target = max(SMALLEST, min(LARGEST, total // PIECES))
    chains: list[Chain] = []
    index = 0
    numbers = {False: 0, True: 0}
    for stream, inputs in sources:
        pieces = []
        divided = (each for part in inputs for each in _divided(part, stream.reading, target))
        for group, size in _groups(divided, target):
            pieces.append(Piece(index, numbers[stream.held_out], stream, as_inputs(group), size))
            index += 1
        numbers[stream.held_out] += 1
        chains += [pieces] if stream.limit is not None else [[piece] for piece in pieces]
    return chains


def _divided(part: Input, reading: Reading, target: int) -> list[tuple[Input, int]]:
    if isinstance(part, hub.HubSet):  # how large its files are is not known: each is a piece
        return [(each, target) for each in hub.divide(part, where=reading.where)]
    size = input_size(part)
    if not isinstance(part, FileInput) or part.builtin or size <= target:
        return [(part, size)]
    found = spans(part.path, reading.layout, target)
    if len(found) == 1:
        return [(part, size)]
    # Spans of parquet are row groups, whose bytes are not known before they are read.
    return [(replace(part, span=span), size // len(found)) for span in found]


def _groups(parts: Iterable[tuple[Input, int]], target: int) -> Iterator[tuple[list[Input], int]]:
    """Neighbours of about `target` bytes together, with their bytes."""
    group: list[Input] = []
    filled = 0
    for part, size in parts:
        if group and filled + size // 2 > target:
            yield group, filled
            group, filled = [], 0
        group.append(part)
        filled += size
    if group:
        yield group, filled
