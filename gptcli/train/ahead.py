"""A Trainer that lets the host run ahead of a GPU: within a step nothing waits for the device.

What transformers 5.23 does in a step was read for that. A batch is one tensor in pinned memory and one copy that the
host does not wait for (it was two, each a wait, since slices are no contiguous memory); labels are counted on the host;
rows of one stream are not searched for documents (`model.kernels`); norms and losses stay on the device until a log
line.
The one wait that is left is that of fp16's loss scaling, which has to know whether a gradient overflowed.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from gptcli.model import context_parallel, isolation
from gptcli.model.kernels import settle_attention
from gptcli.train import float8, group, reading
from gptcli.train.backoff import BackOffTrainer
from gptcli.train.modes import FLASH
from gptcli.train.rows import Batch, MicroBatches, WithMedia, inputs_and_labels, label_count, whole
from gptcli.train.sharding import part_again

if TYPE_CHECKING:
    from gptcli.train.tower import Tower


class AheadTrainer(BackOffTrainer):
    """A Trainer whose batches are tensors (see `train.rows`); fp8 by accelerate's own way.

    A subclass sets the run's rows before it trains.
    """

    _cut: context_parallel.Cut | None = None
    _flat = False
    _tower: Tower | None = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # accelerate 1.15 gives DDP an argument that torch 2.13 has a new name for.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared: Any = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        # Only now is the model as it will be trained: on its device, under autocast.
        model: Any = self.accelerator.unwrap_model(self.model)
        settle_attention(model, self._plan.attention)
        if self._plan.context_parallel > 1:
            self._cut = self._divided_rows(model)
        if self._run_rows.isolated:
            self._flat = self._plan.attention in FLASH
            with self.compute_loss_context_manager():
                isolation.check(model, flat=self._flat, documents=self._run_rows.trial(self.args.device))
        self._compiler.settle(self._prepare_inputs(self._run_rows.first(self._plan.micro_batch_size)))
        self._hold(None)
        part_again(model)
        return prepared

    def _divided_rows(self, model: Any) -> context_parallel.Cut:
        plan = self._plan
        cut = context_parallel.prepare(model, plan.context_parallel, plan.tensor_parallel, plan.world_size)
        with self.compute_loss_context_manager():
            context_parallel.check(model, cut, plan.sequence_length)
        return cut

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch, of this process's part of its rows."""
        with context_parallel.attending(self._cut):
            try:
                loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
                return loss
            finally:
                self._hold(None)  # whatever comes next, an evaluation or a text, brings its own media

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches of this process. accelerate would deal them out by another rule."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self._run_rows,
            batch_sampler=MicroBatches(self._plan, group.part(self._plan.processes)[0]),
            collate_fn=whole,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            worker_init_fn=reading.begin if workers else None,
            generator=torch.Generator(),  # a loader draws a seed, which is not to be one of the model's
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and their labels. Raises what a worker met."""
        return super().get_batch_samples(reading.arrived(epoch_iterator), num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """The labels that count of an optimizer step, over all processes."""
        count = sum(label_count(batch) for batch in batch_samples)
        if self.args.world_size == 1:
            return max(1, count)
        every = self.accelerator.gather(torch.tensor(count, device=device)).sum().clamp(min=1)
        return every * self._plan.processes // self.args.world_size

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The model's inputs and the labels, two views of the batch that is on the device already."""
        if not isinstance(inputs, torch.Tensor | WithMedia):
            return super()._prepare_inputs(inputs)
        features = inputs.features if isinstance(inputs, WithMedia) else None
        self._hold(None if features is None else [part.to(self.args.device, non_blocking=True) for part in features])
        return inputs_and_labels(inputs, self.args.device, flat=self._flat)

    def _hold(self, features: list[torch.Tensor] | None) -> None:
        """What a frozen tower answers with, in place of its own outputs."""
        if self._tower is not None:
            self._tower.hold(features)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        # For accelerate's own way to deal out rows, which is not ours; it refuses it on a CPU.
        arguments.pop("parallelism_config", None)
        if self.args.mixed_precision == "fp8":
            arguments["kwargs_handlers"].append(float8.handler())
        return arguments
