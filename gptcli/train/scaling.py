"""fp16's skipped steps. The loss is scaled up so that small gradients survive; where a scaled one overflows, torch's
scaler leaves weights and optimizer alone and halves the scale. That is no divergence, unless it does not end.

Skipped steps are counted on the device, from the gradient's norm, and read at log lines and saves. The fused AdamW
skips on the device too, so that nothing waits; with another optimizer torch's scaler itself looks at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gptcli.errors import DivergedError

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from gptcli.reporting import Reporter

MOST_IN_A_ROW = 10


def follow_scaler(trainer: Trainer, where: str, reporter: Reporter) -> ScaledSteps | None:
    """What follows a trainer's scaled steps, as one of its callbacks; None where nothing is scaled."""
    scaler = trainer.accelerator.scaler
    if scaler is None:
        return None
    steps = ScaledSteps(scaler, trainer.args.device, where, reporter)
    trainer.add_callback(steps)
    return steps


class ScaledSteps(TrainerCallback):
    """Counts skipped steps, says them, and keeps their place in the schedule.

    Args:
        scaler: torch's GradScaler.
        device: where the gradients are.
        where: the run's folder, for the error.
        reporter: where skipped steps are said.
    """

    def __init__(self, scaler: Any, device: torch.device, where: str, reporter: Reporter) -> None:
        self._scaler = scaler
        self._where = where
        self._reporter = reporter
        # Skipped since the last look, now in a row, and the most in a row.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def watch(self, norm: torch.Tensor | float) -> None:
        """Count a step by the norm of its gradient, which is not finite where the scaler skips it."""
        skipped = torch.isfinite(torch.as_tensor(norm, device=self._counts.device)).logical_not().long()
        fresh, row, most = self._counts.unbind()
        row = (row + 1) * skipped
        self._counts = torch.stack([fresh + skipped, row, torch.maximum(most, row)])

    def check(self, step: int) -> None:
        """Say how many steps were skipped since the last look; waits for the device.

        Raises:
            DivergedError: ten in a row: no loss scale gives a finite gradient.
        """
        fresh, _, most = (int(count) for count in self._counts)
        if fresh == 0:
            return
        self._counts[0] = 0
        scale = self._scaler.get_scale()
        if most >= MOST_IN_A_ROW:
            raise DivergedError(
                f"{most} steps in a row, up to step {step}, had a gradient that is not finite at any loss scale"
                f" (now {scale:g})",
                where=self._where,
                remedy="No update was made from them; the last checkpoint is good.\n"
                "Try train.precision=fp32, a lower train.learning_rate, or more train.warmup.",
            )
        self._reporter.say(f"step {step:,}  fp16: {fresh} skipped, the gradient overflowed; loss scale {scale:g} now")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Move the schedule on, which the Trainer holds back where it sees that a step was skipped."""
        del args, state
        if kwargs["optimizer"].step_was_skipped:
            kwargs["lr_scheduler"].step()
        return control
