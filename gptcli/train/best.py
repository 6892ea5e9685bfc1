"""The best evaluation so far, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gptcli.recipe.measures import PREFIX, is_better


@dataclass
class Best:
    """The evaluation with the best value of a metric; see `train.early_stopping_patience`.

    Attributes:
        patience: evaluations without a better one after which training stops.
        metric: `train.best_metric`, which decides whether lower or higher is better.
        step: of the best evaluation; 0: there was none.
        value: of the metric then.
        waited: evaluations since.
    """

    patience: int
    metric: str
    step: int = 0
    value: float | None = None
    waited: int = 0

    def observe(self, step: int, value: float | None) -> bool:
        """Take an evaluation; whether it is the best. One that is no number is not."""
        self.waited += 1
        if value is None or not math.isfinite(value):
            return False
        if self.value is not None and not is_better(self.metric, value, self.value):
            return False
        self.step, self.value, self.waited = step, value, 0
        return True

    @property
    def over(self) -> bool:
        """Whether training is to stop."""
        return self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint's manifest; a resume may have another patience."""
        return {"metric": self.metric, "step": self.step, "value": self.value, "waited": self.waited}

    def start_at(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; from one of a run without patience, or by another metric, as from the start."""
        if state and state["step"] and state.get("metric", self.metric) == self.metric:
            self.step, self.value, self.waited = state["step"], state["value"], state["waited"]


def value_of(line: dict[str, Any], metric: str) -> float | None:
    """What `train.best_metric` names of an evaluation's line in metrics.jsonl; None: it has no such number."""
    name = metric.removeprefix(PREFIX)
    if name == "perplexity":
        return None if line["loss"] is None else math.exp(min(line["loss"], 700.0))
    value: float | None = {**line, **line.get("metrics", {})}.get(name)
    return value
