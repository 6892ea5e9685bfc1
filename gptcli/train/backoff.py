"""A step that runs out of memory is begun again with half the rows at once.

What a step is made of does not change: its rows, its place in the schedule, and its loss, which is a sum over the
tokens of the global batch and does not depend on how they are divided. So the result is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gptcli.device import free_memory, is_out_of_memory
from gptcli.train.batches import next_smaller
from gptcli.train.zero import ZeroTrainer

if TYPE_CHECKING:
    from gptcli.reporting import Reporter
    from gptcli.train.compiling import Compiler
    from gptcli.train.loss import TrainingLoss
    from gptcli.train.meter import Meter
    from gptcli.train.plan import Plan
    from gptcli.train.rows import Batch, RunRows

Replan = Callable[[int, str], "Plan"]


class BackOffTrainer(ZeroTrainer):
    """A Trainer that halves its micro-batch when a forward or backward pass runs out of memory.

    The Trainer's loop goes on handing out micro-batches of the size that it began with, each of which is then run in
    several passes. Not covered: memory that runs out in the optimizer, whose update cannot be taken back.

    Attributes:
        in_pass: whether a forward or backward pass is running, or was when an error was raised.
    """

    _compiler: Compiler
    _loss: TrainingLoss
    _replan: Replan
    _reporter: Reporter
    _meter: Meter
    _pass_rows: int | None = None  # None: a micro-batch as the loop has it
    _step = -1
    _micro_batches: list[Batch]
    _run_rows: RunRows
    in_pass = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch, and of the step's earlier ones again when memory ran out."""
        if self._step != self.state.global_step:
            self._step, self._micro_batches = self.state.global_step, []
            self._meter.begin_step()
        self._micro_batches.append(inputs)
        to_run = [inputs]
        self.in_pass = True
        while True:
            try:
                for micro_batch in to_run:
                    loss = self._passes(model, micro_batch, num_items_in_batch)
                self.in_pass = False
                return loss
            except (RuntimeError, MemoryError) as error:
                # With several processes each would go its own way here, and their collectives would no longer match
                # (DDP averages in each last micro-batch's backward). They would have to agree on the size first: until
                # then the run ends, and its checkpoint is good.
                if self._plan.micro_batch_size == 1 or self._plan.processes > 1 or not is_out_of_memory(error):
                    raise
                self._begin_again(model, error)
            to_run = self._micro_batches

    def _passes(self, model: Any, inputs: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """The loss of a micro-batch, which is run in as many passes as it has to be."""
        rows = self._pass_rows
        if rows is None:
            return super().training_step(model, inputs, num_items_in_batch)
        losses = []
        for part in self._run_rows.parts(inputs, rows):
            losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def _begin_again(self, model: Any, error: BaseException) -> None:
        """Drop what the step has gathered and what the failed pass holds; micro-batches are smaller from now on."""
        model.zero_grad(set_to_none=True)
        free_memory(error)
        self._meter.take_back()
        step, before = self._step + 1, self._plan.micro_batch_size
        plan = self._replan(next_smaller(before), f"{before} ran out of memory in step {step:,}")
        rows = "1 row" if plan.micro_batch_size == 1 else f"{plan.micro_batch_size} rows"
        self._reporter.warn(
            f"out of memory in step {step:,}: the micro-batch is {rows} from now on, accumulation "
            f"{plan.gradient_accumulation_steps}; the global batch stays {plan.global_batch_size}"
        )
        self._plan, self._pass_rows = plan, plan.micro_batch_size
        self._loss.use_block(plan.loss_block)  # what a resume will take, so that it is exact
        self._compiler.use_rows(plan.micro_batch_size)
