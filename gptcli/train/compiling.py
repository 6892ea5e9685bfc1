"""torch.compile of a model's body, tried before the first step; the head stays, the loss compiles its own part.

Only training's micro-batches of the planned shape go through compiled code: evaluation, sampling and a smaller last
batch take the plain one, so that no other shape is ever compiled. Names of weights do not change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from gptcli.device import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.reporting import Reporter
    from gptcli.train.loss import TrainingLoss
    from gptcli.train.plan import Plan


class CompilingFailed(Exception):
    """The compiler cannot do this model here; the message is the reason in one line."""


class Compiler:
    """The compiled forward of what a model is apart from its head, or nothing where the plan has no compiling.

    Args:
        model: the model itself, without wrappers.
        loss: its loss, which may hold a compiled part too.
        plan: says whether to compile, and the shape of a micro-batch.
        reporter: where it is said how that went.
    """

    def __init__(self, model: PreTrainedModel, loss: TrainingLoss, plan: Plan, reporter: Reporter) -> None:
        self._model = model
        self._body: Any = model.base_model
        self._loss = loss
        self._reporter = reporter
        self._shape = (plan.micro_batch_size, plan.sequence_length)
        self._forward = torch.compile(self._body.forward, dynamic=False) if plan.compile else None

    def use_rows(self, rows: int) -> None:
        """Compile for micro-batches of so many rows from now on."""
        self._shape = (rows, self._shape[1])

    def used_for(self, inputs: dict[str, torch.Tensor]) -> Any:
        """A context in which the body runs compiled, if `input_ids` [rows, time] have the shape that it is made for."""
        if self._forward is None or tuple(inputs["input_ids"].shape) != self._shape:
            return nullcontext()
        return self._used()

    @contextmanager
    def _used(self) -> Iterator[None]:
        self._body.forward = self._forward
        try:
            yield
        finally:
            del self._body.forward

    def settle(self, inputs: dict[str, torch.Tensor]) -> None:
        """Compile on a micro-batch that is thrown away. Random state, gradients and weights are left as they were.

        Raises:
            CompilingFailed: nothing of it is left; the run has to be begun without a compiler.
        """
        if self._forward is None:
            return
        if self._body is self._model:
            raise CompilingFailed("this model has no part below its head")
        began = time.monotonic()
        try:
            self._try(inputs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise CompilingFailed(reason(error)) from error
            free_memory(error)  # the first step halves its micro-batch, and compiles for that
        else:
            self._reporter.say(f"compile: ready after {time.monotonic() - began:.0f} s")

    def _try(self, inputs: dict[str, torch.Tensor]) -> None:
        """One forward and backward pass without a trace."""
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        rest = dict(inputs)
        labels = rest.pop("labels")
        self._model.train()
        with torch.random.fork_rng(devices=devices):
            try:
                with self.used_for(rest):
                    objective = self._loss(self._model, rest, labels)[2]
                objective.backward()  # type: ignore[no-untyped-call]
            finally:
                for parameter in self._model.parameters():
                    parameter.grad = None


def reason(error: BaseException) -> str:
    """The first line of what a compiler said, with the kind of error where the line does not name one."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not ("Error" in text or "Invalid" in text):
        text = f"{type(error).__name__}: {text}"
    return text[:200]
