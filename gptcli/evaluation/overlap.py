"""Contamination: which documents of an evaluation set a model may have seen in its training data.

A document overlaps when 13 words in a row of it (see `gptcli.evaluation.grams`) stand in the training documents of a
recipe, which are streamed past the sorted hashes of the evaluation set: memory is some 20 bytes a word of that set and
a batch of 256 KiB (or the longest document), whatever the size of the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.job import Job, Part, find_job, megabytes
from gptcli.data.sources import (
    Document,
    Input,
    Reading,
    find_inputs,
    input_size,
    place,
    read_documents,
    reading_of,
    shifted,
)
from gptcli.data.split import digest_of
from gptcli.data.tokenize import find_tokenizer
from gptcli.data.tokenizer import load_fast, special_ids
from gptcli.data.tokens import TokenDocument, TokensInput, check_ids, read_tokens, size_of
from gptcli.errors import DataError
from gptcli.evaluation.grams import GRAM, Finder, distinct, finder, grams, hashes, normalized, pieces
from gptcli.model.media import media_model

if TYPE_CHECKING:
    from gptcli.evaluation.corpus import Corpus
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter

WORST = 10
TRAIN, HELD_OUT = 0, 1

# A document's text, and what tells where it stands.
Text = tuple[str, Callable[[], str]]
Texts = Callable[[], Iterator[Text]]


@dataclass(frozen=True)
class Found:
    """A document with grams of the training data: where it stands, its grams, those found, and the first of them."""

    where: str
    grams: int
    overlapping: int
    example: str

    def as_dict(self) -> dict[str, Any]:
        """The document as JSON has it."""
        return {"where": self.where, "grams": self.grams, "overlapping": self.overlapping, "example": self.example}


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation set occurs in the training data of a recipe.

    Attributes:
        data: the evaluation set.
        recipe: whose training data.
        documents: of the evaluation set.
        short: those of fewer than 13 words, about which nothing can be said.
        overlapping: those with at least one gram that occurs in the training data.
        grams: of all documents, each as often as it occurs.
        overlapping_grams: those that occur in the training data.
        training_documents: that were read.
        training_bytes: of their texts, in UTF-8.
        worst: the documents with the largest share of grams found, at most ten.
    """

    data: str
    recipe: str
    documents: int
    short: int
    overlapping: int
    grams: int
    overlapping_grams: int
    training_documents: int
    training_bytes: int
    worst: tuple[Found, ...]

    @property
    def share(self) -> float | None:
        """Overlapping documents of those with at least 13 words; None when there are none."""
        long = self.documents - self.short
        return self.overlapping / long if long else None

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `gptcli eval --check-overlap`."""
        return {
            "data": self.data,
            "recipe": self.recipe,
            "gram_words": GRAM,
            "documents": self.documents,
            "short": self.short,
            "overlapping": self.overlapping,
            "share": self.share,
            "grams": self.grams,
            "overlapping_grams": self.overlapping_grams,
            "training_documents": self.training_documents,
            "training_bytes": self.training_bytes,
            "worst": [document.as_dict() for document in self.worst],
        }


def check_overlap(corpus: Corpus, trained: LoadedRecipe, reporter: Reporter) -> Overlap:
    """Look for the grams of a corpus in the training documents of a recipe, those held out left out.

    Raises:
        DataError: the corpus is empty, or something cannot be read.
        RecipeError: the recipe has no training data.
    """
    trained.require("eval", "data.train")
    evaluated = _evaluated(corpus, reporter)
    reporter.say(f"{corpus.name}: reading its runs of {GRAM} words")
    known = distinct(grams(text for text, _ in evaluated()))
    job = find_job(trained, reporter, reads_media=media_model(trained) is not None)
    tokenizer = find_tokenizer(trained, job, reporter)[0] if job.has_tokens else None
    total = sum(input_size(each) for part in job.train for each in part.inputs)
    documents = size = 0

    def training_texts(on_bytes: Callable[[int], None]) -> Iterator[str]:
        nonlocal documents, size
        for text, _ in _side(job, TRAIN, tokenizer, on_bytes):
            documents += 1
            size += len(text) if text.isascii() else len(text.encode("utf-8"))
            yield text

    seen = np.zeros(len(known), dtype=np.bool_)
    contains = finder(known)
    with megabytes(reporter, "reading training data", total) as on_bytes:
        for _, found, _ in grams(training_texts(on_bytes)):
            seen[contains(found)[0]] = True
    contains = finder(known[seen])
    counts, hits = _counted(evaluated, contains)
    if not len(counts):
        raise DataError(f"no text to check in {corpus.name}", remedy="Give a file with text: --data FILE")
    return Overlap(
        data=corpus.name,
        recipe=trained.label,
        documents=len(counts),
        short=int((counts == 0).sum()),
        overlapping=int((hits > 0).sum()),
        grams=int(counts.sum()),
        overlapping_grams=int(hits.sum()),
        training_documents=documents,
        training_bytes=size,
        worst=_worst(evaluated, counts, hits, contains),
    )


def _counted(texts: Texts, contains: Finder) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each document, its grams and how many of them are contained."""
    documents = 0

    def counted() -> Iterator[str]:
        nonlocal documents
        for text, _ in texts():
            documents += 1
            yield text

    totals = [np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)]
    for first, found, owners in grams(counted()):
        for number, chosen in enumerate((owners, owners[contains(found)[1]])):
            if len(totals[number]) < documents:
                totals[number] = np.pad(totals[number], (0, 2 * documents - len(totals[number])))
            sums = np.bincount(chosen)
            totals[number][first : first + len(sums)] += sums
    return totals[0][:documents], totals[1][:documents]


def _worst(
    texts: Texts,
    counts: NDArray[np.int64],
    hits: NDArray[np.int64],
    contains: Finder,
) -> tuple[Found, ...]:
    """The documents with the largest share of grams found; of equal ones those with more, then the first."""
    order = np.lexsort((np.arange(len(counts)), -hits, -hits / np.maximum(counts, 1)))
    chosen = [int(number) for number in order[:WORST] if hits[number]]
    found: dict[int, Found] = {}
    for number, (text, where) in enumerate(islice(texts(), max(chosen, default=-1) + 1)):
        if number in chosen:
            example = ""
            for piece in pieces(normalized(text)):
                at = np.flatnonzero(contains(hashes(piece)[0])[1])
                if len(at):
                    example = b" ".join(piece.split()[at[0] : at[0] + GRAM]).decode("utf-8", "replace")
                    break
            found[number] = Found(where(), int(counts[number]), int(hits[number]), example)
    return tuple(found[number] for number in chosen)


def _evaluated(corpus: Corpus, reporter: Reporter) -> Texts:
    """The texts of a corpus, as often as they are asked for."""
    if corpus.held_out is not None:
        job = find_job(corpus.held_out, reporter, reads_media=media_model(corpus.held_out) is not None)
        tokenizer = find_tokenizer(corpus.held_out, job, reporter)[0] if job.has_tokens else None
        return lambda: islice(_side(job, HELD_OUT, tokenizer), corpus.limit)
    found = [
        (find_inputs(source, where=where), reading_of(source, corpus.documents, corpus.on_bad_row, where=where), source)
        for source, where in corpus.sources
    ]

    def texts() -> Iterator[Text]:
        for inputs, reading, source in found:
            for document in read_documents(inputs, reading, limit=source.limit):
                yield document.text, partial(_place, inputs, reading, document)

    return lambda: islice(texts(), corpus.limit)


def _side(job: Job, side: int, tokenizer: Path | None, on_bytes: Callable[[int], None] | None = None) -> Iterator[Text]:
    """The texts of one side of a recipe's data as its shards have it; `tokenizer` turns tokens into text."""
    done = 0
    seen: set[bytes] = set()
    for part in job.validation if side == HELD_OUT and job.validation else job.train:
        for text, raw, where in _part(part, job, side, tokenizer, shifted(on_bytes, done) if on_bytes else None):
            if side == HELD_OUT and job.data.deduplicate == "exact":
                if (digest := digest_of(raw)) in seen:
                    continue
                seen.add(digest)
            yield text, where
        done += sum(input_size(each) for each in part.inputs)
        if on_bytes is not None:
            on_bytes(done)


def _part(
    part: Part, job: Job, side: int, tokenizer: Path | None, on_bytes: Callable[[int], None] | None
) -> Iterator[tuple[str, bytes, Callable[[], str]]]:
    """The texts of a source on one side, the bytes that tell equal documents, and where they stand."""
    if tokenizer is not None and isinstance(part.inputs[0], TokensInput):
        yield from _decoded(part, job, side, tokenizer, on_bytes)
        return
    for document in read_documents(part.inputs, part.stream.reading, limit=part.stream.limit, on_bytes=on_bytes):
        raw = document.raw
        text = document.text if part.stream.held_out else job.split(document.text, raw)[side]
        if text is not None:
            yield text, raw, partial(_place, part.inputs, part.stream.reading, document)


def _decoded(
    part: Part, job: Job, side: int, tokenizer: Path, on_bytes: Callable[[int], None] | None
) -> Iterator[tuple[str, bytes, Callable[[], str]]]:
    loaded, specials = load_fast(tokenizer), special_ids(tokenizer)
    vocab_size = loaded.get_vocab_size(with_added_tokens=True)
    read = done = 0
    for index, each in enumerate(part.inputs):
        assert isinstance(each, TokensInput)
        for number, ids in enumerate(read_tokens(each, specials), start=1):
            if not len(ids):
                continue
            if read == part.stream.limit:
                return
            read += 1
            document = TokenDocument(ids, index, number)
            raw = document.raw
            check_ids(ids, vocab_size, each, number)
            if job.split.tail and not part.stream.held_out:
                at = job.split.cut(len(ids))
                ids = ids[at:] if side else ids[:at]
            elif not part.stream.held_out and job.split.holds_out(raw) != bool(side):
                continue
            if len(ids):
                text = loaded.decode(ids.tolist(), skip_special_tokens=False)
                yield text, raw, partial(_place, part.inputs, part.stream.reading, document)
        done += size_of(each)
        if on_bytes is not None:
            on_bytes(done)


def _place(inputs: Sequence[Input], reading: Reading, document: Document | TokenDocument) -> str:
    return place(inputs[document.part], document.mark(), reading.layout)
