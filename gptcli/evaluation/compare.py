"""Is one model better than another? The same documents, scored by both, and the bootstrap of their differences.

Models that cut the text into the same tokens are compared by their loss, others by bits per byte, which mean the same
for every tokenizer. A difference smaller than what batches and processes change is none, however sure it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptcli.errors import UsageError
from gptcli.evaluation.intervals import Ratio, ratio
from gptcli.evaluation.scores import Scores
from gptcli.runs.metrics import finite

ALPHA = 0.05
# What a loss may depend on batch sizes and processes by, relative to it.
TOLERANCE = 1e-5
Verdict = Literal["better", "worse", "no difference", "too few documents", "not finite"]


@dataclass(frozen=True)
class Comparison:
    """A model beside another, the baseline.

    Attributes:
        by: what is compared.
        difference: the model's minus the baseline's; below 0 it is better.
        found: the difference's interval, p and share; None where there is none.
        verdict: of the model.
    """

    by: Literal["loss", "bits_per_byte"]
    difference: float
    found: Ratio | None
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """As JSON; numbers that are not known are null."""
        found = self.found
        value: dict[str, Any] = finite(
            {
                "by": self.by,
                "difference": self.difference,
                "interval": None if found is None else [found.low, found.high],
                "p": None if found is None else found.p,
                "probability": None if found is None else found.share,
                "verdict": self.verdict,
            }
        )
        return value


def compare(model: Scores, baseline: Scores, *, seed: int = 0) -> Comparison:
    """Compare two models' scores of the same documents by the paired bootstrap.

    Raises:
        UsageError: they are not of the same documents.
    """
    if len(model.bytes) != len(baseline.bytes) or not np.array_equal(model.bytes, baseline.bytes):
        raise UsageError(
            "the models were not scored on the same documents", remedy="Compare them by one command: gptcli eval A B"
        )
    differences = model.nats - baseline.nats
    if np.array_equal(model.tokens, baseline.tokens):
        return _compared("loss", differences, model.tokens, baseline.result.loss, seed)
    level = baseline.result.bits_per_byte or math.nan
    return _compared("bits_per_byte", differences / math.log(2), model.bytes, level, seed)


def _compared(
    by: Literal["loss", "bits_per_byte"], differences: NDArray[Any], under: NDArray[Any], level: float, seed: int
) -> Comparison:
    total = int(under.sum(dtype=np.int64))
    difference = float(differences.sum()) / total if total else math.nan
    found = ratio(differences, under, seed=seed)
    return Comparison(by, difference, found, _verdict(difference, level, found))


def _verdict(difference: float, level: float, found: Ratio | None) -> Verdict:
    if not math.isfinite(difference):
        return "not finite"
    if abs(difference) <= TOLERANCE * level:
        return "no difference"
    if found is None:
        return "too few documents"
    if found.p >= ALPHA:
        return "no difference"
    return "better" if difference < 0 else "worse"
