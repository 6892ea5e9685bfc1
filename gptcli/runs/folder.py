"""The layout of a run's folder: the one place that knows it.

A folder is a run when it holds `run.json`. What a reader finds there may be half a run (still training, killed, edited
by hand), so every read ends in a value or in a typed error, never in a traceback. A run that says `running` while its
process is gone has died; a process that started after `run.json` was last written is another one under a recycled id.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import platform
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gptcli.errors import CheckpointError, MissingError, UsageError
from gptcli.files import read_json, write_json

Status = Literal["running", "stopped", "failed", "done", "died"]
STATUSES = get_args(Status)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "adapter_config.json", *WEIGHT_FILES, "pytorch_model.bin")
MANIFEST = "MANIFEST.json"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
CLOCK_SLACK_SECONDS = 5.0


@dataclass(frozen=True)
class RunFolder:
    """A run's folder by its path; nothing is read before it is asked for."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name: the folder's."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The recipe as given."""
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe with every default and derived value."""
        return self.path / "resolved.yaml"

    @property
    def run_json(self) -> Path:
        """Status, versions, fingerprints, plan and result."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a log step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON line a text generated on the way."""
        return self.path / "samples.jsonl"

    @property
    def final(self) -> Path:
        """The trained model, a plain Hugging Face folder."""
        return self.path / "final"

    @property
    def report(self) -> Path:
        """The report: one HTML page."""
        return self.path / "report.html"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of one step, whether it exists or not."""
        return self.path / f"checkpoint-{step}"

    def exists(self) -> bool:
        """Whether this is a run."""
        return self.run_json.is_file()

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The complete checkpoints by step; a folder without its manifest was never finished."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                match = CHECKPOINT.fullmatch(path.name)
                if match and (path / MANIFEST).is_file():
                    found.append((int(match[1]), path))
        return sorted(found)

    def read(self) -> dict[str, Any]:
        """What `run.json` holds.

        Raises:
            MissingError: there is no run.json.
            CheckpointError: it cannot be read, or is not a JSON object.
        """
        try:
            value = read_json(self.run_json)
        except FileNotFoundError:
            raise MissingError(f"no run in {self.path} (it has no run.json)", remedy="gptcli runs list") from None
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(self.run_json, str(error)) from error
        if not isinstance(value, dict):
            raise _damaged(self.run_json, "it is not a JSON object")
        return value

    def update(self, **fields: Any) -> None:
        """Set fields of `run.json`, which is created when absent; readers see the old file or the new one."""
        value = self.read() if self.exists() else {}
        write_json(self.run_json, {**value, **fields})

    def weights(self) -> Path | None:
        """The folder of the run's best finished weights: `final/`, else the newest complete checkpoint."""
        if has_weights(self.final):
            return self.final
        return next((path for _, path in reversed(self.checkpoints()) if has_weights(path)), None)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"damaged: {why.splitlines()[0][:200] if why else 'unreadable'}", where=str(path))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors weights under one of the names that transformers reads."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def runs_root() -> Path:
    """Where runs are looked for: `./runs`, else `$GPTCLI_RUNS`, relative to the current directory."""
    here = Path("runs")
    given = os.environ.get("GPTCLI_RUNS")
    return here if here.is_dir() or not given else Path(given).expanduser()


def find_runs(root: Path) -> list[RunFolder]:
    """The runs directly under `root`, the one last started or ended first."""
    try:
        runs = [run for run in map(RunFolder, root.iterdir()) if run.exists()]
    except OSError:
        return []
    return sorted(runs, key=lambda run: (_last_active(run), run.name), reverse=True)


def _last_active(run: RunFolder) -> float:
    try:
        fields = run.read()
    except (CheckpointError, MissingError):
        fields = {}
    times = [moment.timestamp() for key in ("started", "ended") if (moment := parse_time(fields.get(key)))]
    if times:
        return max(times)
    with contextlib.suppress(OSError):
        return run.run_json.stat().st_mtime
    return 0.0


def parse_time(value: Any) -> datetime | None:
    """An ISO time of `run.json`, with a zone (UTC when it names none); None for anything else."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        moment.timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    return moment


def status(run: RunFolder) -> Status:
    """The state of a run: what `run.json` says, but `died` when its process is gone from this host.

    Raises:
        CheckpointError: `run.json` is damaged or holds no known status.
    """
    fields = run.read()
    said = fields.get("status")
    if said not in STATUSES:
        raise _damaged(run.run_json, f"its status is {said!r}, not one of {', '.join(STATUSES)}")
    if said == "running" and fields.get("host") in (None, platform.node()):
        pid = fields.get("pid")
        if isinstance(pid, int) and not _alive(pid, written=run.run_json.stat().st_mtime):
            return "died"
    return cast(Status, said)


def _alive(pid: int, written: float) -> bool:
    """Whether the process that wrote a file at `written` (epoch seconds) still runs under `pid`."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        state, start_ticks = fields[0], int(fields[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return True  # no /proc: the id is all there is to go by
    return state not in "ZX" and time.time() - age <= written + CLOCK_SLACK_SECONDS


def owner(path: Path) -> RunFolder | None:
    """The run that a model folder belongs to: the folder itself, or the one that holds it."""
    resolved = path.resolve()
    return next((run for run in (RunFolder(resolved), RunFolder(resolved.parent)) if run.exists()), None)


def resolve_run(argument: str) -> RunFolder:
    """The run of a name under `runs_root()` or of a path.

    Raises:
        UsageError: there is no such run.
    """
    candidates = [Path(argument).expanduser()]
    if is_name := _is_name(argument):
        candidates.insert(0, runs_root() / argument)
    for path in candidates:
        if RunFolder(path).exists():
            return RunFolder(path)
    where = f"{runs_root()}/" if is_name else str(candidates[0])
    raise UsageError(f"no run {argument!r} in {where}", remedy=_nearest_run(argument) or "gptcli runs list")


def resolve_model(argument: str | None) -> Path:
    """The model folder of a run's name, a run, checkpoint or Hugging Face folder, or nothing (the newest run).

    A Hub id (OWNER/NAME) is returned as given when it is neither a run nor a path.

    Raises:
        UsageError: the argument is a file, or empty.
        MissingError: nothing of that name, or nothing in it to load.
    """
    if argument is None:
        return _newest_weights()
    if not argument.strip():
        raise UsageError("the model is empty", remedy="give a run's name, a folder or a Hub id, or leave it out")
    path = Path(argument).expanduser()
    for candidate in (runs_root() / argument, path) if not path.is_absolute() else (path,):
        if RunFolder(candidate).exists():
            return _weights_of(RunFolder(candidate))
        if candidate.is_dir() and (candidate == path or any((candidate / name).exists() for name in MODEL_FILES)):
            return candidate
    if path.exists():
        raise UsageError(
            f"{path} is a file, not a model folder", remedy=f"give the folder that holds it: {path.parent}"
        )
    if HUB_ID.fullmatch(argument) and not Path(argument.split("/", 1)[0]).is_dir():
        return Path(argument)
    remedy = "A model is a run's name, a folder or a Hub id written OWNER/NAME. Runs: gptcli runs list"
    nearest = _nearest_run(argument)
    raise MissingError(
        f"no model {argument!r}: no run of that name in {runs_root()}/ and no such folder",
        remedy=f"{nearest}\n{remedy}" if nearest else remedy,
    )


def _is_name(argument: str) -> bool:
    return bool(argument) and not Path(argument).is_absolute() and ".." not in Path(argument).parts


def _nearest_run(argument: str) -> str | None:
    close = difflib.get_close_matches(argument, [run.name for run in find_runs(runs_root())], n=1)
    return f"Did you mean {close[0]!r}?" if close else None


def _newest_weights() -> Path:
    root = runs_root()
    runs = find_runs(root)
    for run in runs:
        if folder := run.weights():
            return folder
    seen = f"no run in {root}/ has weights yet ({len(runs)} looked at)" if runs else f"there are no runs in {root}/"
    raise MissingError(
        f"no model to use: {seen}",
        remedy="Train one (gptcli pretrain quickstart), or name a run, a folder or a Hub id.",
    )


def _weights_of(run: RunFolder) -> Path:
    if folder := run.weights():
        return folder
    raise MissingError(
        f"the run {run.name!r} has no weights yet",
        where=str(run.path),
        remedy="Looked for final/ and checkpoint-STEP/. Let it train to its first checkpoint (train.save_every).",
    )
