"""What a run's log lines say: the loss since the last line, the speed, the memory.

The time between steps (evaluating, sampling, saving) is left out of the speed. What is gathered between two lines is
part of a checkpoint, so that the next line is the same after a resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gptcli.device import memory_in_use, peak_flops
from gptcli.reporting import mebibytes

if TYPE_CHECKING:
    from gptcli.train.plan import Plan

MEMORY_SECONDS = 2.0
Reduce = Callable[[torch.Tensor], torch.Tensor]


class Counted(Protocol):
    """What the steps of a run hold."""

    def tokens_at(self, step: int) -> int:
        """Inputs, without padding, of the first `step` steps."""

    def labels_at(self, step: int) -> int:
        """Labels that count of the first `step` steps."""


class Meter:
    """Counts nats, tokens and seconds from one log line to the next.

    Args:
        plan: the run's plan.
        rows: the run's rows: what a step holds of tokens (speed) and of labels (loss).
        device: where the run trains.

    Attributes:
        loss: of the last line, in nats a token; None before the first, or when no step of the line counts.
        peak_bytes: the highest memory that was seen.
    """

    def __init__(self, plan: Plan, rows: Counted, device: torch.device) -> None:
        self._plan = plan
        self._rows = rows
        self._device = device
        self._peak_flops = peak_flops(device, plan.precision)
        self._nats = self._nats_before = torch.zeros((), dtype=torch.float64)
        self._logged_tokens = self._start_tokens = self._logged_labels = 0
        self._left_out = 0  # labels of steps that were skipped since the last line
        self._began = time.perf_counter()
        self._step_began = self._step_seconds = self._all_seconds = 0.0
        self._rate: float | None = None
        self._mfu: float | None = None
        self._memory_bytes = 0
        self._memory_due = 0.0
        self.loss: float | None = None
        self.peak_bytes = 0

    def begin(self) -> None:
        """Training begins now."""
        self._began = time.perf_counter()

    def begin_step(self) -> None:
        """Remember what was counted before the step."""
        self._nats_before = self._nats

    def run(self) -> None:
        """A step's work goes on, or begins."""
        if self._step_began == 0.0:
            self._step_began = time.perf_counter()

    def pause(self) -> None:
        """The step is over."""
        if self._step_began:
            self._step_seconds += time.perf_counter() - self._step_began
            self._step_began = 0.0

    def count(self, nats: torch.Tensor) -> None:
        """Add the summed loss of a micro-batch; stays on its device."""
        self._nats = self._nats.to(nats.device) + nats.double()

    def take_back(self, keep: torch.Tensor | None = None) -> None:
        """Forget what the step has counted; with `keep` (a bool on the device) only where that is false."""
        before = self._nats_before.to(self._nats.device)
        self._nats = before if keep is None else torch.where(keep, self._nats, before)

    def step_loss(self, step: int, reduce: Reduce) -> torch.Tensor:
        """The mean loss of a step whose micro-batches are all counted; `reduce` as for `line`."""
        return reduce(self._nats - self._nats_before.to(self._nats.device)) / self._labels_of(step)

    def leave_out(self, step: int) -> None:
        """The next line's loss is not of this step: it was skipped."""
        self._left_out += self._labels_of(step)

    def _labels_of(self, step: int) -> int:
        return self._rows.labels_at(step) - self._rows.labels_at(step - 1)

    def line(self, step: int, *, rate: float, norm: Any, reduce: Reduce) -> Any:
        """The line of metrics.jsonl of a step, and a fresh start for the next one.

        Args:
            step: finished steps.
            rate: the learning rate.
            norm: the gradient's norm.
            reduce: sums a tensor over all processes.
        """
        plan = self._plan
        tokens, labels = self._rows.tokens_at(step), self._rows.labels_at(step)
        counted = labels - self._logged_labels - self._left_out
        timed = tokens - max(self._logged_tokens, self._start_tokens)
        self.loss = float(reduce(self._nats)) / counted if counted else None
        self._rate = timed / max(self._step_seconds, 1e-9)
        flops = self._rate * plan.flops_per_token / plan.processes
        self._mfu = None if self._peak_flops is None else round(flops / self._peak_flops, 4)
        self._all_seconds += self._step_seconds
        memory = self._memory()
        self._nats = self._nats_before = torch.zeros_like(self._nats)
        self._logged_tokens, self._logged_labels, self._left_out, self._step_seconds = tokens, labels, 0, 0.0
        return {
            "step": step,
            "tokens": tokens,
            "loss": self.loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": round(self._rate, 1),
            "mfu": self._mfu,
            "memory": memory,
            "seconds": round(time.perf_counter() - self._began, 3),
        }

    def shown(self, validation_loss: float | None) -> dict[str, str]:
        """The last line, and a validation loss, for the progress display."""
        losses = {"loss": self.loss, "val": validation_loss}
        fields = {name: f"{value:.3f}" for name, value in losses.items() if value is not None}
        if self._rate is not None:
            fields["tok/s"] = f"{self._rate:,.0f}"
            if self._mfu is not None:
                fields["mfu"] = f"{self._mfu:.0%}"
            fields["memory"] = mebibytes(self.peak_bytes)
        return fields

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second over the logged steps of this process."""
        if self._all_seconds == 0.0:
            return None
        return round((self._logged_tokens - self._start_tokens) / self._all_seconds, 1)

    def state(self, reduce: Reduce) -> dict[str, Any]:
        """What the next line needs, for a checkpoint's manifest; `reduce` as for `line`."""
        logged = {"logged_tokens": self._logged_tokens, "logged_labels": self._logged_labels}
        return {"nats": float(reduce(self._nats)), **logged, "left_out": self._left_out}

    def start_at(self, step: int, state: dict[str, Any], *, first: bool) -> None:
        """Go on from a checkpoint of `step`; what all processes have counted is the first one's to hold."""
        nats = float(state["nats"]) if first else 0.0
        self._nats = self._nats_before = torch.tensor(nats, dtype=torch.float64)
        self._logged_tokens, self._left_out = int(state["logged_tokens"]), int(state["left_out"])
        self._logged_labels = int(state.get("logged_labels", self._logged_tokens))  # as many, before there were masks
        self._start_tokens = self._rows.tokens_at(step)

    def _memory(self) -> int:
        # Linux takes ten milliseconds to add it up, which is a quarter of a small model's step.
        now = time.perf_counter()
        if now >= self._memory_due:
            self._memory_bytes = memory_in_use(self._device)
            self._memory_due = now + MEMORY_SECONDS
            self.peak_bytes = max(self.peak_bytes, self._memory_bytes)
        return self._memory_bytes
