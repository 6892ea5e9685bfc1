"""Checkpoints: committed whole by one rename, verified before they are trusted, pruned only when a newer one is good.

A checkpoint is what transformers writes (so `from_pretrained` loads it) plus the trainer's state and MANIFEST.json,
written last: the size and sha256 of every file, the step, and the fingerprints of what it belongs to.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError, writing
from gptcli.files import (
    committed_folder,
    fingerprint,
    fsync_file,
    read_json,
    remove,
    sha256_file,
    system_errors,
    write_json,
)
from gptcli.runs.folder import CHECKPOINT, MANIFEST, RunFolder
from gptcli.train import random_state
from gptcli.train.optimizer_state import OPTIMIZER, SCHEDULER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 3
# What is read where a checkpoint is loaded: no such file is in it that its manifest does not name.
_READ = (".safetensors", ".pt", ".pth", ".json")
_TRAINING_FILES = (MANIFEST, SCHEDULER, "scaler.pt", "trainer_state.json")
_TRAINING_PARTS = (random_state.PREFIX, OPTIMIZER.removesuffix(".pt"))


@dataclass(frozen=True)
class Found:
    """The result of looking for a checkpoint: the newest that verifies, and those passed over with the reason."""

    folder: Path | None
    manifest: dict[str, Any]
    passed_over: tuple[tuple[Path, str], ...]


@contextlib.contextmanager
def committing(
    run: RunFolder, step: int, facts: dict[str, Any], digests: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes the run's checkpoint of `step` when the block ends without an error.

    Args:
        run: the run.
        step: the number of finished steps.
        facts: what the manifest says beside the files: fingerprints, tokens, recipe, decided values.
        digests: sha256 of files that are known by the end, so that those are not read again.

    Checkpoints of later steps are removed then: they were passed over as damaged, or left behind by `--resume PATH`,
    and would be taken for the newest.

    Raises:
        CheckpointError: the disk is full or cannot be written; what was there before is untouched.
    """
    target = run.checkpoint(step)
    with writing(target, "the checkpoint", "Nothing that was saved before is lost."), committed_folder(target) as work:
        with system_errors(work):
            yield work
        files = {}
        for path in sorted(work.rglob("*")):
            if path.is_file():
                name = str(path.relative_to(work))
                digest = (digests or {}).get(name) or sha256_file(path)
                files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        for log in (run.metrics, run.samples):  # what a checkpoint's step has logged is there when the checkpoint is
            if log.exists():
                fsync_file(log)
        manifest = {"format": FORMAT, "step": step, **facts, "files": files}
        write_json(work / MANIFEST, {**manifest, "fingerprint": fingerprint(manifest)})
    for later, path in _newest_first(run):
        if later > step:
            _remove(path)


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None when its manifest is whole and every file is as it says."""
    try:
        manifest = dict(read_json(folder / MANIFEST))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        if manifest.pop("fingerprint") != fingerprint(manifest):
            return f"{MANIFEST} was changed (its fingerprint differs)"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if sha256_file(path) != expected["sha256"]:
                return f"{name} was changed (its sha256 differs)"
        for path in sorted(folder.iterdir()):
            if path.suffix in _READ and path.name not in (*manifest["files"], MANIFEST):
                return f"{path.name} is none of its files"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_good(run: RunFolder) -> Found:
    """The newest checkpoint that verifies.

    Raises:
        CheckpointError: there are checkpoints and none of them verifies.
    """
    passed: list[tuple[Path, str]] = []
    for _, path in _newest_first(run):
        reason = verify(path)
        if reason is None:
            return Found(path, read_json(path / MANIFEST), tuple(passed))
        passed.append((path, reason))
    if passed:
        lines = [f"{path.name}: {reason}" for path, reason in passed[:4]]
        raise CheckpointError(
            f"none of the {len(passed)} checkpoints can be trusted",
            where=str(run.path),
            remedy="\n".join([*lines, "Restore one from a copy, or train again from the start with --overwrite."]),
        )
    return Found(None, {}, ())


def prune(run: RunFolder, keep: int, spared: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` complete checkpoints and those of the steps `spared`, if the newest verifies.

    What a kill left of a removal goes too. Call it after a new one was committed.
    """
    kept = run.checkpoints()[-keep:]
    old = [path for step, path in _newest_first(run) if kept and step < kept[0][0] and step not in spared]
    if old and verify(kept[-1][1]) is None:
        for path in old:
            _remove(path)


def copy_model(folder: Path, target: Path) -> None:
    """Copy a checkpoint's model, without what only training needs."""
    for path in folder.iterdir():
        if path.name not in _TRAINING_FILES and not path.name.startswith(_TRAINING_PARTS):
            shutil.copy2(path, target)


def remove_leftovers(run: RunFolder) -> None:
    """Remove the temporary folders and files of writes that a kill interrupted."""
    for whole in (run.run_json, run.recipe, run.resolved, run.report, run.metrics, run.samples):
        for path in run.path.glob(f".{whole.name}.*"):
            path.unlink(missing_ok=True)
    for path in run.path.glob(".*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        remove(path)


def _newest_first(run: RunFolder) -> list[tuple[int, Path]]:
    # By step, not by time: clocks go wrong. Those without a manifest are looked at too, to be named.
    with contextlib.suppress(OSError):
        matches = [(CHECKPOINT.fullmatch(path.name), path) for path in run.path.iterdir() if path.is_dir()]
        steps = [(int(match[1]), path) for match, path in matches if match]
        return sorted(steps, reverse=True)
    return []


def check_filled(model: PreTrainedModel, load_result: Any, where: str) -> None:
    """Refuse weights that do not fill a model, where transformers only warns; tied ones are saved once.

    Raises:
        CheckpointError: tensors that the model has not, or lacks.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = set(load_result.missing_keys)
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    lacking = sorted(name for name in missing if id(parameters.get(name)) not in loaded)
    if lacking or load_result.unexpected_keys:
        names = ", ".join([*lacking, *load_result.unexpected_keys][:3])
        raise CheckpointError(
            f"the checkpoint's weights are not this model's: {names}",
            where=where,
            remedy="The model was changed. --overwrite trains anew; name=NAME trains another.",
        )
