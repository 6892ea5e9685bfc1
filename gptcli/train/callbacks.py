"""What happens between steps: when to log, evaluate, save, sample and stop, decided in one place.

A signal or `max_time` finishes the step, saves and stops; a second signal leaves at once. The processes of a run agree
on it at the end of each step, whichever of them the signal came to.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptcli import launch
from gptcli.endings import on_stop_signals
from gptcli.errors import AbortedError
from gptcli.train import group

if TYPE_CHECKING:
    from gptcli.recipe.schema import Train
    from gptcli.train.plan import Plan


# How long a signal that comes by two ways is taken for one.
ECHO_SECONDS = 1.0
# Reasons to stop beside the numbers of signals.
_MAX_TIME, _AS_ASKED = 1000, 1001


class StopRequest:
    """Whether and why training should stop at the end of the step; the same on all processes."""

    def __init__(self, *, max_seconds: float | None = None, after_step: int | None = None) -> None:
        self.reason: str | None = None
        self._signal = 0
        self._signalled = 0.0
        self._started = time.monotonic()
        self._max_seconds = max_seconds
        self._after_step = after_step

    def due(self, step: int) -> bool:
        """Whether to stop now that `step` steps are finished. All processes ask after the same steps."""
        why = self._signal
        if not why and self._after_step is not None and step >= self._after_step:
            why = _AS_ASKED
        if not why and self._max_seconds is not None and time.monotonic() - self._started >= self._max_seconds:
            why = _MAX_TIME
        if self.reason is None and (why := group.most(why)):
            others = {_MAX_TIME: "train.max_time is over", _AS_ASKED: f"as asked after step {step}"}
            self.reason = others.get(why) or f"by {signal.Signals(why).name}"
        return self.reason is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP into a stop at the end of the step; a second one ends with 130."""

        def handle(number: int, frame: FrameType | None) -> None:
            del frame
            if not self._signal:
                self._signal, self._signalled = number, time.monotonic()
                say(b"\nstopping after this step; once more leaves at once\n")
                return
            # A scheduler or a terminal signals all processes of a job, and their parent passes its own signal on.
            if number == self._signal and launched and time.monotonic() < self._signalled + ECHO_SECONDS:
                return
            say(b"\nleft at once; the last checkpoint is good\n")
            sys.stderr.flush()
            os._exit(AbortedError.exit_code)

        def say(text: bytes) -> None:
            # A signal handler must not take rich's locks: plain bytes to standard error.
            if launch.is_main_process():
                with suppress(OSError):  # a terminal that was closed
                    os.write(2, text)

        launched = launch.group().launcher != ""
        with on_stop_signals(handle):
            yield


class Schedule(TrainerCallback):
    """Sets the Trainer's flags at the end of each step, from the plan."""

    def __init__(self, plan: Plan, train: Train, stop: StopRequest, *, has_validation: bool, has_prompts: bool) -> None:
        self._plan = plan
        self._train = train
        self._stop = stop
        self._has_validation = has_validation
        self._has_prompts = has_prompts

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decide what follows the step."""
        del args, kwargs
        step, plan = state.global_step, self._plan
        last = step >= plan.steps
        stopping = not last and self._stop.due(step)
        control.should_log = step == 1 or step % plan.log_every == 0 or last
        control.should_evaluate = self._has_validation and (last or _due(step, plan.eval_every))
        control.should_save = last or stopping or _due(step, plan.save_every)
        control.should_training_stop = last or stopping
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop at once when a signal came during the save: what is saved need not be saved again a step later."""
        del args, kwargs
        control.should_training_stop = control.should_training_stop or self._stop.due(state.global_step)
        return control

    def sample_due(self, step: int) -> bool:
        """Whether texts are to be generated after `step` steps."""
        every = self._train.sample_every
        return self._has_prompts and every > 0 and (step >= self._plan.steps or _due(step, every))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
