"""What is known of each scored document, and the file in which that is kept: 24 bytes a document, whatever its length.

The file lies in the cache under a key of content (of the model, the data and what decides a score), so that a later
comparison of models needs no second pass over the documents.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.evaluation.intervals import Ratio, ratio
from gptcli.evaluation.loss import LossResult
from gptcli.evaluation.windows import Document
from gptcli.files import cache_root, write_atomic

FORMAT = 1
PARTS = ("nats", "tokens", "bytes", "characters")


@dataclass(frozen=True)
class Scores:
    """Sums of each document, in the order of reading.

    Attributes:
        nats: [documents] summed natural-log loss.
        tokens: [documents] scored tokens.
        bytes: [documents] of the text in UTF-8.
        characters: [documents] of the text; None where they are not known.
        sources: (name, documents) of each source, in the same order.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.uint32]
    bytes: NDArray[np.uint64]
    characters: NDArray[np.uint32] | None
    sources: tuple[tuple[str, int], ...]

    @cached_property
    def result(self) -> LossResult:
        """The sums of all documents."""
        return LossResult(float(self.nats.sum()), int(self.tokens.sum()), int(self.bytes.sum()), len(self.nats))

    @cached_property
    def total_characters(self) -> int | None:
        """The characters of all documents."""
        return None if self.characters is None else int(self.characters.sum(dtype=np.int64))

    @property
    def bits_per_character(self) -> float | None:
        """Summed nats / ln 2 / characters (code points) of the documents."""
        return self.result.nats / math.log(2) / self.total_characters if self.total_characters else None

    @cached_property
    def loss_interval(self) -> Ratio | None:
        """The loss with its 95% interval; None for too few documents."""
        return ratio(self.nats, self.tokens)

    @cached_property
    def byte_interval(self) -> Ratio | None:
        """Bits per byte with their 95% interval; None for too few documents."""
        return ratio(self.nats / math.log(2), self.bytes)

    def by_source(self) -> Iterator[tuple[str, Scores]]:
        """Each source with the scores of its documents."""
        ends = accumulate(count for _, count in self.sources)
        for (name, count), end in zip(self.sources, ends, strict=True):
            part = slice(end - count, end)
            characters = None if self.characters is None else self.characters[part]
            yield name, Scores(self.nats[part], self.tokens[part], self.bytes[part], characters, ((name, count),))

    def not_finite(self) -> NDArray[np.int64]:
        """The numbers, from 0, of the documents whose loss is no finite number."""
        return np.flatnonzero(~np.isfinite(self.nats))


class Sizes:
    """What is read of documents while they stream by; scoring is a bounded buffer behind, texts a batch ahead."""

    def __init__(self) -> None:
        self.tokens = 0
        self.bytes = 0
        self._lengths = array("I")
        self._bytes = array("Q")
        self._characters: array[int] | None = array("I")
        self._sources: list[tuple[str, int]] = []

    @property
    def lengths(self) -> Sequence[int]:
        """The scored tokens of each document that passed."""
        return self._lengths

    def begin(self, source: str) -> None:
        """The texts that follow are of this source."""
        self._sources.append((source, 0))

    def add_text(self, characters: int | None) -> None:
        """Count one text of the source; one of unknown length makes those of all unknown."""
        name, count = self._sources[-1]
        self._sources[-1] = (name, count + 1)
        if characters is None or self._characters is None:
            self._characters = None
        else:
            self._characters.append(characters)

    def count(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents, counted as they pass."""
        for ids, size in documents:
            self.add(len(ids), size or 0)
            yield ids, size

    def add(self, tokens: int, size: int) -> None:
        """Count a document of so many scored tokens and bytes; 0 bytes where they are not known."""
        self.tokens += tokens
        self.bytes += size
        self._lengths.append(tokens)
        self._bytes.append(size)

    def scores(self, nats: array[float]) -> Scores:
        """The sums of the documents that were scored, which are all that passed; texts may have been read beyond."""
        left, sources = len(nats), []
        for name, count in self._sources:
            sources.append((name, min(count, left)))
            left -= sources[-1][1]
        return Scores(
            np.asarray(nats),
            np.asarray(self._lengths),
            np.asarray(self._bytes),
            None if self._characters is None else np.asarray(self._characters)[: len(nats)],
            tuple((name, count) for name, count in sources if count),
        )


def keep(key: str, scores: Scores, about: dict[str, Any]) -> None:
    """Write the scores of an evaluation into the cache; `about` says to a reader of the file what they are.

    Raises:
        OSError: the cache cannot be written.
    """
    parts = {name: value for name in PARTS if (value := getattr(scores, name)) is not None}
    write_arrays(key, {**about, "format": FORMAT, "sources": scores.sources}, parts)


def kept(key: str) -> Scores | None:
    """The scores that were kept under a key; None when there are none, or the file is damaged."""
    if (found := read_arrays(key)) is None:
        return None
    about, arrays = found
    parts: dict[str, Any] = {name: arrays.get(name) for name in PARTS}
    try:
        sources = tuple((str(name), int(count)) for name, count in about["sources"])
        scores = Scores(**parts, sources=sources)
        sizes = {len(part) for part in parts.values() if part is not None}
        whole = about["format"] == FORMAT and sizes == {sum(count for _, count in sources)}
        return scores if whole else None
    except (ValueError, KeyError, TypeError):
        return None


def write_arrays(key: str, about: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays into the cache of evaluations, with a JSON header.

    Raises:
        OSError: the cache cannot be written.
    """
    header = json.dumps(about, ensure_ascii=False)
    buffer = io.BytesIO()
    np.savez(buffer, about=np.frombuffer(header.encode("utf-8", "replace"), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    write_atomic(_file(key), buffer.getvalue())


def read_arrays(key: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """The header and the arrays of a file of the cache; None when there is none, or it is damaged."""
    try:
        with _file(key).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(bytes(arrays.pop("about")))
        return (about, arrays) if isinstance(about, dict) else None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
        return None


def _file(key: str) -> Path:
    return cache_root() / "evaluations" / f"{key}.npz"
