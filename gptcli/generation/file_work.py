"""The work of a file job: units completed one after the other and journaled, by one process or by each of several.

What the processes share is the job's folder: each takes units by their number and appends to a journal of its own, and
the process that started them sees there how far they are.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.endings import on_stop_signals
from gptcli.errors import StoppedError
from gptcli.files import read_json
from gptcli.generation.batches import Units, plan_units, share
from gptcli.generation.file_job import JOB, FileJob
from gptcli.generation.journal import Done, Journal
from gptcli.generation.media_prompt import model_reader
from gptcli.generation.ready import ready
from gptcli.generation.spool import TOKENS, Spool, open_spool
from gptcli.model.load import memory_errors
from gptcli.reporting import Silent

if TYPE_CHECKING:
    from gptcli.reporting import Progress, Reporter

SHOW_SECONDS = 0.2
WATCH_SECONDS = 1.0
GO_ON = "The same command goes on from there."
_MEMORY = "Try --precision bf16, or a smaller --max-new-tokens or --num-return-sequences."


@dataclass(frozen=True)
class Begun:
    """A job whose prompts are read: its model and seed are decided, and its units are planned."""

    job: FileJob
    spool: Spool
    units: Units
    most_prompts: int


def open_begun(job: FileJob, value: dict[str, Any]) -> Begun:
    """A job as it was begun, from what `JOB` in its folder holds."""
    spool = open_spool(job.partial, value["sizes"])
    decided: dict[str, Any] = {
        key: tuple(each) if isinstance(each, list) else each for key, each in value["settings"].items()
    }
    settings = replace(job.settings, **decided)
    units = plan_units(
        spool.lengths,
        new_tokens=settings.max_new_tokens,
        copies=settings.num_return_sequences,
        context=value["context"],
        most_prompts=value["most_prompts"],
        most_tokens=value["most_tokens"],
    )
    return Begun(replace(job, model=Path(value["model"]), settings=settings), spool, units, value["most_prompts"])


def complete_share(job: FileJob, rank: int, processes: int) -> None:
    """Complete the units of one of several processes, of a job that was begun.

    Raises:
        StoppedError: interrupted.
        CheckpointError: the disk does not take the results.
    """
    try:
        with on_stop_signals(signal.default_int_handler):
            begun = open_begun(job, read_json(job.partial / JOB))
            work(begun, share(len(begun.units), rank, processes), rank, Silent())
    except KeyboardInterrupt:
        raise StoppedError("stopped", remedy=GO_ON) from None


def work(begun: Begun, mine: Sequence[int], rank: int, reporter: Reporter) -> None:
    """Complete those of the units that are not done; errors as `complete_share`."""
    from gptcli.generation.text import complete_batch

    job, spool = begun.job, begun.spool
    done = Done(job.partial, begun.units)
    left = [unit for unit in mine if unit not in done]
    if not left:
        return
    asked = job.asked
    if done.made_on and asked.precision == "auto":  # as it was decided when the job began
        asked = replace(asked, precision="bf16" if done.made_on[0].startswith("bf16") else "fp32")
    with memory_errors(f"{_MEMORY} The same command goes on with what is done."), contextlib.ExitStack() as stack:
        it = ready(job.model, asked, reporter.say)
        reader = None if spool.media_ends is None else model_reader(job.model)
        made_on = it.made_on
        reporter.say(
            f"{job.model}, {made_on}, {job.settings.how}: {len(spool):,} prompts, saved every {begun.most_prompts:,}"
        )
        if others := [each for each in done.made_on if each != made_on]:
            reporter.warn(f"what is done was made on {others[0]}: the rest may differ in rounding")
        journal = Journal(job.partial, rank)
        stack.callback(journal.close)
        file = stack.enter_context((job.partial / TOKENS).open("rb"))
        shown = _Shown(stack.enter_context(reporter.progress("generating", len(spool), "prompts")), begun, done.prompts)
        for unit in left:
            shown.begin(unit)
            prompts = [spool.tokens(file, number) for number in begun.units.prompts(unit)]
            completed = complete_batch(
                it.model, it.tokenizer, prompts, job.settings, on_tokens=shown.on_tokens, reader=reader, **it.beside
            )
            lines = [json.dumps([each.as_json() for each in one], ensure_ascii=False) for one in completed]
            journal.append(unit, lines, tokens=sum(each.tokens for one in completed for each in one), made_on=made_on)
            shown.end()


class _Shown:
    """The progress of units: within one, the prompts that its tokens come to at the length of those before it."""

    def __init__(self, progress: Progress, begun: Begun, prompts: int) -> None:
        self._progress = progress
        self._begun = begun
        self._prompts = prompts
        self._tokens = self._in_unit = self._finished = 0
        self._unit = 0
        self._copies = begun.job.settings.num_return_sequences
        self._began = self._told = time.monotonic()
        progress.update(prompts)

    def begin(self, unit: int) -> None:
        self._unit, self._in_unit = len(self._begun.units.prompts(unit)), 0

    def on_tokens(self, count: int) -> None:
        self._tokens += count
        self._in_unit += count
        if time.monotonic() - self._told > SHOW_SECONDS:
            before = self._tokens - self._in_unit
            a_prompt = before / self._finished if before else self._copies * self._begun.job.settings.max_new_tokens
            self._tell(min(self._unit - 1, int(self._in_unit / max(a_prompt, 1))))

    def end(self) -> None:
        self._finished += self._unit
        self._prompts += self._unit
        self._tell(0)

    def _tell(self, more: int) -> None:
        self._told = time.monotonic()
        self._progress.update(self._prompts + more, rate=rate_text(self._tokens, self._told - self._began))


def rate_text(tokens: int, seconds: float) -> str:
    """Tokens a second, for people."""
    return f"{tokens / max(seconds, 1e-3):,.0f} tok/s"


@contextlib.contextmanager
def watched(begun: Begun, reporter: Reporter) -> Iterator[None]:
    """Inside, show how far the processes are that work on a job: the units in their journals, by a thread."""
    before = Done(begun.job.partial, begun.units)
    ended = threading.Event()
    began = time.monotonic()

    def watch(progress: Progress) -> None:
        while not ended.wait(WATCH_SECONDS):
            tell(progress)

    def tell(progress: Progress) -> None:
        now = Done(begun.job.partial, begun.units)
        progress.update(now.prompts, rate=rate_text(now.tokens - before.tokens, time.monotonic() - began))

    with reporter.progress("generating", len(begun.spool), "prompts") as progress:
        progress.update(before.prompts)
        thread = threading.Thread(target=watch, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            tell(progress)
