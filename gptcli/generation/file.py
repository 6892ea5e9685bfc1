"""A file of prompts to a file of completions, resumable: read, planned, completed unit by unit, put together.

The process that the user started reads the file before any model is loaded and writes the output in the end; the units
between are its own work, or that of several processes. A unit is the same bytes whoever completes it (in fp32), so a
job that is killed, at any moment and however often, ends with the file of one that was not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gptcli.data.job import megabytes
from gptcli.data.readers import shown
from gptcli.endings import WorkersError, on_stop_signals
from gptcli.errors import AbortedError, CheckpointError, DataError, StoppedError, writing
from gptcli.files import fsync_folder, read_json, write_json
from gptcli.generation.batches import UNIT_TOKENS, prompts_a_unit
from gptcli.generation.file_job import (
    FINISHED,
    FORMAT,
    JOB,
    OUTPUT,
    FileJob,
    check_paths,
    check_replaceable,
    finished,
    held,
    known,
    remember,
    stat_of,
    written,
)
from gptcli.generation.file_work import GO_ON, Begun, open_begun, rate_text, watched, work
from gptcli.generation.journal import KEPT, Done
from gptcli.generation.media_prompt import model_reader
from gptcli.generation.spool import COMPLETIONS, sizes, write_rows, write_tokens
from gptcli.model.load import context_of, load_config, load_tokenizer, model_home
from gptcli.reporting import Silent

if TYPE_CHECKING:
    from gptcli.reporting import Reporter

# Reading and encoding a smaller file takes a second or two.
BAR_BYTES = 20_000_000


def complete_file(job: FileJob, reporter: Reporter, *, workers: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Complete the prompts of a file, or go on with it; return what `--json` prints beside the output's name.

    Args:
        job: what is to be done.
        reporter: where information goes.
        workers: starts so many processes that call `complete_share`, and waits for them; None: this process works.

    Raises:
        UsageError: the output cannot be one, or may not be replaced.
        DataError: a row that is no prompt, by file and line.
        CheckpointError: what is there is of another job; the disk does not take the results.
        StoppedError: interrupted with finished units; the same command goes on.
        AbortedError: interrupted before, or by a second signal.
    """
    check_paths(job)
    if not job.file.is_file():
        raise DataError("there is no such file", where=shown(job.file))
    started = time.monotonic()
    with on_stop_signals(signal.default_int_handler), held(job):
        try:
            if (result := _finished(job, reporter)) is not None:
                return result
            begun = _begin(job, reporter)
            done = Done(job.partial, begun.units)
            before = done.tokens
            processes = min(job.processes, len(begun.units) - len(done.blocks))
            if workers is None or processes <= 1:
                work(begun, range(len(begun.units)), 0, reporter)
            else:
                saved = f"{len(begun.spool):,} prompts, saved every {begun.most_prompts:,}"
                reporter.say(f"{job.model}, {begun.job.settings.how}: {saved}, on {processes} processes")
                with watched(begun, reporter):
                    workers(processes)
            return _put_together(begun, reporter, before, started)
        except (KeyboardInterrupt, AbortedError):
            raise _stopped(job) from None
        except WorkersError as error:
            if error.exit_code not in (StoppedError.exit_code, AbortedError.exit_code):
                raise
            raise _stopped(job, at_once=error.exit_code == AbortedError.exit_code) from None


def _finished(job: FileJob, reporter: Reporter) -> dict[str, Any] | None:
    """The result of a job that is finished; None: there is something to do."""
    if known(job) is None:
        result = finished(job)
    elif (result := written(job)) is not None:
        remember(job, result)
    if result is not None:
        reporter.say(f"{shown(job.output)} is finished: {result['prompts']:,} prompts, {result['tokens']:,} tokens")
    return result


def _begin(job: FileJob, reporter: Reporter) -> Begun:
    """The job as it was begun, or begun now: read, encoded, planned."""
    path = job.partial / JOB
    if path.exists():
        begun = open_begun(job, read_json(path))
        prompts = Done(job.partial, begun.units).prompts
        reporter.say(f"going on: {prompts:,} of {len(begun.spool):,} prompts are done")
        return begun
    before, identity, replaces = stat_of(job.file), job.identity, stat_of(job.output)
    with writing(job.partial, "the folder of what is done", "Nothing is lost."):
        size = job.file.stat().st_size
        shows = reporter if size >= BAR_BYTES else Silent()
        with megabytes(shows, "reading", size) as on_bytes:
            count, blank = write_rows(job.file, job.form, job.partial, on_bytes)
        if blank:
            reporter.say(f"blank lines: {blank:,} of them are left out")
        context = context_of(load_config(model_home(job.model)[0]))
        tokenizer = load_tokenizer(job.model)
        reader = model_reader(job.model) if job.form.media else None
        with (reporter if reader else shows).progress("encoding", count, "prompts") as progress:
            write_tokens(job.file, job.form, job.partial, tokenizer, context, progress.update, reader)
        if stat_of(job.file) != before:
            raise DataError("the file changed while it was read", where=shown(job.file), remedy="Start again.")
        copies = job.settings.num_return_sequences
        value = {
            "format": FORMAT,
            "identity": identity,
            "model": str(job.model),
            "settings": asdict(job.settings),
            "context": context,
            "most_prompts": job.save_every or prompts_a_unit(count, copies=copies, processes=job.processes),
            "most_tokens": UNIT_TOKENS,
            "replaces": replaces,
            "sizes": sizes(job.partial),
        }
        write_json(path, value)
    begun = open_begun(job, value)
    wanted = job.settings.max_new_tokens
    if context is not None and (short := int((begun.spool.lengths + wanted > context).sum())):
        reporter.say(
            f"{short:,} of {count:,} prompts leave room for fewer than {wanted:,} new tokens "
            f"in the model's context of {context:,}"
        )
    return begun


def _put_together(begun: Begun, reporter: Reporter, before: int, started: float) -> dict[str, Any]:
    """Write the output, each row of the file with its completions, at once and whole."""
    job, spool = begun.job, begun.spool
    done = Done(job.partial, begun.units)
    if len(done.blocks) < len(begun.units):
        raise CheckpointError(
            f"{len(begun.units) - len(done.blocks):,} units are missing", where=shown(job.partial), remedy=GO_ON
        )
    temporary = job.partial / OUTPUT
    with writing(job.output, "the output", KEPT):
        with temporary.open("wb") as file:
            for row, completions in zip(spool.rows(), done.completions(), strict=True):
                file.write(f'{row[:-1].rstrip()}, "{COMPLETIONS}": {completions}}}\n'.encode())
            file.flush()
            os.fsync(file.fileno())
        check_replaceable(job, read_json(job.partial / JOB))
        seconds = time.monotonic() - started
        tokens = done.tokens
        result = {
            "prompts": len(spool),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round((tokens - before) / max(seconds, 1e-3), 1),
        }
        write_json(job.partial / FINISHED, {"stat": stat_of(temporary), "result": result})
        os.replace(temporary, job.output)
        fsync_folder(job.output.parent)
    remember(job, result)
    reporter.say(
        f"done: {len(spool):,} prompts, {tokens:,} tokens in {seconds:,.1f} s "
        f"({rate_text(tokens - before, seconds)}): {shown(job.output)}"
    )
    return result


def _stopped(job: FileJob, *, at_once: bool = False) -> StoppedError | AbortedError:
    """What is said of an interrupted job: what is done of it, and how it goes on."""
    prompts = total = 0
    with contextlib.suppress(OSError, ValueError, KeyError, CheckpointError):
        begun = open_begun(job, read_json(job.partial / JOB))
        prompts, total = Done(job.partial, begun.units).prompts, len(begun.spool)
    if not prompts:
        return AbortedError("nothing was done yet, and nothing is lost")
    what = f"{prompts:,} of {total:,} prompts are done and kept"
    if at_once:
        return AbortedError(f"at once; {what}", remedy=GO_ON)
    return StoppedError(what, remedy=GO_ON)
