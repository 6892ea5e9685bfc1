"""The job: documents -> tokenizer -> verified shards in the cache, under a key that is content and not paths.

A second run with the same content reads only the files' stats. The folder of a key holds train/, validation/ (shards)
and report.json, and is committed by one rename: it is complete or absent. Memory: one batch of documents, and at most
200 MB of text while a tokenizer is trained.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data import report as reports
from gptcli.data import sources
from gptcli.data.dataset import row_count, too_short
from gptcli.data.encode import Encoder, batches, make_encoder, parallel_tokenizers, safe_cuts
from gptcli.data.job import MEGA, Job, Meter, Part, find_job
from gptcli.data.shards import Shards, ShardWriter
from gptcli.data.split import SAMPLE_BYTES, sample
from gptcli.data.tokenizer import save_bytes_tokenizer, tokenizer_fingerprint, train_bpe
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import DataError, RecipeError
from gptcli.files import cache_root, committed_folder, fingerprint, read_json, write_json

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import TokenizerTraining
    from gptcli.reporting import Progress, Reporter

FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """The data and the tokenizer of a recipe, ready to train on.

    Attributes:
        tokenizer: a folder that transformers' AutoTokenizer loads.
        tokenizer_fingerprint: a hash of its files' content.
        train: the training shards.
        validation: the shards held out, or None.
        fingerprint: a hash of the tokens of both sides and of the tokenizer, independent of paths.
        report: the data report (see `gptcli.data.report`), JSON-able.
        reused: whether everything was found in the cache.
    """

    tokenizer: Path
    tokenizer_fingerprint: str
    train: Shards
    validation: Shards | None
    fingerprint: str
    report: dict[str, Any]
    reused: bool


def prepare(loaded: LoadedRecipe, reporter: Reporter) -> Prepared:
    """The prepared data of a recipe: from the cache when the content is known, else tokenized now.

    Raises `RecipeError` for a recipe without data or tokenizer, `DataError` for data that is missing, empty, unreadable
    or shorter than one row, `MissingError` for a tokenizer that cannot be had.
    """
    loaded.require("tokenize", "data.train")
    job = find_job(loaded, reporter)
    with parallel_tokenizers():
        tokenizer, trained = find_tokenizer(loaded, job, reporter)
        print_of_tokenizer = tokenizer_fingerprint(tokenizer)
        shard_tokens = loaded.recipe.tokenize.shard_tokens
        key = fingerprint([FORMAT, job.spec, print_of_tokenizer, shard_tokens])
        folder = cache_root() / "data" / key
        reused = folder.is_dir()
        if not reused:
            encoder = make_encoder(tokenizer)
            if encoder.specials.eos is None:
                raise DataError("the tokenizer names no token that ends a text", where=str(tokenizer))
            with committed_folder(folder) as work:
                _write(job, encoder, print_of_tokenizer, shard_tokens, work, reporter)
    train = Shards.open(folder / "train")
    validation = Shards.open(folder / "validation") if job.data.validation != 0 else None
    length = job.data.sequence_length
    tokens = [len(stream) for stream in train.streams]
    if not any(row_count(count, length) for count in tokens):
        raise too_short(tokens, length, where=loaded.where("data.sequence_length"))
    result = fingerprint([print_of_tokenizer, train.fingerprint, validation.fingerprint if validation else None])
    stored = _stored_report(folder)
    report = {**reports.with_rows(stored, length), "fingerprint": result}
    return Prepared(tokenizer, print_of_tokenizer, train, validation, result, report, reused and not trained)


def find_tokenizer(loaded: LoadedRecipe, job: Job, reporter: Reporter) -> tuple[Path, bool]:
    """(folder of the recipe's tokenizer, whether it was trained now). Without a section: that of `model.from`."""
    recipe = loaded.recipe
    section = recipe.tokenizer
    if section is not None and section.train is not None:
        return _trained(section.train, job, reporter)
    if section is not None and section.from_ is not None:
        return import_tokenizer(section.from_, where=loaded.where("tokenizer.from")), False
    if recipe.model is not None and recipe.model.from_ is not None:
        revision = recipe.model.revision
        return import_tokenizer(recipe.model.from_, revision=revision, where=loaded.where("model.from")), False
    loaded.require("tokenize", "tokenizer")
    raise RecipeError("tokenizer is empty", where=loaded.where("tokenizer"))


def _trained(spec: TokenizerTraining, job: Job, reporter: Reporter) -> tuple[Path, bool]:
    if spec.algorithm == "bytes":
        folder = cache_root() / "tokenizers" / fingerprint([FORMAT, "bytes"])
        if not folder.is_dir():
            with committed_folder(folder) as work:
                save_bytes_tokenizer(work)
        return folder, False
    key = [FORMAT, spec.algorithm, spec.vocab_size, spec.pattern, SAMPLE_BYTES, job.spec]
    folder = cache_root() / "tokenizers" / fingerprint(key)
    if folder.is_dir():
        return folder, False
    texts = _training_sample(job, reporter)
    size = sum(len(text.encode("utf-8")) for text in texts)
    reporter.say(f"training a tokenizer of {spec.vocab_size:,} entries on {size / MEGA:,.1f} MB of text")
    started = time.monotonic()
    with committed_folder(folder) as work:
        pieces = (piece for text in texts for piece in safe_cuts(text))
        entries = train_bpe(pieces, work, vocab_size=spec.vocab_size, pattern=spec.pattern)
    if entries < spec.vocab_size:
        reporter.say(
            f"the text gave a tokenizer of {entries:,} entries, not {spec.vocab_size:,}: "
            "no further pair of tokens occurs twice (the model's vocabulary follows)"
        )
    reporter.say(f"trained the tokenizer in {time.monotonic() - started:.1f} s")
    return folder, True


def _training_sample(job: Job, reporter: Reporter) -> list[str]:
    """The sample of the training side; the check for empty sides costs nothing here and spares the training."""
    counts = {"train": 0, "validation": 0}
    tallies = [sources.Tally() for _ in job.train]

    def texts(progress: Progress) -> Iterator[str]:
        meter = Meter(progress)
        for part, tally in zip(job.train, tallies, strict=True):
            for text in _texts(part, job, tally, meter):
                train, validation = job.split(text)
                counts["validation"] += validation is not None
                if train is not None:
                    counts["train"] += 1
                    yield train

    total = sum(sources.input_size(part) for each in job.train for part in each.inputs)
    with reporter.progress("reading", total / MEGA, "MB") as progress:
        chosen = sample(texts(progress))
    _check_sides(job, counts["train"], None if job.validation else counts["validation"], tallies)
    return chosen


def _write(job: Job, encoder: Encoder, tokenizer: str, shard_tokens: int, work: Path, reporter: Reporter) -> None:
    """Write both sides' shards and report.json into `work`."""
    names = ["train"] if job.data.validation == 0 else ["train", "validation"]
    tallies = [sources.Tally() for _ in (*job.train, *job.validation)]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(work / name, encoder.dtype, shard_tokens)) for name in names]
        sides = [_Side(writer, encoder, []) for writer in writers]
        meter = Meter(stack.enter_context(reporter.progress("tokenizing", job.size / MEGA, "MB")))
        for part, tally in zip(job.train, tallies, strict=False):
            _write_split(part, job, sides[:1] if job.validation else sides, tally, meter)
        for part, tally in zip(job.validation, tallies[len(job.train) :], strict=True):
            sides[-1].begin(part.name)
            for texts in batches(_texts(part, job, tally, meter)):
                sides[-1].add(texts)
        documents = [sum(source["documents"] for source in writer.sources) for writer in writers]
        _check_sides(job, documents[0], documents[1] if len(names) > 1 else None, tallies)
        about = {"tokenizer": tokenizer, "vocab_size": encoder.vocab_size, "specials": vars(encoder.specials)}
        for writer in writers:
            writer.finish(**about, recipe=job.spec)
    opened = [Shards.open(work / name) for name in names]
    validation = opened[1] if len(names) > 1 else None
    report = reports.make_report(opened[0], validation, [side.counts for side in sides], tallies)
    write_json(work / "report.json", report)


def _write_split(part: Part, job: Job, sides: list[_Side], tally: sources.Tally, meter: Meter) -> None:
    """Write a training source, each of its texts to the side (or sides) that it belongs to."""
    for side in sides:
        side.begin(part.name)
    for texts in batches(_texts(part, job, tally, meter)):
        pairs = [job.split(text) for text in texts]
        for index, side in enumerate(sides):
            side.add([text for pair in pairs if (text := pair[index]) is not None])


@dataclass
class _Side:
    """Training or validation while it is written."""

    writer: ShardWriter
    encoder: Encoder
    counts: list[reports.Counts]

    def begin(self, name: str) -> None:
        self.writer.begin_source(name)
        self.counts.append(reports.Counts())

    def add(self, texts: list[str]) -> None:
        if not texts:
            return
        encoded = self.encoder(texts)
        self.writer.add(encoded)
        specials = self.encoder.specials
        ids = {value for value in (specials.bos, specials.eos) if value is not None}
        self.counts[-1].add(texts, encoded, ids, len(texts) * (2 if specials.adds_bos else 1))


def _texts(part: Part, job: Job, tally: sources.Tally, meter: Meter) -> Iterator[str]:
    documents = sources.read_documents(
        part.source,
        job.data.documents,
        on_bad_row=job.data.on_bad_row,
        inputs=part.inputs,
        tally=tally,
        on_bytes=meter.update,
        where=part.where,
    )
    for document in documents:
        yield document.text
    meter.end_source()


def _check_sides(job: Job, train: int, validation: int | None, tallies: list[sources.Tally]) -> None:
    """Raise `DataError` when a side that the recipe asks for has no document; None: the side is not looked at."""
    dropped: dict[str, int] = {}
    for tally in tallies:
        for reason, count in tally.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    why = f" (dropped: {left_out})" if left_out else ""
    where = job.train[0].where
    rule = job.data.validation
    if train + (validation or 0) == 0 or (train == 0 and job.validation):
        names = ", ".join(part.name for part in job.train)
        remedy = "Check that the files hold text, and the keys data.documents and text: (the column)."
        raise DataError(f"data.train has no documents: {names}{why}", where=where, remedy=remedy)
    if rule == 0 or validation is None:
        return
    if job.validation and validation == 0:
        raise DataError(
            f"data.validation has no documents{why}", where=job.validation[0].where, remedy="Give a file with text."
        )
    if train == 0 or validation == 0:
        side = "training" if train == 0 else "validation"
        share = f"a share of {rule:.4g}" if isinstance(rule, int | float) else "tail"
        count = train if train else validation
        raise DataError(
            f"data.validation: {share} of {count:,} document{'s' if count != 1 else ''} leaves none for {side}",
            where=job.validation_where,
            remedy="Hold out the end of each text instead: data.validation: {tail: 10%}\n"
            "(or a larger share, or smaller documents by data.documents: line | blank-line, or 0 for none).",
        )


def _stored_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        return dict(read_json(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), remedy=f"Delete the folder and run again: rm -r {folder}"
        ) from None
