"""Which file job this is, and what is there of it: nothing, a part that goes on, another job's, or the finished file.

Everything of an unfinished job lies in OUTPUT.partial, beside the output, until the output is written whole. A job is
known by content (the file, the model, the settings), not by paths or times, so that the same command goes on with it
and another one is refused with what differs. A job that is finished is remembered in the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.contents import content_hashes
from gptcli.data.readers import shown
from gptcli.errors import CheckpointError, UsageError, writing
from gptcli.files import cache_root, fingerprint, held_alone, read_json, write_json
from gptcli.generation.file_prompts import PromptForm
from gptcli.generation.journal import KEPT, PATTERN
from gptcli.generation.ready import Asked
from gptcli.generation.spool import OF_MEDIA, SPOOL, sizes
from gptcli.model.load import model_home

if TYPE_CHECKING:
    from gptcli.generation.settings import Settings

FORMAT = 1
JOB, FINISHED, OUTPUT, LOCK = "job.json", "finished.json", "output.jsonl", ".lock"
# Of a model's folder, what decides its texts; the rest is training's.
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_OVERWRITE = "Give --overwrite to start anew in its place, or another --output."


@dataclass(frozen=True)
class FileJob:
    """A command that completes the prompts of a file.

    Attributes:
        file: the prompts.
        output: the file to write, JSON lines.
        form: what makes prompts of rows.
        model: a folder, or a Hub id as a path.
        settings: how to generate, with a seed.
        seed: as the command said it; None: it was drawn.
        asked: how the model is held and what goes beside its tokens, as the command said it.
        save_every: prompts of a unit at most; None: a rule.
        processes: that work on it.
        overwrite: whether another job's part, and an output that is there, may be replaced.
    """

    file: Path
    output: Path
    form: PromptForm
    model: Path
    settings: Settings
    seed: int | None = None
    asked: Asked = dataclasses.field(default_factory=Asked)
    save_every: int | None = None
    processes: int = 1
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        """The folder of what is there of it while it is not finished."""
        return self.output.with_name(f"{self.output.name}.partial")

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the output, with content in place of paths."""
        settings = {**dataclasses.asdict(self.settings), "seed": self.seed}
        content = next(iter(content_hashes([str(self.file)])))
        of_model = model_fingerprint(self.model)
        asked = dataclasses.asdict(self.asked)
        if self.asked.draft is not None:
            asked["draft"] = model_fingerprint(self.asked.draft)
        options = {"prompt_column": self.form.column, "save_every": self.save_every, **self.form.identity}
        value = {"file": content, "model": of_model, **options, **asked, **settings}
        return {key: list(each) if isinstance(each, tuple) else each for key, each in value.items()}


def model_fingerprint(model: Path) -> str:
    """A hash of what is in a model's folder, and in that of its base; of a Hub id its commit, as far as it is known."""
    if model.is_dir():
        files = sorted(path for path in model.iterdir() if path.suffix in _MODEL_SUFFIXES and path.is_file())
        own = [[path.name for path in files], list(content_hashes(map(str, files)))]
        base, _ = model_home(model)
        return fingerprint(own if base == model else [own, model_fingerprint(base)])
    from gptcli.model.load import load_config

    return f"{model}@{getattr(load_config(model), '_commit_hash', None)}"


def check_paths(job: FileJob) -> None:
    """Raise `UsageError` for an output that cannot be one."""
    output, name = job.output, f"--output {shown(job.output)}"
    for path in (output, job.file):
        if any("\ud800" <= character <= "\udfff" for character in str(path)):
            raise UsageError(f"{shown(path)}: this file's name is not valid UTF-8", remedy="Rename it.")
    if output.suffix != ".jsonl":
        raise UsageError(f"{name}: the output is JSON lines, so its name ends in .jsonl")
    if not output.parent.is_dir():
        raise UsageError(f"{name}: there is no such folder", remedy=f"mkdir -p {shown(output.parent)}")
    if output.exists() and not output.is_file():
        raise UsageError(f"{name} is no file")
    if output.exists() and job.file.exists() and output.samefile(job.file):
        raise UsageError(f"{name} is the file of the prompts itself", remedy="Give another --output.")


@contextlib.contextmanager
def held(job: FileJob) -> Iterator[None]:
    """Hold the job's folder; one that holds nothing to go on from is removed in the end.

    Raises:
        UsageError: another process works there.
        CheckpointError: the folder cannot be written.
    """

    def refuse(pid: str) -> UsageError:
        return UsageError(
            f"process {pid} is writing {shown(job.output)}", remedy="Wait for it, stop it, or give another --output."
        )

    partial = job.partial
    with writing(partial, "the folder of what is done", KEPT), contextlib.ExitStack() as stack:
        partial.mkdir(exist_ok=True)
        stack.enter_context(held_alone(partial / LOCK, refuse))
        stack = stack.pop_all()
    with stack:
        try:
            yield
        finally:
            if not _has_units(partial) or written(job) is not None:
                with contextlib.suppress(OSError):
                    _clear(partial)
                    (partial / LOCK).unlink()
                    partial.rmdir()


def known(job: FileJob) -> dict[str, Any] | None:
    """What `JOB` holds of a job that goes on; None: it starts, with nothing in its folder.

    Raises:
        CheckpointError: what is there is of another job, or damaged, and may not be overwritten.
    """
    path = job.partial / JOB
    has_units = _has_units(job.partial)
    if has_units or (job.partial / FINISHED).exists():
        try:
            value: dict[str, Any] = read_json(path)
            before, now = value["identity"], job.identity
            is_whole = not job.overwrite or sizes(job.partial) == value["sizes"]
            if value["format"] == FORMAT and before == now and is_whole and (has_units or written(job) is not None):
                return value
            lines = [_difference(key, before, now) for key in {**now, **before} if before.get(key) != now.get(key)]
            what = "an unfinished job is there, of another command, file or model"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            lines, what = [], f"an unfinished job is there, and its {JOB} is damaged"
        if not job.overwrite and has_units:
            lines = [*lines[:5], *(["..."] if len(lines) > 5 else []), _OVERWRITE]
            raise CheckpointError(what, where=shown(job.partial), remedy="\n".join(lines))
    with writing(job.partial, "the folder of what is done", KEPT):
        _clear(job.partial)
    return None


def _clear(partial: Path) -> None:
    """Remove what a job has left, and nothing else that somebody may keep there; last what says which job it is."""
    for path in partial.glob(PATTERN):
        path.unlink()
    for name in (OUTPUT, *SPOOL, *OF_MEDIA, FINISHED, JOB):
        for path in (partial / name, *partial.glob(f".{name}.*")):  # the latter of a write that was killed
            path.unlink(missing_ok=True)


def _has_units(partial: Path) -> bool:
    return any(path.stat().st_size for path in partial.glob(PATTERN))


def finished(job: FileJob) -> dict[str, Any] | None:
    """The result of the job that wrote the output, where that was this one; None: there is none, or not to be kept.

    Raises:
        UsageError: the output that is there may not be replaced.
    """
    if not job.output.exists() or job.overwrite:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        value = read_json(_memory(job))
        if value["stat"] == stat_of(job.output) and value["identity"] == job.identity:
            result: dict[str, Any] = value["result"]
            return result
    raise UsageError(
        f"{shown(job.output)} is there already, and not the finished work of this command", remedy=_OVERWRITE
    )


def check_replaceable(job: FileJob, value: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a file is at the output that was not there when the job began."""
    if job.output.exists() and not job.overwrite and stat_of(job.output) != value["replaces"]:
        raise UsageError(
            f"{shown(job.output)} was not there when this job began",
            remedy=f"Move it away and run the same command again, or give --overwrite. {KEPT}",
        )


def written(job: FileJob) -> dict[str, Any] | None:
    """The result of the job in the folder, when its output is written and only the folder is left."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        value = read_json(job.partial / FINISHED)
        if value["stat"] == stat_of(job.output):
            result: dict[str, Any] = value["result"]
            return result
    return None


def remember(job: FileJob, result: Mapping[str, Any]) -> None:
    """Remember in the cache that the output is the work of this job; where that cannot be written, not."""
    with contextlib.suppress(OSError):
        write_json(_memory(job), {"identity": job.identity, "stat": stat_of(job.output), "result": result})


def stat_of(path: Path) -> list[int] | None:
    """What tells a file from another one at its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _memory(job: FileJob) -> Path:
    return cache_root() / "generated" / f"{fingerprint(str(job.output.resolve()))}.json"


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if key in ("file", "model"):
        return f"{key}: its content is another"
    return f"{key}: {_show(before.get(key))} there, {_show(now.get(key))} here"


def _show(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
