"""transformers' Trainer without what costs time in every step: the same loop, with single methods overridden.

Each of them walks the modules of the model, which is a millisecond a step for a model of which a step takes forty.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers.training_args import OptimizerNames

from gptcli.device import return_freed_memory
from gptcli.model.build import uses_a_matrix_twice
from gptcli.train.base import Trainer
from gptcli.train.gradients import clip, gradient_norm
from gptcli.train.halves import NO_SUM, Halves, Inputs, why_whole
from gptcli.train.sharding import part_again


class LeanTrainer(Trainer):
    """A Trainer whose own share of a step is small. What it does not know goes the Trainer's way."""

    _parameters: list[torch.nn.Parameter] | None = None
    _short = False
    _halves: Halves | None = None

    def losses(self, model: Any, inputs: Inputs, num_items_in_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a micro-batch adds to the loss of a step and to the nats that are logged; two threads may be inside."""
        raise NotImplementedError

    def count(self, nats: torch.Tensor) -> None:
        """Add to the nats that are logged."""
        raise NotImplementedError

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Training inside takes the short ways: parameters are listed once, and modules are not walked."""
        arguments = self.args
        assert self.model is not None
        part_again(self.model)  # the model was tried before this
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._short = (
            self.accelerator.distributed_type
            in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
            and arguments.torch_empty_cache_steps is None
            and arguments.optim not in (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
            and "schedule_free" not in str(arguments.optim)
            and not arguments.fp16
        )
        try:
            # Everything that is there by now stays: collections in between steps need not look at it.
            gc.collect()
            gc.freeze()
            return_freed_memory()
            yield
        finally:
            gc.unfreeze()
            if self._halves is not None:
                self._halves.close()
            self._parameters, self._short, self._halves = None, False, None
            self.model.__dict__.pop("zero_grad", None)

    def halve(self, model: Any) -> str | None:
        """Take micro-batches in two halves at once from now on; or the reason why they cannot be."""
        if not self._short:
            return "this optimizer needs the Trainer's own step"
        # The balance of a mixture of experts has so little weight that a trial sees it with some weights, not with
        # others: a resume would not go on as the run began.
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            return NO_SUM
        # Autocast keeps a matrix's bf16 copy for all threads until one of them leaves it: whether two uses share it,
        # and sum their gradients in bf16, would depend on the other thread.
        if uses_a_matrix_twice(model):
            return "this model uses a layer twice"
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        halves = Halves(parameters)
        model.train()
        reason = why_whole(halves, parameters, partial(self._pass, model, 1), self.args.device)
        return_freed_memory()
        if reason is None:
            self._halves = halves
        else:
            halves.close()
        return reason

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch; see `transformers.Trainer.training_step`."""
        if not self._short:
            whole: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return whole
        if not model.training:
            model.train()
        if "zero_grad" not in model.__dict__:
            model.zero_grad = self._zero_grad
        inputs = self._prepare_inputs(inputs)
        run = partial(self._pass, model, num_items_in_batch)
        passes = [run(inputs)] if self._halves is None else self._halves(inputs, run)
        for _, nats in passes:
            self.count(nats)
        total = passes[0][0]
        for loss, _ in passes[1:]:
            total = total + loss
        return total

    def _pass(self, model: Any, num_items_in_batch: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        with self.compute_loss_context_manager():
            loss, nats = self.losses(model, inputs, num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach(), nats

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing: the plan knows the FLOPs; counting parameters at every step costs time."""
        del inputs
        return 0

    def _zero_grad(self, set_to_none: bool = True) -> None:
        del set_to_none
        for parameter in self._parameters or ():
            parameter.grad = None

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        norm = self._norm(model)
        clip(self._listed(model), norm, self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return self._norm(model)  # train.max_grad_norm: 0
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _norm(self, model: Any) -> torch.Tensor:
        if not self._short:
            self.accelerator.unscale_gradients()  # fp16's
        return gradient_norm(self._listed(model))

    def _listed(self, model: Any) -> list[torch.nn.Parameter]:
        return self._parameters or list(model.parameters())
