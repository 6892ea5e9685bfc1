"""fp16's skipped steps. The loss is scaled up so that small gradients survive; where a scaled one overflows, torch's
scaler leaves the weights alone and halves the scale. That is no divergence, unless it never ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from gptcli.errors import DivergedError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from gptcli.reporting import Reporter

MOST_IN_A_ROW = 10


class ScaledSteps(TrainerCallback):
    """Keeps a skipped step's place in the schedule, says it, and stops after too many in a row.

    Args:
        scaler: torch's GradScaler.
        where: the run's folder, for the error.
        reporter: where a skipped step is said.
    """

    def __init__(self, scaler: Any, where: str, reporter: Reporter) -> None:
        self._scaler = scaler
        self._where = where
        self._reporter = reporter
        self._in_a_row = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look at what the scaler made of the step."""
        del args
        if not kwargs["optimizer"].step_was_skipped:
            self._in_a_row = 0
            return control
        self._in_a_row += 1
        scale = self._scaler.get_scale()
        if self._in_a_row >= MOST_IN_A_ROW:
            raise DivergedError(
                f"{MOST_IN_A_ROW} steps in a row, up to step {state.global_step}, had a gradient that is not finite at"
                f" any loss scale (now {scale:g})",
                where=self._where,
                remedy="No update was made from them; the last checkpoint is good.\n"
                "Try train.precision=fp32, a lower train.learning_rate, or more train.warmup.",
            )
        # The Trainer holds the schedule back; here a step has its place in it, whether it was skipped or not.
        kwargs["lr_scheduler"].step()
        self._reporter.say(
            f"step {state.global_step:,}  skipped: the gradient overflowed; the loss scale is {scale:g} now"
        )
        return control
