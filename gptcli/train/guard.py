"""Steps whose numbers are not fit for an update: a gradient that is not finite, or a spike.

A spike is a loss or a gradient norm far above those of the last steps, as OLMo tells it (OLMo et al. 2024,
arXiv:2501.00656, section 3.1, whose optimizer skips such steps): more than six standard deviations over the mean of the
last 128 steps. Both are numbers of the whole global batch, so that all processes decide the same.

On a CPU a step is judged before its update. A GPU is not waited for: its update is masked on the device where the
gradient is not finite, and the step is judged when the next one is on its way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from gptcli.errors import DivergedError

if TYPE_CHECKING:
    from gptcli.recipe.schema import Train
    from gptcli.reporting import Reporter

WINDOW = 128
# The loss falls fast in the first steps; a spread of few numbers says little.
LEAST = 32
DEVIATIONS = 6.0
# A loss that has settled has hardly any spread: what is so little above the mean harms nobody.
LEAST_RATIO = {"loss": 1.2, "gradient norm": 3.0}
MOST_IN_A_ROW = 10


class StepGuard:
    """Judges each step by its loss and the norm of its gradient, and follows the recipe's policy.

    Args:
        train: the recipe's section: `non_finite` and `loss_spike`.
        waits: whether a step is judged before its update (a CPU; a GPU that is waited for).
        describe: the rows of a step, for a message.
        leave_out: called with a step that was skipped.
        where: the run's folder, for errors.
        reporter: where skipped steps and spikes are said.
    """

    def __init__(
        self,
        train: Train,
        *,
        waits: bool,
        describe: Callable[[int], str],
        leave_out: Callable[[int], None],
        where: str,
        reporter: Reporter,
    ) -> None:
        self._non_finite, self._spikes_policy = train.non_finite, train.loss_spike
        self._waits = waits
        self._describe = describe
        self._leave_out = leave_out
        self._where = where
        self._reporter = reporter
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in LEAST_RATIO}
        self._in_a_row = 0
        self._counts = {"skipped": 0, "spikes": 0}  # since the last log line
        self._pending: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def judge(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether the update of a step is to be made; where nothing is waited for: yes, and the one before is judged.

        Args:
            step: the step that is about to end, from 1.
            loss: mean loss of the global batch, in nats a token.
            norm: the gradient's norm over all parameters and processes, before clipping.

        Raises:
            DivergedError: the recipe says stop, or ten steps in a row were skipped.
        """
        if self._waits:
            return self._look(step, float(loss), float(norm))
        self.settle()
        self._pending = (step, loss, norm)
        return True

    def settle(self) -> None:
        """Judge the step that has not been; call it before a log line and a save."""
        if self._pending is not None:
            step, loss, norm = self._pending
            self._pending = None
            self._look(step, float(loss), float(norm))

    def counts(self) -> dict[str, int]:
        """The steps that were skipped and the spikes since the last call, where there were any."""
        found = {name: count for name, count in self._counts.items() if count}
        self._counts = dict.fromkeys(self._counts, 0)
        return found

    def _look(self, step: int, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the gradient of step {step} is not finite (norm {norm}, loss {loss:.4g})"
            if self._non_finite == "stop":
                raise self._diverged(step, what)
            return self._skip(step, what)
        values = {"loss": loss, "gradient norm": norm}
        spikes = [text for name, value in values.items() if (text := self._spike(name, value)) is not None]
        if not spikes or self._spikes_policy != "skip":
            self._in_a_row = 0
            for name, value in values.items():
                self._seen[name].append(value)
        if not spikes:
            return True
        self._counts["spikes"] += 1
        what = f"step {step} is a spike: {', '.join(spikes)}"
        if self._spikes_policy == "stop":
            raise self._diverged(step, what)
        if self._spikes_policy == "skip":
            return self._skip(step, what)
        self._reporter.warn(what)
        return True

    def _spike(self, name: str, value: float) -> str | None:
        """What is said of a number that is far above the last ones; None for one that is not."""
        seen = self._seen[name]
        if len(seen) < LEAST:
            return None
        mean = fmean(seen)
        deviation = math.sqrt(fmean((number - mean) ** 2 for number in seen))
        if value <= max(mean + DEVIATIONS * deviation, LEAST_RATIO[name] * mean):
            return None
        return f"{name} {value:.4g}, {mean:.4g} ± {deviation:.2g} in the last {len(seen)} steps"

    def _skip(self, step: int, what: str) -> bool:
        self._in_a_row += 1
        self._counts["skipped"] += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise self._diverged(step, f"{self._in_a_row} steps in a row were skipped; {what}")
        self._leave_out(step)
        self._reporter.warn(f"{what}; it is skipped")
        return False

    def _diverged(self, step: int, what: str) -> DivergedError:
        return DivergedError(
            what,
            where=self._where,
            remedy=f"{self._describe(step)}\n"
            "Nothing was saved since; the last checkpoint is good.\n"
            "Try a lower train.learning_rate, more train.warmup, or look at those rows.",
        )

    def state(self) -> dict[str, Any]:
        """All that later steps are judged by, for a checkpoint's manifest."""
        self.settle()
        return {
            "seen": {name: list(values) for name, values in self._seen.items()},
            "in_a_row": self._in_a_row,
            "counts": self._counts,
        }

    def start_at(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, values in state["seen"].items():
            self._seen[name].extend(values)
        self._in_a_row, self._counts = state["in_a_row"], dict(state["counts"])
