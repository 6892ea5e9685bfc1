"""What is counted of the media of rows, by their kind, and how it is told: of prepared pieces and in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptcli.data.media.item import MODALITIES, NOUNS, Medium, counted, pixels


@dataclass
class MediaCounts:
    """The media of one kind: how many, in how many rows, the tokens that stand for them, their extents.

    An extent is width and height in pixels, or seconds; `least` and `most` are those of the smallest and the largest,
    `total` the sum of areas or seconds.
    """

    media: int = 0
    rows: int = 0
    tokens: int = 0
    most_tokens: int = 0
    total: float = 0.0
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def add(self, other: MediaCounts) -> None:
        """Count what another one has counted, too."""
        self.media += other.media
        self.rows += other.rows
        self.tokens += other.tokens
        self.most_tokens = max(self.most_tokens, other.most_tokens)
        self.total += other.total
        self.least = min((each for each in (self.least, other.least) if each), key=math.prod, default=[])
        self.most = max((each for each in (self.most, other.most) if each), key=math.prod, default=[])


def count_media(counts: dict[str, MediaCounts], rows: Iterable[Sequence[Medium]]) -> list[int]:
    """Count the media of rows, which have been read; return how many tokens of each row stand for them."""
    taken = []
    for row in rows:
        taken.append(sum(medium.tokens for medium in row))
        for medium in row:
            found, extent = counts.setdefault(medium.modality, MediaCounts()), [*medium.extent]
            found.add(MediaCounts(1, 0, medium.tokens, medium.tokens, math.prod(extent), extent, extent))
        for modality in {medium.modality for medium in row}:
            counts[modality].rows += 1
    return taken


def media_numbers(counts: Mapping[str, MediaCounts], tokens: int) -> dict[str, Any]:
    """What was counted as the report has it, by kind; `tokens`: all there are."""
    return {kind: _numbers(kind, counts[kind], tokens) for kind in MODALITIES if kind in counts}


def _numbers(kind: str, counts: MediaCounts, tokens: int) -> dict[str, Any]:
    if kind == "audio":
        seconds = {"seconds": counts.total, "shortest": counts.least[0], "longest": counts.most[0]}
        about: dict[str, Any] = {name: round(value, 3) for name, value in seconds.items()}
    else:
        about = {"smallest": counts.least, "largest": counts.most}
    return {
        "count": counts.media,
        "rows": counts.rows,
        "tokens": counts.tokens,
        "mean_tokens": round(counts.tokens / counts.media, 1),
        "most_tokens": counts.most_tokens,
        "share_of_tokens": round(counts.tokens / tokens, 4) if tokens else None,
        **about,
    }


def media_lines(numbers: Mapping[str, Mapping[str, Any]], rows: int, length: int | None) -> list[str]:
    """`media_numbers` of `rows` rows for people, a line for each kind; `length`: of a row of the training."""
    return [_line(NOUNS[kind], each, rows, length) for kind, each in numbers.items()]


def _line(name: str, numbers: Mapping[str, Any], rows: int, length: int | None) -> str:
    without = rows - numbers["rows"]
    where = f"in {counted(numbers['rows'], 'row')}" + (f" ({without:,} without)" if without else "")
    if "seconds" in numbers:
        size = f"{numbers['seconds']:,.1f} s in all, {numbers['shortest']:,.3g} to {numbers['longest']:,.3g} s each"
    else:
        sizes = [pixels(numbers["smallest"]), pixels(numbers["largest"])]
        size = f"{' to '.join(dict.fromkeys(sizes))} pixels"
    mean, most = numbers["mean_tokens"], numbers["most_tokens"]
    of_row = f"of a row's {length:,}" if length else ""
    at_most = " ".join(each for each in (f"at most {most:,}" if mean != most else "", of_row) if each)
    tokens = f"{mean:,g} tokens each{f' ({at_most})' if at_most else ''}"
    share = f"{100 * numbers['share_of_tokens']:.1f}% of all tokens"
    return f"{counted(numbers['count'], name)} {where}: {size}, {tokens}, {share}"
