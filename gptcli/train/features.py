"""Outputs of a frozen tower that are made once and kept on disk (`data.cache_features`), for all epochs and later runs.

Each medium's are made alone or beside media of the same size, so that they are its own whatever batch it comes in; that
they are, and that the model makes the same of them as of the media, is tried on rows of the run before the first step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.features import FeatureStore, FeatureWriter, Layouts, key_of, size_of
from gptcli.data.media.item import Medium, Modality
from gptcli.data.media.reader import MediaReader, changed
from gptcli.data.packed import PackedRows
from gptcli.device import is_out_of_memory
from gptcli.errors import GptcliError, RecipeError, first_line
from gptcli.files import cache_root, fingerprint, locked
from gptcli.model.load import evaluating
from gptcli.model.towers import FEATURES, frozen_tower
from gptcli.processors import PROCESSOR_FILES
from gptcli.reporting import quiet
from gptcli.train import group, reading
from gptcli.train.rows import Features, RunRows, WithMedia, inputs_and_labels, whole
from gptcli.train.tower import Tower

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter
    from gptcli.train.plan import Plan

_FORMAT = 1
_TRIED_ROWS, _SCANNED = 4, 1024
# The part of a norm by which the model's answer may differ: rounding, in other orders of summing.
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
NDArrayInt = NDArray[np.int64]


def cached_features(
    loaded: LoadedRecipe,
    plan: Plan,
    model: PreTrainedModel,
    rows: PackedRows,
    reader: MediaReader,
    processor: Path,
    workers: int,
    reporter: Reporter,
) -> tuple[Tower, Features]:
    """The features of the media of a run's rows, made where they are missing; one process makes them for all.

    Args:
        loaded: the recipe.
        plan: its plan.
        model: on its device, with what is frozen frozen.
        rows: of the run.
        reader: of its media.
        processor: the folder with the processor's files.
        workers: processes that decode media ahead.
        reporter: told how many there are.

    Raises:
        RecipeError: the model does not make the same of kept outputs as of media.
        DataError, CheckpointError: a medium cannot be read, a file not be written.
    """
    name, module = frozen_tower(model, loaded)
    modality = _modality(module, reader)
    tower, run = Tower(module), RunRows(rows, plan, reader)
    refused = loaded.where(FEATURES)
    tried = _rows_with_media(rows, plan.total_rows)
    if not tried:
        raise RecipeError(
            f"{FEATURES}: no row of this run has an image or a sound", where=refused, remedy="Leave it out."
        )
    batch = run.read(tried)
    assert isinstance(batch, WithMedia)
    with _trying(model, plan):
        made = _recorded(model, tower, batch, refused)
    about = {
        "format": _FORMAT,
        "tower": [type(module).__qualname__, _weights(module)],
        "config": {**getattr(module, "config", model.config).to_dict(), "_name_or_path": ""},
        "code": _version(),
        "processor": {name: _text(processor / name) for name in PROCESSOR_FILES},
        "kept": tower.kept,
        "precision": plan.precision,
    }
    folder = cache_root() / "features" / fingerprint(about)
    folder.mkdir(parents=True, exist_ok=True)
    features = Features(FeatureStore(folder), Layouts(reader, modality), modality)
    # Without weights every row of every source is among the first `rows_per_epoch`.
    assert loaded.recipe.data is not None
    until = plan.total_rows if loaded.recipe.data.weights else min(plan.total_rows, rows.rows_per_epoch)
    todo = _Todo(rows, until, reader, features)

    def fill() -> None:
        waiting = "features: another process makes them; waiting"
        with locked(f"features-{folder.name}", lambda: reporter.say(waiting)):
            features.store.look()
            first = todo.missing(tried)
            with _trying(model, plan):
                _fill(model, tower, todo, first, folder, plan.micro_batch_size, 0, None)
                features.store.look()
                _check(model, tower, run, batch, made, features, plan, refused)
                missing = todo.missing(None)
                _fill(model, tower, todo, missing, folder, plan.micro_batch_size, workers, reporter)
            features.store.look()

    group.from_first(fill)
    features.store.look()
    reporter.say(f"features: the outputs of {name.rpartition('.')[2]} for {len(features.store):,} media in {folder}")
    return tower, features


class _Todo(Dataset[Any]):
    """Media whose features are missing, as a data set that decodes: an item is (row of the run, number in the row)."""

    def __init__(self, rows: PackedRows, until: int, reader: MediaReader, features: Features) -> None:
        self._rows, self._until, self._reader, self._features = rows, until, reader, features
        self.places = np.empty((0, 2), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def missing(self, ks: Sequence[int] | None) -> NDArrayInt:
        """The places of media of rows (None: of all of the run) that are not kept, each medium once."""
        seen: set[bytes] = set()
        places = []
        numbers = np.arange(self._until) if ks is None else np.asarray(ks)
        for first in range(0, len(numbers), _SCANNED):
            chunk = numbers[first : first + _SCANNED].tolist()
            if all(self._is_known(medium, seen) for medium in _media(self._rows, chunk)):
                continue
            for k in chunk:
                for number, medium in enumerate(_media(self._rows, [k])):
                    if not self._is_known(medium, seen):
                        seen.add(key_of(medium))
                        places.append((k, number))
        return np.array(places, dtype=np.int64).reshape(-1, 2)

    def _is_known(self, medium: Medium, seen: set[bytes]) -> bool:
        key = key_of(medium)
        return medium.modality != self._features.modality or key in seen or self._features.store.has(key)

    def __getitems__(self, items: list[int]) -> Any:
        """Media by sizes: their keys, their size, the inputs of the model. What is wrong with one instead."""
        try:
            return self._read(items)
        except GptcliError as error:
            return reading.Failed(error)

    def _read(self, items: list[int]) -> list[tuple[list[bytes], tuple[int, int], dict[str, torch.Tensor]]]:
        groups: dict[tuple[int, int], list[tuple[bytes, Any]]] = {}
        for k, number in self.places[items].tolist():
            medium = _media(self._rows, [k])[number]
            try:
                loaded = self._reader.load(medium)
            except MediaFault as fault:
                raise changed(fault, f"in {self._rows.row_id(k)}") from None
            groups.setdefault(size_of(loaded), []).append((key_of(medium), loaded))
        return [
            (
                [key for key, _ in media],
                size,
                self._reader.inputs_of([[each] for _, each in media], self._features.modality),
            )
            for size, media in groups.items()
        ]


def _fill(
    model: PreTrainedModel,
    tower: Tower,
    todo: _Todo,
    places: NDArrayInt,
    folder: Path,
    at_once: int,
    workers: int,
    reporter: Reporter | None,
) -> None:
    """Run the tower on media and write what is kept of its outputs."""
    if not len(places):
        return
    todo.places = places
    workers = workers if len(places) > at_once else 0
    batches: Any = DataLoader(
        todo,
        batch_size=at_once,
        collate_fn=whole,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=reading.begin if workers else None,
    )
    writer = FeatureWriter(folder)
    progress = reporter.progress("features", len(places), "media") if reporter is not None else _no_progress()
    done = 0
    with reading.watched(), progress as shown:
        for groups in reading.arrived(iter(batches)):
            for keys, size, inputs in groups:
                for key, parts in zip(keys, _outputs(model, tower, inputs, len(keys)), strict=True):
                    writer.add(key, size, parts)
                done += len(keys)
            if shown is not None:
                shown.update(done)
    writer.close()


def _outputs(
    model: PreTrainedModel, tower: Tower, inputs: dict[str, torch.Tensor], count: int
) -> list[list[torch.Tensor]]:
    """What is kept of the tower's output for each of `count` media of one size."""
    given = {name: values.to(model.device) for name, values in inputs.items()}
    ids = torch.zeros((count, 2), dtype=torch.int64, device=model.device)
    try:
        made = tower.made_by(lambda: model(input_ids=ids, use_cache=False, **given), stop=True)
    except Exception as error:  # whatever a model raises for media without their text
        if is_out_of_memory(error):
            raise
        raise _unfit(f"the model does not run it alone: {first_line(error)[:200]}") from error
    if not made:
        raise _unfit("the model does not run it on media without their text")
    columns = [made[0].tensors[place].cpu().contiguous() for place in tower.kept]
    if any(len(column) % count for column in columns):
        raise _unfit(f"those of {count} media of one size are not equally many for each")
    return [[column.chunk(count)[number].clone() for column in columns] for number in range(count)]


def _recorded(model: PreTrainedModel, tower: Tower, batch: WithMedia, where: str | None) -> torch.Tensor:
    """Find what the model reads of the tower's output for a batch; its answer, the logits."""
    answer: list[torch.Tensor] = []

    def run() -> None:
        answer.append(_logits(model, batch))

    with torch.enable_grad(), quiet():
        made = tower.made_by(run, stop=False)
        if len(made) != 1:
            raise _unfit(f"the model runs its tower {len(made)} times for a batch", where)
        tensors = {place: value for place, value in made[0].tensors.items() if value.is_floating_point()}
        found: Any = torch.autograd.grad(answer[0].float().sum(), [*tensors.values()], allow_unused=True)
    places = [place for place, gradient in zip(tensors, found, strict=True) if gradient is not None]
    if not places or any(not tensors[place].ndim for place in places):
        raise _unfit("nothing that the model reads of its tower's output is known", where)
    tower.keep(made[0], places)
    return answer[0].detach()


def _check(
    model: PreTrainedModel,
    tower: Tower,
    run: RunRows,
    batch: WithMedia,
    wanted: torch.Tensor,
    features: Features,
    plan: Plan,
    where: str | None,
) -> None:
    """Raise a `RecipeError` unless the model answers the same by what is kept as by the media themselves."""
    again = run.with_features(features).read(batch.numbers)
    assert isinstance(again, WithMedia)
    if again.features is None:
        raise _unfit("its outputs have another shape for every medium", where)
    with torch.no_grad(), quiet():
        tower.hold([part.to(model.device) for part in again.features])
        try:
            found = _logits(model, again)
        except Exception as error:  # whatever a model raises for what it does not expect
            raise _unfit(f"the model does not take them: {first_line(error)[:200]}", where) from error
        finally:
            tower.hold(None)
    distance = float((found - wanted).float().norm() / wanted.float().norm())
    if not distance <= _TOLERANCE[plan.precision]:
        raise _unfit(f"the model's answers differ by {distance:.1%}, so a medium's output is not its own", where)


def _logits(model: PreTrainedModel, batch: WithMedia) -> torch.Tensor:
    inputs = inputs_and_labels(batch, model.device)
    inputs.pop("labels")
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


@contextmanager
def _trying(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Without a trace: evaluation mode, no gradients, the random state as it was, in the precision of training."""
    device = model.device
    half = torch.float16 if plan.precision == "fp16" else torch.bfloat16
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.no_grad(),
        evaluating(model),
        quiet(),
        torch.autocast(device.type, dtype=half, enabled=plan.precision != "fp32"),
    ):
        yield


@contextmanager
def _no_progress() -> Iterator[None]:
    yield None


def _rows_with_media(rows: PackedRows, total: int) -> list[int]:
    """The first rows of a run that have media, a few; more than one medium where there is more than one."""
    found: list[int] = []
    for k in range(min(total, rows.rows_per_epoch)):
        if _media(rows, [k]):
            found.append(k)
            if len(found) == _TRIED_ROWS:
                break
    return found


def _media(rows: PackedRows, ks: Sequence[int]) -> list[Medium]:
    return [medium for row in rows.media(np.asarray(ks, dtype=np.int64)) for medium in row]


def _modality(module: nn.Module, reader: MediaReader) -> Modality:
    taken: Any = type(module).input_modalities  # type: ignore[attr-defined]
    kinds = (taken,) if isinstance(taken, str) else taken
    return next(kind for kind in reader.tokens if kind in kinds)


def _weights(module: nn.Module) -> str:
    """A fingerprint of a tower's weights."""
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        data = values.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {[*data.shape]} ".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _version() -> str:
    import transformers

    return transformers.__version__


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _unfit(reason: str, where: str | None = None) -> RecipeError:
    return RecipeError(
        f"{FEATURES}: the outputs of this tower cannot be kept: {reason}", where=where, remedy="Leave it out."
    )
