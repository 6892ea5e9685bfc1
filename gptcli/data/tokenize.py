"""The job: documents -> tokenizer -> verified shards in the cache, under a key that is content and not paths.

A second run with the same content reads only the files' stats. The folder of a key holds train/, validation/ (shards)
and report.json, and is committed by one rename: it is complete or absent. Before that, the pieces that are done are
kept beside it, and a killed job goes on from them. Memory: a batch of documents a process, and at most 200 MB of text
while a tokenizer is trained.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcli.data import report as reports
from gptcli.data.dataset import row_count, too_short
from gptcli.data.duplicates import repeated
from gptcli.data.encode import parallel_tokenizers, safe_cuts, utf8_size
from gptcli.data.executor import process_count, run
from gptcli.data.fast import Unequal, distrust
from gptcli.data.finish import check_sides, finish
from gptcli.data.job import MEGA, Job, find_job, megabytes
from gptcli.data.pieces import Chain, Piece
from gptcli.data.shards import Shards
from gptcli.data.split import SAMPLE_BUCKETS, SAMPLE_BYTES, sample_buckets
from gptcli.data.tokenizer import save_bytes_tokenizer, tokenizer_fingerprint, train_bpe
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.data.work import RESULT, Task, Work, encode, encoder_of, sample, survey
from gptcli.errors import DataError, RecipeError, StoppedError
from gptcli.files import cache_root, committed_folder, fingerprint, locked, read_json

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import TokenizerTraining
    from gptcli.reporting import Reporter

# 2: pieces, digests of 128 bits.
FORMAT = 2
TOKENIZER_FORMAT = 2


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


def prepare(loaded: LoadedRecipe, reporter: Reporter, *, verify: bool | None = None) -> Prepared:
    """The prepared data of a recipe: from the cache when the content is known, else tokenized now.

    `verify` reads all of the sources and the shards again. Raises `RecipeError` for a recipe without data or tokenizer,
    `DataError` for data that is missing, empty, unreadable or shorter than one row, `MissingError` for a tokenizer that
    cannot be had, `StoppedError` when it is interrupted with finished pieces to go on from.
    """
    loaded.require("tokenize", "data.train")
    job = find_job(loaded, reporter, verify=bool(verify))
    with unfinished_removed(job):
        tokenizer, trained = find_tokenizer(loaded, job, reporter)
    folder = data_folder(loaded, job, tokenizer)
    reused = folder.is_dir()
    if not reused:
        with locked(folder.name, waiting(reporter)), unfinished_removed(job, folder):
            if not folder.is_dir():
                encode_pieces(loaded, job, tokenizer, folder, reporter)
                commit(job, tokenizer, folder)
    return _opened(loaded, job, tokenizer, folder, reused=reused and not trained, verify=verify)


def prepare_share(loaded: LoadedRecipe, reporter: Reporter, share: tuple[int, int]) -> dict[str, Any]:
    """Do the i-th of n parts of the pieces (`share` = (i, n), from 1), for `finish_shares` once all are done.

    Several of these run beside each other, on any machines that share the cache. Raises as `prepare` does.
    """
    job = find_job(loaded, reporter)
    with unfinished_removed(job):
        tokenizer, _ = find_tokenizer(loaded, job, reporter)
    folder = data_folder(loaded, job, tokenizer)
    if not folder.is_dir():
        with locked(folder.name, waiting(reporter), shared=True):
            encode_pieces(loaded, job, tokenizer, folder, reporter, share=share)
    missing = missing_pieces(job, folder)
    return {"share": f"{share[0]}/{share[1]}", "pieces": len(job.pieces()), "missing": len(missing)}


def finish_shares(loaded: LoadedRecipe, reporter: Reporter) -> Prepared:
    """The prepared data from the pieces that `prepare_share` made. Raises `DataError` when some are not there."""
    job = find_job(loaded, reporter)
    tokenizer, _ = find_tokenizer(loaded, job, reporter)
    folder = data_folder(loaded, job, tokenizer)
    if missing := missing_pieces(job, folder):
        raise DataError(
            f"{len(missing):,} of {len(job.pieces()):,} pieces are not done (the first: {missing[0].name})",
            where=str(work_folder(folder)),
            remedy="Run the missing --piece I/N again, or tokenize without --finish: it does what is missing here.",
        )
    return prepare(loaded, reporter)


def missing_pieces(job: Job, folder: Path) -> list[Piece]:
    """The pieces that are still to be done; of a source with a limit, those that turned out to be behind it are not."""
    work = work_folder(folder)
    if folder.is_dir():
        return []
    missing: list[Piece] = []
    for chain in job.chains():
        left = chain[0].stream.limit
        for piece in chain:
            result = work / piece.name / RESULT
            if left == 0:
                break
            if not result.is_file():
                missing.append(piece)
            elif left is not None:
                left -= int(read_json(result)["documents"])
    return missing


def data_folder(loaded: LoadedRecipe, job: Job, tokenizer: Path) -> Path:
    """Where the prepared data of a job lies: the name is all that decides its content."""
    key = [FORMAT, job.spec, tokenizer_fingerprint(tokenizer), loaded.recipe.tokenize.shard_tokens]
    return cache_root() / "data" / fingerprint(key)


def find_tokenizer(loaded: LoadedRecipe, job: Job, reporter: Reporter) -> tuple[Path, bool]:
    """(folder of the recipe's tokenizer, whether it was trained now). Without a section: that of `model.from`."""
    recipe = loaded.recipe
    section = recipe.tokenizer
    if section is not None and section.train is not None:
        return _trained(section.train, loaded, job, reporter)
    if section is not None and section.from_ is not None:
        return import_tokenizer(section.from_, where=loaded.where("tokenizer.from")), False
    if recipe.model is not None and recipe.model.from_ is not None:
        revision = recipe.model.revision
        return import_tokenizer(recipe.model.from_, revision=revision, where=loaded.where("model.from")), False
    loaded.require("tokenize", "tokenizer")
    raise RecipeError("tokenizer is empty", where=loaded.where("tokenizer"))


def encode_pieces(
    loaded: LoadedRecipe,
    job: Job,
    tokenizer: Path,
    folder: Path,
    reporter: Reporter,
    *,
    share: tuple[int, int] = (1, 1),
) -> None:
    """Encode the pieces of a job (of `share` (i, n): the i-th of n parts of them, from 1) that are not done yet."""
    encoder = encoder_of(tokenizer, True)
    if encoder.specials.eos is None:
        raise DataError("the tokenizer names no token that ends a text", where=str(tokenizer))
    work = work_folder(folder)
    repeated = _repeated(loaded, job, reporter) if job.data.deduplicate == "exact" else None
    chains = job.chains()[share[0] - 1 :: share[1]]
    task = Task(work, job.split, repeated, tokenizer, encoder.slow_because is None, loaded.recipe.tokenize.shard_tokens)
    if encoder.slow_because is not None:
        reporter.say(f"encoding with tokenizers, some 20 times slower than the fast encoder: {encoder.slow_because}")
    try:
        _run(encode, chains, task, loaded, reporter, "tokenizing")
    except Unequal as error:
        distrust(tokenizer, str(error))
        encoder_of.cache_clear()
        reporter.warn(f"{error}: everything is encoded again with tokenizers")
        shutil.rmtree(work, ignore_errors=True)
        _run(encode, chains, replace(task, fast=False), loaded, reporter, "tokenizing")


def commit(job: Job, tokenizer: Path, folder: Path) -> None:
    """Make the prepared data of the pieces, all of which have to be there, and remove them."""
    work = work_folder(folder)
    with committed_folder(folder) as target:
        finish(job, job.pieces(), work, target, encoder_of(tokenizer, True), tokenizer_fingerprint(tokenizer))
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(_survey_folder(job), ignore_errors=True)


@contextlib.contextmanager
def unfinished_removed(job: Job, folder: Path | None = None) -> Iterator[None]:
    """Remove the pieces that are done when the data has a fault: mended, it is other content and another job."""
    try:
        yield
    except DataError:
        shutil.rmtree(_survey_folder(job), ignore_errors=True)
        if folder is not None:
            shutil.rmtree(work_folder(folder), ignore_errors=True)
        raise


def work_folder(folder: Path) -> Path:
    """Where the pieces of prepared data are kept while they are made."""
    return folder.parent / f".{folder.name}.pieces"


def waiting(reporter: Reporter) -> Callable[[], None]:
    """What to do before waiting for a lock: say so."""
    return lambda: reporter.say("another process is preparing this data: waiting for it")


def _trained(spec: TokenizerTraining, loaded: LoadedRecipe, job: Job, reporter: Reporter) -> tuple[Path, bool]:
    if spec.algorithm == "bytes":
        folder = cache_root() / "tokenizers" / fingerprint([TOKENIZER_FORMAT, "bytes"])
        if not folder.is_dir():
            with committed_folder(folder) as work:
                save_bytes_tokenizer(work)
        return folder, False
    key = [TOKENIZER_FORMAT, spec.algorithm, spec.vocab_size, spec.pattern, SAMPLE_BYTES, job.spec]
    folder = cache_root() / "tokenizers" / fingerprint(key)
    if folder.is_dir():
        return folder, False
    with locked(folder.name, waiting(reporter)):
        if folder.is_dir():
            return folder, False
        texts = _training_sample(loaded, job, reporter)
        size = sum(map(utf8_size, texts))
        reporter.say(f"training a tokenizer of {spec.vocab_size:,} entries on {size / MEGA:,.1f} MB of text")
        started = time.monotonic()
        with parallel_tokenizers(), committed_folder(folder) as work:
            pieces = (piece for text in texts for piece in safe_cuts(text))
            entries = train_bpe(pieces, work, vocab_size=spec.vocab_size, pattern=spec.pattern)
    if entries < spec.vocab_size:
        reporter.say(
            f"the text gave a tokenizer of {entries:,} entries, not {spec.vocab_size:,}: "
            "no further pair of tokens occurs twice (the model's vocabulary follows)"
        )
    reporter.say(f"trained the tokenizer in {time.monotonic() - started:.1f} s")
    return folder, True


def _training_sample(loaded: LoadedRecipe, job: Job, reporter: Reporter) -> list[str]:
    """The sample of the training side, in the order of the sources; at most `SAMPLE_BYTES` of text."""
    folder, results = _survey(loaded, job, reporter)
    dropped = sum((Counter(result["dropped"]) for result in results.values()), Counter[str]())
    chains = [chain for chain in job.chains() if not chain[0].stream.held_out]
    pieces = [piece for chain in chains for piece in chain if piece.index in results]
    sides = {"train": 0, "validation": 0}
    buckets = SAMPLE_BUCKETS
    if pieces:
        surveyed = [(np.load(folder / piece.name / "digests.npy"), piece) for piece in pieces]
        held_out = sum(job.split.holds_out(digest.tobytes()) for digests, _ in surveyed for digest in digests)
        documents = sum(len(digests) for digests, _ in surveyed)
        sides = {"train": documents - held_out, "validation": documents if job.split.tail else held_out}
        buckets = sample_buckets(
            (digests[:, 8:10].copy().view(">u2")[:, 0], np.load(folder / piece.name / "bytes.npy"))
            for digests, piece in surveyed
        )
    check_sides(job, sides["train"], None if job.validation else sides["validation"], dropped)
    repeated = _repeated(loaded, job, reporter) if job.data.deduplicate == "exact" else None
    task = Task(folder, job.split, repeated, buckets=buckets)
    found = dict(_run(sample, chains, task, loaded, reporter, "sampling"))
    texts = [text for index in sorted(found) for text in found[index]["texts"]]
    return [texts[0].encode("utf-8")[:SAMPLE_BYTES].decode("utf-8", "ignore")] if len(texts) == 1 else texts


def _repeated(loaded: LoadedRecipe, job: Job, reporter: Reporter) -> Path:
    """The folder that marks repeated documents; what is in the validation sources counts as seen before training."""
    marks = _survey_folder(job) / "repeated"
    with locked(_survey_folder(job).name, waiting(reporter)):
        if not marks.is_dir():
            folder, results = _survey(loaded, job, reporter)
            pieces = [piece for piece in job.pieces() if piece.index in results]
            pieces.sort(key=lambda piece: (not piece.stream.held_out, piece.index))
            with committed_folder(marks) as work:
                found = repeated([folder / piece.name / "digests.npy" for piece in pieces])
                for piece, again in zip(pieces, found, strict=True):
                    np.save(work / f"{piece.name}.npy", again)
    return marks


def _survey(loaded: LoadedRecipe, job: Job, reporter: Reporter) -> tuple[Path, dict[int, dict[str, Any]]]:
    folder = _survey_folder(job)
    return folder, dict(_run(survey, job.chains(), Task(folder, job.split), loaded, reporter, "reading"))


def _survey_folder(job: Job) -> Path:
    return cache_root() / "data" / f".{fingerprint([FORMAT, job.spec])}.survey"


def _run(
    work: Work, chains: list[Chain], task: Task, loaded: LoadedRecipe, reporter: Reporter, name: str
) -> list[tuple[int, dict[str, Any]]]:
    """Run work on pieces with progress; an interruption tells what is kept."""
    section = loaded.recipe.tokenize
    processes = process_count(section.processes, chains, fast=task.fast)
    total = sum(piece.size for chain in chains for piece in chain)
    done: list[tuple[int, dict[str, Any]]] = []
    try:
        with contextlib.ExitStack() as stack:
            if processes == 1 and section.executor == "local":
                stack.enter_context(parallel_tokenizers())
            progress = stack.enter_context(reporter.progress(name, total / MEGA, "MB"))
            results = run(
                work, chains, task, processes=processes, executor=section.executor, on_bytes=megabytes(progress)
            )
            for piece, result in results:
                done.append((piece.index, result))
    except KeyboardInterrupt:
        if not done:
            raise
        count = sum(len(chain) for chain in chains)
        raise StoppedError(
            f"{name} was stopped; {len(done):,} of {count:,} pieces are done and kept",
            remedy="Run the same command again to go on.",
        ) from None
    return done


def _opened(
    loaded: LoadedRecipe, job: Job, tokenizer: Path, folder: Path, *, reused: bool, verify: bool | None
) -> Prepared:
    if verify is None and not reused:
        verify = False  # written a moment ago
    train = Shards.open(folder / "train", verify=verify)
    validation = Shards.open(folder / "validation", verify=verify) if job.data.validation != 0 else None
    length = job.data.sequence_length
    tokens = [len(stream) for stream in train.streams]
    if not any(row_count(count, length) for count in tokens):
        raise too_short(tokens, length, where=loaded.where("data.sequence_length"))
    of_tokenizer = tokenizer_fingerprint(tokenizer)
    result = fingerprint([of_tokenizer, train.fingerprint, validation.fingerprint if validation else None])
    report = {**reports.with_rows(_stored_report(folder), length, job.data.weights), "fingerprint": result}
    return Prepared(tokenizer, of_tokenizer, train, validation, result, report, reused)


def _stored_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        return dict(read_json(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), remedy=f"Delete the folder and run again: rm -r {folder}"
        ) from None
