"""The stages of a job over all its pieces: each with progress, in as many processes as the recipe says, resumable.

A survey comes before encoding only where something has to be known of all documents first: a tokenizer's sample, or
which documents repeat others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcli.data.duplicates import repeated
from gptcli.data.encode import tokenizer_threads
from gptcli.data.executor import process_count, run
from gptcli.data.hub import HubSet
from gptcli.data.job import Job, megabytes
from gptcli.data.pieces import Chain
from gptcli.data.tokenizer import tokenizer_fingerprint
from gptcli.data.work import Task, Work, survey
from gptcli.errors import StoppedError
from gptcli.files import cache_root, committed_folder, fingerprint, locked

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter

# 2: pieces, digests of 128 bits.
FORMAT = 2


def waiting(reporter: Reporter) -> Callable[[], None]:
    """What to do before waiting for a lock: say so."""
    return lambda: reporter.say("another process is preparing this data: waiting for it")


def repeated_marks(loaded: LoadedRecipe, job: Job, reporter: Reporter, tokenizer: Path | None) -> Path:
    """The folder that marks repeated documents; what is in the validation sources counts as seen before training."""
    folder = survey_folder(job, tokenizer)
    marks = folder / "repeated"
    with locked(folder.name, waiting(reporter)):
        if not marks.is_dir():
            _, results = surveyed(loaded, job, reporter, tokenizer)
            pieces = [piece for piece in job.pieces if piece.index in results]
            pieces.sort(key=lambda piece: (not piece.stream.held_out, piece.index))
            with committed_folder(marks) as work:
                found = repeated([folder / piece.name / "digests.npy" for piece in pieces])
                for piece, again in zip(pieces, found, strict=True):
                    np.save(work / f"{piece.name}.npy", again)
    return marks


def surveyed(
    loaded: LoadedRecipe, job: Job, reporter: Reporter, tokenizer: Path | None
) -> tuple[Path, dict[int, dict[str, Any]]]:
    """(folder of the survey, what `survey` returned for each piece); tokens as a source need the `tokenizer`."""
    folder = survey_folder(job, tokenizer)
    return folder, dict(
        run_stage(survey, job.chains, Task(folder, job.split, tokenizer=tokenizer), loaded, reporter, "reading")
    )


def survey_folder(job: Job, tokenizer: Path | None) -> Path:
    """Where the survey of a job is kept until its data is prepared; in tokens, the `tokenizer` tells documents."""
    key = [FORMAT, job.spec]
    if job.has_tokens and tokenizer is not None:
        key.append(tokenizer_fingerprint(tokenizer))
    return cache_root() / "data" / f".{fingerprint(key)}.survey"


def run_stage(
    work: Work, chains: list[Chain], task: Task, loaded: LoadedRecipe, reporter: Reporter, name: str
) -> list[tuple[int, dict[str, Any]]]:
    """Run work on pieces with progress; an interruption tells what is kept. Returns (index, result) of each piece."""
    section = loaded.recipe.tokenize
    processes = process_count(section.processes, chains, fast=task.fast)
    pieces = [piece for chain in chains for piece in chain]
    # The bytes of a Hub set are not known before they are read: there, pieces are counted.
    by_bytes = not any(isinstance(part, HubSet) for piece in pieces for part in piece.inputs)
    done: list[tuple[int, dict[str, Any]]] = []
    try:
        with contextlib.ExitStack() as stack:
            if processes == 1 and section.executor == "local":
                stack.enter_context(tokenizer_threads(every_core=True))
            total = sum(piece.size for piece in pieces)
            on_bytes = stack.enter_context(megabytes(reporter, name, total)) if by_bytes else lambda count: None
            progress = None if by_bytes else stack.enter_context(reporter.progress(name, len(pieces), "pieces"))
            results = run(work, chains, task, processes=processes, executor=section.executor, on_bytes=on_bytes)
            for piece, result in results:
                done.append((piece.index, result))
                if progress is not None:
                    progress.update(len(done))
    except KeyboardInterrupt:
        if not done:
            raise
        raise StoppedError(
            f"{name} was stopped; {len(done):,} of {len(pieces):,} pieces are done and kept",
            remedy="Run the same command again to go on.",
        ) from None
    return done
