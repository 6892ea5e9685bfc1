"""What a model is evaluated on: files, a recipe's `eval.data`, or the documents that a recipe holds out.

A model is always asked with its own tokenizer. Held-out documents come from the prepared shards where the tokenizer
is the recipe's, and are read again from their texts where it is another; both give the same documents, streamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.encode import document_tokens, make_encoder, utf8_size
from gptcli.data.job import content_of, find_job
from gptcli.data.sources import (
    Input,
    Tally,
    find_inputs,
    input_size,
    place,
    read_documents,
    reading_of,
    source_name,
)
from gptcli.data.split import digest_of
from gptcli.data.tokenize import prepare
from gptcli.data.tokenizer import load_fast, special_ids
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import DataError, MissingError, UsageError, not_available
from gptcli.evaluation.scores import Sizes
from gptcli.evaluation.supervised import Stream, packing_for, supervised_windows
from gptcli.evaluation.windows import Document
from gptcli.files import fingerprint
from gptcli.model.media import media_model
from gptcli.recipe.load import LoadedRecipe
from gptcli.recipe.schema import Source

if TYPE_CHECKING:
    from gptcli.data.packing import Packing
    from gptcli.data.shards import Shards
    from gptcli.data.tokenize import Prepared
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


@dataclass(frozen=True)
class Tokens:
    """A corpus for one model.

    Attributes:
        documents: what to score.
        prefix_id: what each begins with.
        tokenizer: the folder of the tokenizer that they are made with.
        total_bytes: in all; 0 where that is not known.
        sizes: of the documents that were read so far.
        identity: a hash of the content of the corpus, whatever the model, and of how it is divided into documents.
        left_out: counts the rows without text.
        windows: in place of `documents` what is scored of rows of which a part is learnt, given the longest window.
    """

    documents: Iterator[Document]
    prefix_id: int
    tokenizer: Path
    total_bytes: int
    sizes: Sizes
    identity: str
    left_out: Tally
    windows: Callable[[int], Stream] | None = None


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
        return _of_sources(loaded, recipe.eval.data, "eval.data", cut, on_bad_row, limit)
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


def rows_in_training(loaded: LoadedRecipe, *, limit: int) -> Corpus | None:
    """The files of rows on which tasks are measured during training, at most `limit` rows; None: there is none.

    They are those of `data.validation` where its rows are answered, so that a best checkpoint is not chosen by what it
    is measured by in the end; else `eval.data`.
    """
    data, rows = loaded.recipe.data, loaded.recipe.validation_rows
    if data is not None and rows:
        return _of_sources(loaded, rows, "data.validation", data.documents, data.on_bad_row, limit)
    return from_recipe(loaded, limit=limit) if loaded.recipe.eval.data else None


def _of_sources(
    loaded: LoadedRecipe, listed: list[Source], key: str, documents: str, on_bad_row: str, limit: int | None
) -> Corpus:
    sources = tuple((source, loaded.where(f"{key}.{i}.path")) for i, source in enumerate(listed))
    name = ", ".join(str(each.path) if isinstance(each.path, str) else source_name(each) for each in listed)
    return Corpus(name, sources, documents, on_bad_row, limit=limit)


def tokens_for(corpus: Corpus, model: Path, revision: str | None, reporter: Reporter) -> Tokens:
    """The corpus in the tokens of a model; `revision`: of a Hub id.

    Raises:
        DataError: nothing to read, or rows that cannot be read.
        MissingError: the model has no tokenizer, or one without BOS and EOS.
    """
    loaded, sizes, tally = corpus.held_out, Sizes(), Tally()
    documents: Iterator[Document]
    if loaded is None:
        tokenizer = import_tokenizer(str(model), revision=revision)
        found = _found(corpus)
        documents = document_tokens(_texts(found, corpus, sizes, tally), make_encoder(tokenizer))
        total = sum(input_size(part) for _, inputs, _ in found for part in inputs)
        spec = [[_spec(source, corpus), content_of(inputs, reporter)] for source, inputs, _ in found]
    else:
        prepared = prepare(loaded, reporter, media=media_model(loaded))
        if prepared.validation is None:
            raise DataError("the recipe holds nothing out", where=loaded.label)
        if (packing := packing_for(prepared.validation, loaded.recipe)) is not None:
            return _rows(prepared, packing, corpus, model, sizes, tally)
        total, spec = prepared.validation.bytes or 0, [["held out", prepared.validation.fingerprint]]
        tokenizer = prepared.tokenizer
        if _same_ids(model, tokenizer):
            documents = _with_characters(prepared.validation, tokenizer, sizes)
        else:
            reporter.say("the model's tokenizer is not the recipe's: reading the texts again")
            tokenizer = import_tokenizer(str(model), revision=revision)
            documents = document_tokens(_held_out_texts(loaded, reporter, sizes), make_encoder(tokenizer))
    documents = sizes.count(islice(documents, corpus.limit))
    total = 0 if corpus.limit is not None else total
    identity = fingerprint([spec, corpus.limit])
    return Tokens(documents, _prefix(tokenizer), tokenizer, total, sizes, identity, tally)


def _rows(prepared: Prepared, packing: Packing, corpus: Corpus, model: Path, sizes: Sizes, tally: Tally) -> Tokens:
    """Held-out rows of which a part is learnt: what training scores of them."""
    shards = prepared.validation
    assert shards is not None
    if not _same_ids(model, prepared.tokenizer):
        raise UsageError(
            "the model's tokenizer is not the recipe's, and rows say by its tokens what of them is learnt",
            where=str(model),
            remedy="Prepare them with the model's own: tokenizer.from in the recipe.",
        )

    def windows(length: int) -> Stream:
        stream = supervised_windows(shards, replace(packing, sequence_length=length))
        left = corpus.limit if corpus.limit is not None else shards.documents
        for source in shards.manifest["sources"]:
            sizes.begin(source["name"])
            for size, found in islice(stream, min(left, source["documents"])):
                sizes.add_text(None)
                sizes.add(sum(window.scored for window in found), 0)
                yield size, found
            left -= min(left, source["documents"])

    identity = fingerprint(["held out rows", shards.fingerprint, vars(packing), corpus.limit])
    return Tokens(iter(()), _prefix(prepared.tokenizer), prepared.tokenizer, 0, sizes, identity, tally, windows)


def place_of(corpus: Corpus, number: int) -> str:
    """Where the document of a number, from 0, stands: the files are read again up to there."""
    left = number
    if corpus.held_out is None:
        for source, inputs, where in _found(corpus):
            reading = reading_of(source, corpus.documents, corpus.on_bad_row, where=where)
            for document in read_documents(inputs, reading, limit=source.limit):
                if left == 0:
                    return place(inputs[document.part], document.mark(), reading.layout)
                left -= 1
    return f"document {number + 1:,} of {corpus.name}"


def _found(corpus: Corpus) -> list[tuple[Source, Sequence[Input], str | None]]:
    return [(source, find_inputs(source, where=where), where) for source, where in corpus.sources]


def _spec(source: Source, corpus: Corpus) -> list[Any]:
    """How a source is divided into documents."""
    return [source.documents or corpus.documents, source.text, source.columns, source.limit, corpus.on_bad_row]


def _texts(
    found: list[tuple[Source, Sequence[Input], str | None]], corpus: Corpus, sizes: Sizes, tally: Tally
) -> Iterator[str]:
    for source, inputs, where in found:
        reading = reading_of(source, corpus.documents, corpus.on_bad_row, where=where)
        sizes.begin(str(source.path))
        for document in read_documents(inputs, reading, limit=source.limit, tally=tally):
            sizes.add_text(len(document.text))
            yield document.text


def _held_out_texts(loaded: LoadedRecipe, reporter: Reporter, sizes: Sizes) -> Iterator[str]:
    """The texts that a recipe's shards of validation data were made of, in the same order."""
    job = find_job(loaded, reporter)
    seen: set[bytes] = set()
    for part in job.validation or job.train:
        sizes.begin(part.name)
        for document in read_documents(part.inputs, part.stream.reading, limit=part.stream.limit):
            raw = document.raw
            kept = document.text if job.validation else job.split(document.text, raw)[1]
            if kept is None or (digest := digest_of(raw)) in seen:
                continue
            if job.data.deduplicate == "exact":
                seen.add(digest)
            sizes.add_text(len(kept))
            yield kept


def _with_characters(shards: Shards, tokenizer: Path, sizes: Sizes) -> Iterator[Document]:
    """The documents of shards, which know their bytes; characters are known where decoding gives as many bytes."""
    decoder = load_fast(tokenizer)
    documents = shards.evaluation_documents()
    for source in shards.manifest["sources"]:
        sizes.begin(source["name"])
        for ids, size in islice(documents, source["documents"]):
            text = decoder.decode(ids.tolist(), skip_special_tokens=False)
            sizes.add_text(len(text) if utf8_size(text) == size else None)
            yield ids, size


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
    return decides_ids(model) == decides_ids(tokenizer)


def decides_ids(folder: Path) -> tuple[object, ...]:
    """What of a folder's tokenizer.json decides the ids of a text: equal where two give every text the same."""
    content = json.loads(load_fast(folder).to_str())
    added = sorted((token["id"], token["content"]) for token in content.get("added_tokens", []))
    return (*(content.get(part) for part in DECIDES_IDS), added, special_ids(folder).bos, special_ids(folder).eos)
