"""The best evaluation so far, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Best:
    """The evaluation with the lowest value; see `train.early_stopping_patience`.

    Attributes:
        patience: evaluations without a better one after which training stops.
        step: of the best evaluation; 0: there was none.
        value: of the metric then.
        waited: evaluations since.
    """

    patience: int
    step: int = 0
    value: float = math.inf
    waited: int = 0

    def observe(self, step: int, value: float) -> bool:
        """Take an evaluation; whether it is the best. One that is no number is not."""
        if value < self.value:
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    @property
    def over(self) -> bool:
        """Whether training is to stop."""
        return self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint's manifest; a resume may have another patience."""
        return {"step": self.step, "value": self.value if self.step else None, "waited": self.waited}

    def start_at(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; from one of a run without patience as from the start."""
        if state and state["step"]:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
