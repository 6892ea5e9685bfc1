"""What the pictures of an evaluation are made of: loss by position, calibration, and the nats of each token of a text.

It is collected while documents are scored, in sums of a fixed size and the first `TEXT_TOKENS` tokens, so memory does
not grow with the data: 64 KB a model. It is kept in the cache beside the losses of the documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcli.evaluation.loss import Forward
from gptcli.evaluation.scores import read_arrays, write_arrays
from gptcli.evaluation.windows import Document, Window, padded

if TYPE_CHECKING:
    import torch

FORMAT = 1
# Where the bins of positions begin, two an octave: 1, 2, 3, 4, 6, 8, 12, 16, ...
EDGES = np.array([1, *(size for power in range(1, 31) for size in (2**power, 3 * 2 ** (power - 1)))])
BINS = 10
TEXT_TOKENS = 3000


@dataclass(frozen=True)
class Calibration:
    """Predictions by the probability they were given, in bins of equal width: (0, 0.1], (0.1, 0.2], ...

    Attributes:
        counts: [BINS] predictions.
        probability: [BINS] their summed probabilities.
        right: [BINS] how many of them were right.
    """

    counts: NDArray[np.int64]
    probability: NDArray[np.float64]
    right: NDArray[np.int64]

    @property
    def error(self) -> float | None:
        """The expected calibration error, sum(n_b / n * |right_b - probability_b|) over the means of each bin b.

        Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3. None without a prediction.
        """
        total = int(self.counts.sum())
        return float(np.abs(self.right - self.probability).sum()) / total if total else None

    def rows(self) -> list[tuple[float, float, int, float, float]]:
        """Of each bin with predictions: its ends, how many there are, their mean probability and the share right."""
        return [
            (
                number / BINS,
                (number + 1) / BINS,
                int(count),
                float(self.probability[number] / count),
                float(self.right[number] / count),
            )
            for number, count in enumerate(self.counts)
            if count
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = ("from", "to", "count", "probability", "right")
        return {
            "expected_calibration_error": self.error,
            "bins": [dict(zip(names, row, strict=True)) for row in self.rows()],
        }


def calibration(confidence: NDArray[Any], right: NDArray[Any]) -> Calibration:
    """Bin predictions [n] by their probability; those without a finite one are left out."""
    known = np.isfinite(confidence)
    sure = confidence[known].astype(np.float64)
    # Probabilities come as float32, of which 0.1 lies in the first bin: the ends of bins are such numbers, too.
    ends = np.arange(1, BINS, dtype=np.float32) / np.float32(BINS)
    bins = np.searchsorted(ends, sure.astype(np.float32), side="left")
    counts = np.bincount(bins, minlength=BINS)
    sums = np.bincount(bins, sure, BINS).astype(np.float64)
    return Calibration(counts, sums, np.bincount(bins[right[known]], minlength=BINS))


@dataclass(frozen=True)
class ScoredText:
    """The first tokens of the documents, each an entry.

    Attributes:
        documents: the number of the document.
        ids: the token.
        nats: its loss.
        best: the token that was the likeliest in its place.
        confidence: the probability of that one.
    """

    documents: NDArray[np.int32]
    ids: NDArray[np.int32]
    nats: NDArray[np.float32]
    best: NDArray[np.int32]
    confidence: NDArray[np.float32]


@dataclass(frozen=True)
class Curves:
    """What was collected of one model on one corpus.

    Attributes:
        nats: [EDGES] summed by position in context, which is how many tokens the model saw, BOS among them.
        tokens: [EDGES] how many these are; tokens without a finite loss are left out.
        longest: the longest context.
        calibration: of the likeliest next token.
        text: the first tokens.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    longest: int
    calibration: Calibration
    text: ScoredText

    def positions(self) -> list[tuple[int, int, int, float]]:
        """Of each bin with tokens: the shortest and the longest context of it, how many tokens, their mean nats."""
        ends = [min(int(end) - 1, self.longest) for end in (*EDGES[1:], self.longest + 1)]
        return [
            (int(begin), end, int(count), float(nats / count))
            for begin, end, count, nats in zip(EDGES, ends, self.tokens, self.nats, strict=True)
            if count
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON: without the text."""
        names = ("from", "to", "tokens", "loss")
        return {
            "positions": [dict(zip(names, row, strict=True)) for row in self.positions()],
            "calibration": self.calibration.as_dict(),
        }


@dataclass(frozen=True)
class TokenScores:
    """Of each scored token of a window: its nats, the likeliest token in its place, and that one's probability."""

    nats: NDArray[np.float64]
    best: NDArray[np.int64]
    confidence: NDArray[np.float32]
    right: NDArray[np.bool_]


class Collecting:
    """A `Watch` of `document_loss` that sums what the curves need; `reading` sees the documents before they are scored.

    Args:
        text_tokens: of how many tokens, the first, each one is kept.
    """

    def __init__(self, text_tokens: int = TEXT_TOKENS) -> None:
        self._nats = np.zeros(len(EDGES))
        self._tokens = np.zeros(len(EDGES), dtype=np.int64)
        self._longest = 0
        self._sums = Calibration(np.zeros(BINS, dtype=np.int64), np.zeros(BINS), np.zeros(BINS, dtype=np.int64))
        self._places: dict[int, tuple[int, int]] = {}
        self._held = 0
        ids, best, documents = (np.zeros(text_tokens, dtype=np.int32) for _ in range(3))
        nats, confidence = (np.full(text_tokens, np.nan, dtype=np.float32) for _ in range(2))
        self._text = ScoredText(documents, ids, nats, best, confidence)

    def reading(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents, of which the first are held as they pass."""
        for number, (ids, size) in enumerate(documents):
            text, begin = self._text, self._held
            if len(ids) and begin < len(text.ids):
                self._held = end = min(begin + len(ids), len(text.ids))
                self._places[number] = begin, end
                text.documents[begin:end], text.ids[begin:end] = number, ids[: end - begin]
            yield ids, size

    def score(self, forward: Forward, batch: list[Window], device: torch.device, pad_id: int) -> list[TokenScores]:
        """Every token of a batch, a block of logits at a time."""
        import torch
        from torch.nn.functional import cross_entropy

        inputs, targets, mask = padded(batch, pad_id)
        labels = targets[mask].to(device)
        nats, best, confidence, done = [], [], [], 0
        with torch.no_grad():  # which belongs to a thread
            for block in forward(inputs.to(device), mask.to(device)):
                logits = block.float()
                highest, likeliest = logits.max(-1)
                nats.append(cross_entropy(logits, labels[done : done + len(logits)], reduction="none").cpu().double())
                best.append(likeliest.cpu())
                confidence.append((highest - logits.logsumexp(-1)).exp().cpu())
                done += len(logits)
        ends = np.cumsum([window.scored for window in batch])[:-1]
        found = torch.cat(best).numpy()
        parts = (torch.cat(nats).numpy(), found, torch.cat(confidence).numpy(), found == targets[mask].numpy())
        return [TokenScores(*each) for each in zip(*(np.split(part, ends) for part in parts), strict=True)]

    def take(self, window: Window, scored: TokenScores) -> float:
        """Add a window; returns its nats."""
        context = np.arange(window.length - window.scored, window.length) + 1
        finite = np.isfinite(scored.nats)
        bins = np.searchsorted(EDGES, context[finite], side="right") - 1
        self._nats += np.bincount(bins, scored.nats[finite], len(EDGES))
        self._tokens += np.bincount(bins, minlength=len(EDGES))
        self._longest = max(self._longest, window.length)
        found = calibration(scored.confidence, scored.right)
        for sums in fields(Calibration):
            getattr(self._sums, sums.name)[:] += getattr(found, sums.name)
        self._keep_text(window, scored)
        return float(scored.nats.sum())

    def _keep_text(self, window: Window, scored: TokenScores) -> None:
        if window.document not in self._places:
            return
        begin, end = self._places[window.document]
        begin += window.first
        if (count := min(window.scored, end - begin)) > 0:
            for name in ("nats", "best", "confidence"):
                getattr(self._text, name)[begin : begin + count] = getattr(scored, name)[:count]

    def curves(self) -> Curves:
        """What was collected."""
        text = ScoredText(**{each.name: getattr(self._text, each.name)[: self._held] for each in fields(ScoredText)})
        return Curves(self._nats, self._tokens, self._longest, self._sums, text)


def keep_curves(key: str, curves: Curves) -> None:
    """Write what was collected into the cache, under the key of the scores.

    Raises:
        OSError: the cache cannot be written.
    """
    arrays = {f"text_{name}": value for name, value in vars(curves.text).items()}
    arrays |= {f"calibration_{name}": value for name, value in vars(curves.calibration).items()}
    arrays |= {"nats": curves.nats, "tokens": curves.tokens}
    write_arrays(f"{key}-curves", {"format": FORMAT, "longest": curves.longest}, arrays)


def kept_curves(key: str) -> Curves | None:
    """What was kept under a key; None when there is nothing, or the file is damaged."""
    if (found := read_arrays(f"{key}-curves")) is None or found[0].get("format") != FORMAT:
        return None
    about, arrays = found
    try:
        text = ScoredText(**{each.name: arrays[f"text_{each.name}"] for each in fields(ScoredText)})
        sums = Calibration(**{each.name: arrays[f"calibration_{each.name}"] for each in fields(Calibration)})
        return Curves(arrays["nats"], arrays["tokens"], int(about["longest"]), sums, text)
    except (KeyError, TypeError, ValueError):
        return None
