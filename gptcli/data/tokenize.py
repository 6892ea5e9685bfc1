"""The job: documents -> tokenizer -> verified shards in the cache, under a key that is content and not paths.

A second run with the same content reads only the files' stats. The folder of a key holds train/, validation/ (shards)
and report.json, and is committed by one rename: it is complete or absent. Before that, the pieces that are done are
kept beside it, and a killed job goes on from them. Memory: a batch of documents a process, and at most 200 MB of text
while a tokenizer is trained.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gptcli.data import report as reports
from gptcli.data.changed import changed_medium
from gptcli.data.chat_template import absent_tokens, find_template, with_template
from gptcli.data.fast import Unequal, distrust
from gptcli.data.finish import finish
from gptcli.data.infill import infill_ids
from gptcli.data.job import Job, find_job
from gptcli.data.media.reader import open_reader
from gptcli.data.packed import PackedRows, packing_of
from gptcli.data.pieces import Piece
from gptcli.data.readers import shown
from gptcli.data.row_index import RowIndex, check_held_out, row_index
from gptcli.data.shards import Shards
from gptcli.data.stages import FORMAT, repeated_marks, run_stage, survey_folder, waiting
from gptcli.data.templater import open_templater
from gptcli.data.tokenizer import kept_tokenizer, tokenizer_fingerprint
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.data.tokenizer_training import trained_tokenizer
from gptcli.data.tokens import TokensInput
from gptcli.data.work import RESULT, Task, encode, encoder_of
from gptcli.data.writer import MEDIA
from gptcli.errors import DataError, RecipeError
from gptcli.files import (
    cache_root,
    committed_folder,
    fingerprint,
    locked,
    read_json,
    remove_uncommitted,
    write_atomic,
)
from gptcli.processors import has_processor

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter


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
        index: the rows, where they are of whole documents (`data.packing`: isolated or none).
    """

    tokenizer: Path
    tokenizer_fingerprint: str
    train: Shards
    validation: Shards | None
    fingerprint: str
    report: dict[str, Any]
    reused: bool
    index: RowIndex | None = None


@dataclass(frozen=True)
class _Found:
    """A recipe's job, its tokenizer (and whether it was trained now), and where the prepared data lies or will lie."""

    job: Job
    tokenizer: Path
    trained: bool
    folder: Path


# Of a model that reads images or sounds (see `gptcli.model.media`): the tokens that stand for them, and what writes the
# processor that goes with a tokenizer's folder into another folder; None where the model brings both.
MediaModel: TypeAlias = tuple[tuple[str, ...], Callable[[Path, Path], None] | None]


def prepare(
    loaded: LoadedRecipe, reporter: Reporter, *, verify: bool | None = None, media: MediaModel | None = None
) -> Prepared:
    """The prepared data of a recipe: from the cache when the content is known, else tokenized now.

    `verify` reads all of the sources and the shards again; `media` is for a model that reads images or sounds. Raises
    `RecipeError` for a recipe without data or tokenizer, `DataError` for data that is missing, empty, unreadable or
    shorter than one row, `MissingError` for a tokenizer that cannot be had, `StoppedError` when it is interrupted with
    finished pieces to go on from.
    """
    loaded.require("tokenize", "data.train")
    return _prepared(loaded, reporter, _find(loaded, reporter, media, verify=bool(verify)), verify)


def _prepared(loaded: LoadedRecipe, reporter: Reporter, found: _Found, verify: bool | None) -> Prepared:
    job, tokenizer, folder = found.job, found.tokenizer, found.folder
    changed = changed_medium(folder) if verify and job.reads_media and folder.is_dir() else None
    if changed is not None:
        reporter.say(f"{changed}: everything is tokenized again")
    reused = folder.is_dir() and changed is None
    if not reused or work_folder(folder).is_dir():
        with locked(folder.name, waiting(reporter)), unfinished_removed(job, tokenizer, folder):
            reused = folder.is_dir() and changed is None  # another process may have made it meanwhile
            if not reused:
                encode_pieces(loaded, job, tokenizer, folder, reporter)
                commit(job, tokenizer, folder)
            remove_unfinished(job, tokenizer, folder)
    return _opened(loaded, job, tokenizer, folder, reporter, reused=reused and not found.trained, verify=verify)


def prepare_share(
    loaded: LoadedRecipe, reporter: Reporter, share: tuple[int, int], *, media: MediaModel | None = None
) -> dict[str, Any]:
    """Do the i-th of n parts of the pieces (`share` = (i, n), from 1), for `finish_shares` once all are done.

    Several of these run beside each other, on any machines that share the cache. Raises as `prepare` does.
    """
    found = _find(loaded, reporter, media)
    if not found.folder.is_dir():
        with locked(found.folder.name, waiting(reporter), shared=True):
            encode_pieces(loaded, found.job, found.tokenizer, found.folder, reporter, share=share)
    missing = missing_pieces(found.job, found.folder)
    return {"share": f"{share[0]}/{share[1]}", "pieces": len(found.job.pieces), "missing": len(missing)}


def finish_shares(loaded: LoadedRecipe, reporter: Reporter, *, media: MediaModel | None = None) -> Prepared:
    """The prepared data from the pieces that `prepare_share` made. Raises `DataError` when some are not there."""
    found = _find(loaded, reporter, media)
    if missing := missing_pieces(found.job, found.folder):
        raise DataError(
            f"{len(missing):,} of {len(found.job.pieces):,} pieces are not done (the first: {missing[0].name})",
            where=str(work_folder(found.folder)),
            remedy="Run the missing --piece I/N again, or tokenize without --finish: it does what is missing here.",
        )
    return _prepared(loaded, reporter, found, None)


def _find(loaded: LoadedRecipe, reporter: Reporter, media: MediaModel | None = None, *, verify: bool = False) -> _Found:
    job = find_job(loaded, reporter, verify=verify, reads_media=media is not None)
    with unfinished_removed(job):
        tokenizer, trained = find_tokenizer(loaded, job, reporter, media)
    return _Found(job, tokenizer, trained, data_folder(loaded, job, tokenizer))


def missing_pieces(job: Job, folder: Path) -> list[Piece]:
    """The pieces that are still to be done; of a source with a limit, those that turned out to be behind it are not."""
    work = work_folder(folder)
    if folder.is_dir():
        return []
    missing: list[Piece] = []
    for chain in job.chains:
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


def find_tokenizer(
    loaded: LoadedRecipe, job: Job, reporter: Reporter, media: MediaModel | None = None
) -> tuple[Path, bool]:
    """(folder of the recipe's tokenizer, whether it was trained now). Without a section: that of `model.from`.

    That of a model that reads images or sounds holds its processor too.
    """
    folder, trained = _text_tokenizer(loaded, job, reporter, media[0] if media is not None else ())
    return (folder if media is None else _with_processor(loaded, folder, media[1])), trained


def _with_processor(loaded: LoadedRecipe, folder: Path, write: Callable[[Path, Path], None] | None) -> Path:
    """A folder (in the cache, named by content) of the same tokenizer with the model's processor."""
    assert loaded.recipe.model is not None
    if loaded.recipe.model.from_ is not None and not has_processor(folder):
        raise RecipeError(
            "the tokenizer has no processor beside it, which reads the model's images and sounds",
            where=loaded.where("tokenizer") if loaded.recipe.tokenizer is not None else loaded.where("model.from"),
            remedy="Take that of the model, which has one: leave tokenizer out.",
        )
    if write is None:
        return folder
    key = [FORMAT, tokenizer_fingerprint(folder), loaded.recipe.model.model_dump(mode="json")]
    known = cache_root() / "tokenizers" / "processors" / fingerprint(key)
    if known.is_file() and (target := known.parent.parent / known.read_text(encoding="utf-8")).is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="gptcli-processor-") as name:
        work = Path(name)
        for path in folder.iterdir():
            shutil.copyfile(path, work / path.name)
        write(folder, work)
        target = kept_tokenizer(work)
    write_atomic(known, target.name)
    return target


def _text_tokenizer(
    loaded: LoadedRecipe, job: Job, reporter: Reporter, media_tokens: Sequence[str]
) -> tuple[Path, bool]:
    section, model = loaded.recipe.tokenizer, loaded.recipe.model
    trained = False
    template = None
    if section is not None and section.chat_template is not None:
        template = find_template(section.chat_template, where=loaded.where("tokenizer.chat_template"))
    if section is not None and section.train is not None:
        folder, trained = trained_tokenizer(section.train, template, loaded, job, reporter, media_tokens)
    elif section is not None and section.from_ is not None:
        folder = import_tokenizer(section.from_, where=loaded.where("tokenizer.from"))
    elif model is not None and model.from_ is not None:
        folder = import_tokenizer(model.from_, revision=model.revision, where=loaded.where("model.from"))
    else:
        loaded.require("tokenize", "tokenizer")
        raise RecipeError("tokenizer is empty", where=loaded.where("tokenizer"))
    if template is None:
        return folder, trained
    if absent := absent_tokens(folder, template):
        reporter.say(
            f"the tokenizer has no {', '.join(absent)}, by which the chat template marks turns: they are added"
        )
    return with_template(folder, template), trained


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
    if job.data.format == "chat":
        section = "tokenizer" if loaded.recipe.tokenizer is not None else "model.from"
        open_templater(tokenizer, where=loaded.where(section))
    for kind, _ in job.data.media:
        if kind not in (reader := open_reader(tokenizer)).tokens:
            raise RecipeError(
                f"data.{kind}s: the model reads {reader.reads} alone", where=loaded.where(f"data.{kind}s")
            )
    work = work_folder(folder)
    check_tokens(job, tokenizer)
    repeated = repeated_marks(loaded, job, reporter, tokenizer) if job.data.deduplicate == "exact" else None
    chains = job.chains[share[0] - 1 :: share[1]]
    shard_tokens = loaded.recipe.tokenize.shard_tokens
    infill = None if job.infill is None else (job.infill, infill_ids(tokenizer, where=loaded.where("train.objective")))
    task = Task(
        work, job.split, repeated, tokenizer, encoder.slow_because is None, shard_tokens=shard_tokens, infill=infill
    )
    if encoder.slow_because is not None:
        reporter.say(f"encoding with tokenizers, some 20 times slower than the fast encoder: {encoder.slow_because}")
    try:
        run_stage(encode, chains, task, loaded, reporter, "tokenizing")
    except Unequal as error:
        distrust(tokenizer, str(error))
        encoder_of.cache_clear()
        reporter.warn(f"{error}: everything is encoded again with tokenizers")
        shutil.rmtree(work, ignore_errors=True)
        run_stage(encode, chains, replace(task, fast=False), loaded, reporter, "tokenizing")


def check_tokens(job: Job, tokenizer: Path) -> None:
    """Raise `DataError` when shards that are a source were made by another tokenizer."""
    expected = tokenizer_fingerprint(tokenizer)
    for part in job.parts:
        for each in part.inputs:
            if isinstance(each, TokensInput) and each.tokenizer not in ("", expected):
                raise DataError(
                    f"{shown(each.path)} was made by another tokenizer than the recipe's",
                    where=part.where,
                    remedy="Name the tokenizer that made it: tokenizer: {from: ...}",
                )


def commit(job: Job, tokenizer: Path, folder: Path) -> None:
    """Make the prepared data of the pieces, all of which have to be there."""
    work = work_folder(folder)
    with committed_folder(folder) as target:
        finish(job, job.pieces, work, target, encoder_of(tokenizer, True), tokenizer_fingerprint(tokenizer))


def remove_unfinished(job: Job, tokenizer: Path, folder: Path) -> None:
    """Remove what was left beside prepared data, by this process or by one that was killed."""
    remove_uncommitted(folder)
    for path in (survey_folder(job, tokenizer), work_folder(folder)):  # last: while it is there, this is done again
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def unfinished_removed(job: Job, tokenizer: Path | None = None, folder: Path | None = None) -> Iterator[None]:
    """Remove the pieces that are done when the data has a fault: mended, it is other content and another job."""
    try:
        yield
    except DataError:
        shutil.rmtree(survey_folder(job, tokenizer), ignore_errors=True)
        if folder is not None:
            shutil.rmtree(work_folder(folder), ignore_errors=True)
        raise


def work_folder(folder: Path) -> Path:
    """Where the pieces of prepared data are kept while they are made."""
    return folder.parent / f".{folder.name}.pieces"


def _opened(
    loaded: LoadedRecipe,
    job: Job,
    tokenizer: Path,
    folder: Path,
    reporter: Reporter,
    *,
    reused: bool,
    verify: bool | None,
) -> Prepared:
    if verify is None and not reused:
        verify = False  # written a moment ago
    train = Shards.open(folder / "train", verify=verify)
    validation = Shards.open(folder / "validation", verify=verify) if job.data.validation != 0 else None
    if train.has_media and not train.manifest[MEDIA]:
        reporter.warn("no row has an image or a sound, which the model reads: it learns from texts alone")
    recipe, length, where = loaded.recipe, job.data.sequence_length, loaded.where("data.sequence_length")
    index, found = _rows(loaded, train, validation, tokenizer, reporter)
    batch = max(1, recipe.train.rows_of_step(length))
    packed = None if index is None else PackedRows.of(train, index, recipe, batch, where=where)
    of_tokenizer = tokenizer_fingerprint(tokenizer)
    result = fingerprint([of_tokenizer, train.fingerprint, validation.fingerprint if validation else None])
    report = reports.with_rows(
        _stored_report(folder), length, job.data.weights, where=where, packed=packed, batch=batch
    )
    report["fingerprint"] = result
    return Prepared(tokenizer, of_tokenizer, train, validation, result, report, reused and found, index)


def _rows(
    loaded: LoadedRecipe, train: Shards, validation: Shards | None, tokenizer: Path, reporter: Reporter
) -> tuple[RowIndex | None, bool]:
    """(the index of rows of whole documents, whether it was there); None where rows are of one stream."""
    how = packing_of(loaded.recipe, media=train.has_media)
    if train.has_media and (how is None or how.every_label):
        key = "data.packing" if how is None else "finetune.train_on"
        raise RecipeError(
            f"{key}: prompts of rows with images and sounds cannot be learnt, for what stands there nobody says",
            where=loaded.where(key),
            remedy="Set data.packing to isolated or none, and finetune.train_on: completion.",
        )
    if how is None:
        if train.has_supervision and loaded.recipe.finetune.train_on != "all":
            raise RecipeError(
                "data.packing: concat learns every token, and finetune.train_on: completion does not",
                where=loaded.where("data.packing"),
                remedy="Set data.packing to isolated or none, or finetune.train_on: all.",
            )
        return None, True
    if validation is not None and validation.has_supervision:
        check_held_out(validation, how, tokenizer)
    return row_index(train, how, tokenizer, waiting(reporter), reporter.warn)


def _stored_report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        return dict(read_json(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read ({error})", where=str(path), remedy=f"Delete the folder and run again: rm -r {folder}"
        ) from None
