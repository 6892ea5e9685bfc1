"""Whether a run goes on, starts anew, or must not: a changed recipe or data set is refused with the differences.

The recipe is compared as written, before `auto` is decided. Keys that do not change what is learnt may differ, and a
run may become longer (its schedule is then computed anew).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError, DataError, UsageError
from gptcli.files import held_alone, read_json, remove
from gptcli.reporting import Reporter
from gptcli.runs.folder import MANIFEST, RunFolder
from gptcli.train.adapter_base import BASE
from gptcli.train.checkpoint import newest_good, remove_leftovers, verify
from gptcli.train.plan import MICRO_BATCH

if TYPE_CHECKING:
    from gptcli.recipe.schema import Train

_LENGTH_KEYS = ("train.max_steps", "train.max_tokens", "train.epochs")
_HARMLESS = (
    "name",
    "output_dir",
    "extends",
    "generate",
    "eval",
    "tracking",
    "launch",
    "tokenize.processes",
    "tokenize.executor",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.sample_every",
    "train.save_total_limit",
    MICRO_BATCH,
    "finetune.merge",
    "train.on_save_error",
    "train.eval_at_start",
    "train.max_time",
    "data.workers",
    "data.cache_features",
)
# Files that a recipe names and that a run reads again, by the key that names them.
_PARTS = (
    ("reference", "model.from", "the weights there are not those that the run began with, its reference model"),
    ("reward", "finetune.reward", "the file was changed"),
)
LOCK = ".lock"
_PATHS = ("path", "tokens")


@dataclass(frozen=True)
class Start:
    """Where training starts: from nothing (None), or from a verified checkpoint and its manifest."""

    checkpoint: Path | None
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Finished steps."""
        return int(self.manifest.get("step", 0))


def find_start(run: RunFolder, *, resume: str, overwrite: bool, reporter: Reporter) -> Start:
    """Decide where to start, and say what was passed over. Nothing of a run is removed here (see `clear`).

    Args:
        run: the run's folder, which may not exist.
        resume: auto, never, or the path of a checkpoint.
        overwrite: whether a run that is there is to be replaced.
        reporter: where what was passed over is said.

    Raises:
        UsageError: the folder is used and `resume` is never, or is not a run at all.
        CheckpointError: no checkpoint of several verifies, or the one that was named does not.
    """
    used = run.exists() or bool(run.checkpoints())
    if overwrite and used:
        return Start(None, {})
    if not used and run.path.is_dir() and not all(_of_a_beginning(path.name) for path in run.path.iterdir()):
        raise UsageError(
            f"{run.path} is not empty and is not a run",
            remedy="Give another name=NAME or output_dir=FOLDER.",
        )
    remove_leftovers(run)
    if resume == "never":
        if used:
            raise UsageError(
                f"the run {run.name} is there already, and --resume never was given",
                where=str(run.path),
                remedy="--overwrite trains again from the start; name=NAME starts another run.",
            )
        return Start(None, {})
    if resume != "auto":
        folder = Path(resume)
        reason = verify(folder) if folder.is_dir() else "there is no such folder"
        if reason is not None:
            raise CheckpointError(f"cannot resume: {reason}", where=resume, remedy="Name another checkpoint folder.")
        start = Start(folder, read_json(folder / MANIFEST))
        if any(step > start.step for step, _ in run.checkpoints()):
            reporter.say(f"the checkpoints of {run.name} after step {start.step:,} are removed by the next save")
        return start
    found = newest_good(run)
    if run.exists() and found.folder is None:
        reporter.say(f"{run.name} has no checkpoint: it starts from the first step")
    for path, reason in found.passed_over:
        reporter.warn(f"{path.name} is passed over: {reason} (the next save removes it)")
    return Start(found.folder, found.manifest)


def ended_early(start: Start, train: Train) -> bool:
    """Whether a checkpoint is the end of a run that stopped early, by the patience of the recipe now."""
    patience, best = train.early_stopping_patience, start.manifest.get("best")
    if patience is None or best is None or best.get("metric", train.best_metric) != train.best_metric:
        return False
    return int(best["waited"]) >= patience


def clear(run: RunFolder) -> None:
    """Remove what an earlier run left, but its lock: for `--overwrite`, once the new run is known to begin.

    What makes the folder a run goes last, so that a kill on the way leaves a run.
    """
    for path in sorted(run.path.iterdir(), key=lambda path: path == run.run_json):
        if path.name != LOCK:
            remove(path)


def _of_a_beginning(name: str) -> bool:
    """Whether a file is one of those that a run writes before `run.json`, or what a kill left of one."""
    return name in (LOCK, "recipe.yaml", "resolved.yaml") or name.startswith(
        (".recipe.yaml.", ".resolved.yaml.", ".run.json.")
    )


def check_unchanged(
    start: Start,
    *,
    recipe: dict[str, Any],
    fingerprints: dict[str, str],
    steps: int,
    allowed: Sequence[str],
    prepared: Path,
) -> list[str]:
    """Compare a recipe with the one that a checkpoint was trained with.

    Args:
        start: the checkpoint.
        recipe: the whole recipe with defaults, `auto` undecided.
        fingerprints: of data, prepared (what the data is made from), tokenizer and an adapter's base now.
        steps: of the whole run, as planned now.
        allowed: keys that may differ (`--allow-changes`).
        prepared: the folder of the prepared data, for the message.

    Returns:
        The harmless differences, one line each.

    Raises:
        CheckpointError: something that changes what is learnt is different; lists what.
        DataError: the recipe and the sources are the same, and the data prepared from them is not.
    """
    then_print, now_print = start.manifest["fingerprints"], fingerprints
    same_data = then_print["data"] == now_print["data"]
    then, now = _flatten(start.manifest["recipe"]), _flatten(recipe)
    changed = {key: (then.get(key), now.get(key)) for key in sorted({*then, *now}) if then.get(key) != now.get(key)}
    refused: list[str] = []
    harmless: list[str] = []
    for key, (before, after) in changed.items():
        line = f"{key}: {_show(before)} -> {_show(after)}"
        moved = key == "model.from" and then_print.get(BASE) == now_print.get(BASE) is not None
        is_path = key.startswith(("data.", "tokenizer.")) and key.rsplit(".", 1)[-1] in (*_PATHS, "from")
        longer = key in _LENGTH_KEYS and steps >= int(start.manifest["steps"])
        fine = _under(key, _HARMLESS) or _under(key, allowed) or longer or moved or (is_path and same_data)
        (harmless if fine else refused).append(line)
    if None not in (then_print.get(BASE), now_print.get(BASE)) and then_print[BASE] != now_print[BASE]:
        raise CheckpointError(
            "the base of this run's adapter is not the model that it was trained on: its weights are others",
            where=str(recipe["model"]["from"]),
            remedy="Restore it, or name where it is: model.from=FOLDER\n"
            "To train anew: --overwrite, or another name=NAME.",
        )
    if then_print["tokenizer"] != now_print["tokenizer"]:
        raise CheckpointError(
            f"this is not the tokenizer of the run, which is at step {start.step}: its ids mean other texts",
            where=str(start.checkpoint),
            remedy="\n".join([*refused[:4], "To train anew: --overwrite, or another name=NAME."]),
        )
    for part, key, what in _PARTS:
        if part in then_print and then_print[part] != now_print.get(part) and not _under(key, allowed):
            refused.append(f"{key}: {what}")
    if not same_data and "data" not in allowed and not any(line.startswith("data") for line in refused):
        if not refused and then_print.get("prepared") == now_print.get("prepared") is not None:
            raise _replaced(start, now_print["data"], prepared)
        refused.append("data: the content is not what this run was trained on")
    if refused:
        keys = ",".join(dict.fromkeys(line.split(":", 1)[0] for line in refused))
        shown = refused[:4] + ([f"and {len(refused) - 4} more"] if len(refused) > 4 else [])
        raise CheckpointError(
            f"this is not the recipe or the data of the run, which is at step {start.step}",
            where=str(start.checkpoint),
            remedy="\n".join(
                [
                    *shown,
                    f"To go on all the same: --allow-changes {keys}",
                    "To train anew: --overwrite, or another name=NAME.",
                ]
            ),
        )
    return harmless


def _replaced(start: Start, found: str, prepared: Path) -> DataError:
    """The error for prepared data that is whole, and made from these sources by its name, but is not the run's."""
    expected = start.manifest["fingerprints"]["data"]
    return DataError(
        f"the data's fingerprint is {found}, and that of {start.checkpoint and start.checkpoint.name} is {expected}: "
        "the prepared data was replaced (the recipe and its sources are the same)",
        where=str(prepared),
        remedy=f"Delete the folder and run again: rm -r {shlex.quote(str(prepared))}\n"
        "To go on with this data all the same: --allow-changes data\n"
        "To train anew: --overwrite, or another name=NAME.",
    )


def decided_before(start: Start, recipe: dict[str, Any]) -> dict[str, str]:
    """What the checkpoint says that `auto` stood for, and its micro-batch, unless the recipe has another one since."""
    decided: dict[str, str] = dict(start.manifest.get("decided") or {})
    then = _flatten(start.manifest.get("recipe") or {})
    if then.get(MICRO_BATCH) != _flatten(recipe).get(MICRO_BATCH):
        decided.pop(MICRO_BATCH, None)
    return decided


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold the run's folder: a second training in it is refused with the first one's process id.

    Raises:
        UsageError: another process holds it.
        CheckpointError: the folder cannot be written, now or inside.
    """
    try:
        with _held(run):
            yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        if not Path(name).is_relative_to(run.path.parent):  # not the run's: that of a source, of the cache
            raise
        raise CheckpointError(
            f"the run's folder cannot be written: {error.strerror or error}",
            where=name,
            remedy="Make room, mend the folder, or set output_dir to another one.",
        ) from error


@contextmanager
def _held(run: RunFolder) -> Iterator[None]:
    def refuse(pid: str) -> UsageError:
        return UsageError(
            f"the run {run.name} is being trained by process {pid}",
            where=str(run.path),
            remedy="Wait for it, stop it, or give another name=NAME.",
        )

    run.path.mkdir(parents=True, exist_ok=True)
    with held_alone(run.path / LOCK, refuse):
        yield


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} as {"a.b": 1}; lists by index, None left out (a key set to null is an absent one)."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {} if value is None else {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _under(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _show(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
