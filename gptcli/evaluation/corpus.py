"""What a model is evaluated on: files, a recipe's `eval.data`, or the documents that a recipe holds out.

A model is always asked with its own tokenizer. Held-out documents come from the prepared shards where the tokenizer
is the recipe's, and are read again from their texts where it is another; both give the same documents, streamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.data.encode import document_tokens, make_encoder
from gptcli.data.job import find_job
from gptcli.data.sources import find_inputs, input_size, read_documents, reading_of, source_name
from gptcli.data.split import digest_of
from gptcli.data.tokenize import prepare
from gptcli.data.tokenizer import load_fast, special_ids
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import DataError, MissingError, UsageError, not_available
from gptcli.evaluation.loss import Document
from gptcli.recipe.load import LoadedRecipe
from gptcli.recipe.schema import Source

if TYPE_CHECKING:
    from gptcli.reporting import Reporter

# The parts of a tokenizer.json that decide a text's ids; the rest is about specials around it.
DECIDES_IDS = ("normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True)
class Corpus:
    """Sources to read, or (without any) the validation data of a recipe.

    Attributes:
        name: what it is called in results.
        sources: files to read, each with the place that it was written at.
        documents: how plain text is cut, where a source does not say.
        on_bad_row: error or skip.
        held_out: the recipe whose validation data is meant.
        limit: at most this many documents.
    """

    name: str
    sources: tuple[tuple[Source, str | None], ...] = ()
    documents: str = "file"
    on_bad_row: str = "error"
    held_out: LoadedRecipe | None = None
    limit: int | None = None


@dataclass
class Read:
    """What was read so far; scoring is a bounded buffer behind."""

    tokens: int = 0
    bytes: int = 0

    def count(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents, counted as they pass."""
        for ids, size in documents:
            self.tokens += len(ids)
            self.bytes += size or 0
            yield ids, size


@dataclass(frozen=True)
class Tokens:
    """A corpus for one model: documents to score, the prefix of each, and the bytes in all (0: not known)."""

    documents: Iterator[Document]
    prefix_id: int
    total_bytes: int
    read: Read


def from_files(paths: list[str], *, text: str = "text", documents: str = "file", limit: int | None = None) -> Corpus:
    """The corpus of files (or folders, globs, built-in names) of a command line."""
    sources = tuple((Source(path=path, text=text), None) for path in paths)
    return Corpus(", ".join(paths), sources, documents, limit=limit)


def from_recipe(loaded: LoadedRecipe, *, limit: int | None = None) -> Corpus:
    """The corpus that a recipe names: `eval.data`, else its validation data.

    Raises:
        UsageError: it has neither.
    """
    recipe = loaded.recipe
    limit = limit if limit is not None else recipe.eval.limit
    cut, on_bad_row = (recipe.data.documents, recipe.data.on_bad_row) if recipe.data else ("file", "error")
    if recipe.eval.data:
        for i, source in enumerate(recipe.eval.data):
            if source.text in (source.map or {}):
                raise not_available("eval.data", "mapping the text", where=loaded.where(f"eval.data.{i}.map"))
        sources = tuple((source, loaded.where(f"eval.data.{i}.path")) for i, source in enumerate(recipe.eval.data))
        name = ", ".join(
            str(source.path) if isinstance(source.path, str) else source_name(source) for source in recipe.eval.data
        )
        return Corpus(name, sources, cut, on_bad_row, limit=limit)
    if recipe.data is None or recipe.data.validation == 0:
        raise UsageError(
            "the recipe has neither eval.data nor validation data",
            where=loaded.label,
            remedy="Give files: gptcli eval --data FILE, or eval.data in the recipe.",
        )
    if isinstance(recipe.data.validation, list):
        name = ", ".join(source_name(source) for source in recipe.data.validation)
    else:
        name = f"held out of {', '.join(source_name(source) for source in recipe.data.train)}"
    return Corpus(name, held_out=loaded, limit=limit)


def tokens_for(corpus: Corpus, model: Path, revision: str | None, reporter: Reporter) -> Tokens:
    """The corpus in the tokens of a model; `revision`: of a Hub id.

    Raises:
        DataError: nothing to read, or rows that cannot be read.
        MissingError: the model has no tokenizer, or one without BOS and EOS.
    """
    loaded, held_out_bytes = corpus.held_out, 0
    if loaded is not None:
        prepared = prepare(loaded, reporter)
        if prepared.validation is None:
            raise DataError("the recipe holds nothing out", where=loaded.label)
        if _same_ids(model, prepared.tokenizer):
            shards = prepared.validation
            return _tokens(shards.evaluation_documents(), corpus, prepared.tokenizer, shards.bytes or 0)
        held_out_bytes = prepared.validation.bytes or 0
        reporter.say("the model's tokenizer is not the recipe's: reading the texts again")
    tokenizer = import_tokenizer(str(model), revision=revision)
    if loaded is not None:
        texts, total = _held_out_texts(loaded, reporter), held_out_bytes
    else:
        texts, total = _texts(corpus)
    return _tokens(document_tokens(texts, make_encoder(tokenizer)), corpus, tokenizer, total)


def _tokens(documents: Iterator[Document], corpus: Corpus, tokenizer: Path, total: int) -> Tokens:
    read = Read()
    return Tokens(
        read.count(islice(documents, corpus.limit)), _prefix(tokenizer), 0 if corpus.limit is not None else total, read
    )


def _texts(corpus: Corpus) -> tuple[Iterator[str], int]:
    found = [(source, find_inputs(source, where=where), where) for source, where in corpus.sources]

    def texts() -> Iterator[str]:
        for source, inputs, where in found:
            reading = reading_of(source, corpus.documents, corpus.on_bad_row, where=where)
            for document in read_documents(inputs, reading, limit=source.limit):
                yield document.text

    return texts(), sum(input_size(part) for _, inputs, _ in found for part in inputs)


def _held_out_texts(loaded: LoadedRecipe, reporter: Reporter) -> Iterator[str]:
    """The texts that a recipe's shards of validation data were made of, in the same order."""
    job = find_job(loaded, reporter)
    seen: set[bytes] = set()
    for part in job.validation or job.train:
        for document in read_documents(part.inputs, part.stream.reading, limit=part.stream.limit):
            raw = document.raw
            kept = document.text if job.validation else job.split(document.text, raw)[1]
            if kept is None or (digest := digest_of(raw)) in seen:
                continue
            if job.data.deduplicate == "exact":
                seen.add(digest)
            yield kept


def _prefix(tokenizer: Path) -> int:
    specials = special_ids(tokenizer)
    prefix = specials.bos if specials.bos is not None else specials.eos
    if prefix is None:
        raise MissingError("the tokenizer has neither BOS nor EOS to begin a document with", where=str(tokenizer))
    return prefix


def _same_ids(model: Path, tokenizer: Path) -> bool:
    """Whether a model's tokenizer.json gives every text the ids of another's."""
    if not (model / "tokenizer.json").is_file():
        return False
    ours, theirs = (_content(folder) for folder in (model, tokenizer))
    return ours == theirs


def _content(folder: Path) -> tuple[object, ...]:
    content = json.loads(load_fast(folder).to_str())
    added = sorted((token["id"], token["content"]) for token in content.get("added_tokens", []))
    return (*(content.get(part) for part in DECIDES_IDS), added, special_ids(folder).bos, special_ids(folder).eos)
