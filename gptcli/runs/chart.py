"""Curves: as inline SVG for the report, as braille for the terminal. No library, no script.

A curve of any length is drawn with at most `MAX_POINTS` points (the lowest and the highest of each stretch are kept,
so that no spike is lost). Colours are classes, which the page's style sheet gives for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

Points = Sequence[tuple[float, float]]

MAX_POINTS = 600
MAX_TIPS = 120
SMOOTHING = 0.06
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 10.0, 30.0


@dataclass(frozen=True)
class Line:
    """One curve: its points, its CSS class, its name in tooltips; `dots` marks every point.

    `tips` has what tooltips say of each point, where that is more than its value.
    """

    points: Points
    style: str
    name: str = ""
    dots: bool = False
    tips: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: its ends, ticks with their texts, and what tooltips call a point; `log` for even factors."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    name: Callable[[float], str]
    log: bool = False

    def share(self, x: float) -> float:
        """Where a point lies between the ends, from 0 to 1."""
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, x))
        return (at - low) / (high - low)


def steps(last_step: float, width: int) -> Axis:
    """The axis of steps from 0 on, for a chart of a width."""
    high = max(1.0, last_step)
    found = [tick for tick in ticks(0.0, high, width // 90) if 0 <= tick <= high and tick == int(tick)]
    return Axis(0.0, high, [(tick, tick_text(tick, found)) for tick in found], lambda step: f"step {step:,.0f}")


def svg(
    lines: Sequence[Line],
    label: str,
    show: Callable[[float], str],
    *,
    width: int,
    height: int,
    last_step: float = 0.0,
    axis: Axis | None = None,
    values: tuple[float, float] | None = None,
    zero: bool = False,
) -> str:
    """A chart of lines over steps, from step 0 on, with axes, ticks and a tooltip for every stretch of steps.

    Args:
        lines: what is drawn, the last one on top; tooltips tell of those with a name.
        last_step: where the axis of steps ends, so that charts side by side agree.
        axis: another axis than that of steps.
        values: the ends of the value axis; without it those of the lines.
        label: what the chart shows, for readers of the page's text.
        show: a value as text.
        width: of the viewBox; the page scales it.
        height: of the viewBox.
        zero: whether the value axis begins at 0.
    """
    axis = axis or steps(last_step, width)
    y_low, y_high = values or _range([y for line in lines for _, y in line.points])
    y_ticks = ticks(0.0 if zero and y_low >= 0 else y_low, y_high, max(3, height // 60))
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def x_at(x: float) -> float:
        return LEFT + axis.share(x) * (width - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for tick in y_ticks:
        y, shown = y_at(tick), tick_text(tick, y_ticks)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{shown}</text>')
    base = height - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>')
    for tick, shown in axis.ticks:
        x = x_at(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base:.1f}" y2="{base + 4:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17:.1f}" text-anchor="middle">{shown}</text>')
    for line in lines:
        drawn = [(x_at(x), y_at(y)) for x, y in thin(line.points, MAX_POINTS)]
        if len(drawn) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
            parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.dots or len(drawn) == 1:
            parts += [f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in drawn]
    parts += _tips([line for line in lines if line.name], show, axis.name, x_at, y_at, height)
    parts.append("</svg>")
    return "".join(parts)


def _tips(
    named: Sequence[Line],
    show: Callable[[float], str],
    call: Callable[[float], str],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    height: int,
) -> list[str]:
    """Invisible strips over the chart; the one under the pointer shows its marker and the browser its <title>."""
    steps = sorted({x for line in named for x, _ in line.points})
    steps = steps[:: max(1, math.ceil(len(steps) / MAX_TIPS))]
    if not steps:
        return []
    middles = [x_at(step) for step in steps]
    edges = [middles[0] - 4, *((a + b) / 2 for a, b in pairwise(middles)), middles[-1] + 4]
    values = [dict(line.points) for line in named]
    said = [dict(zip((x for x, _ in line.points), line.tips, strict=False)) for line in named]
    tips = []
    for index, step in enumerate(steps):
        here = [
            (line, table[step], tips.get(step))
            for line, table, tips in zip(named, values, said, strict=True)
            if step in table
        ]
        title = "\n".join([call(step), *(f"{line.name}: {tip or show(value)}" for line, value, tip in here)])
        marks = "".join(
            f'<circle class="mark {line.style}" cx="{middles[index]:.1f}" cy="{y_at(value):.1f}" r="3.4"/>'
            for line, value, _ in here
        )
        middle, left, right = middles[index], edges[index], edges[index + 1]
        strip = f'<rect x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{height - TOP - BOTTOM}"/>'
        rule = f'<line class="rule" x1="{middle:.1f}" x2="{middle:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        tips.append(f'<g class="tip"><title>{escape(title)}</title>{strip}{rule}{marks}</g>')
    return tips


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]; about `wanted` of them."""
    rough = (high - low) / max(1, wanted)
    if not 0 < rough < math.inf:
        return [low, low + 1]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float, among: Sequence[float]) -> str:
    """A tick's number, with the digits and the unit that all its neighbours share."""
    largest = max(map(abs, among))
    step = among[1] - among[0] if len(among) > 1 else largest or 1.0
    if value == 0:
        return "0"
    if largest < 0.01 or largest >= 1e15:
        exponent = math.floor(math.log10(largest))
        return f"{value / 10.0**exponent:.3g}e{exponent}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if largest >= size * 10 or (largest >= size and size > 1e3):
            return f"{value / size:.{_digits(step / size)}f}{unit}"
    return f"{value:,.{_digits(step)}f}"


def _digits(step: float) -> int:
    return next((digits for digits in range(4) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6), 4)


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` of the points, the lowest and the highest of each stretch among them."""
    if len(points) <= most:
        return list(points)
    kept = [points[0]]
    stretch = math.ceil(len(points) / max(1, most // 2 - 1))
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        kept += sorted({low, high})
    return [*kept, points[-1]]


def smooth(points: Points) -> list[tuple[float, float]]:
    """The mean of the neighbours on both sides, about 6% of the curve in all; it lags behind no slope."""
    sums = [0.0, *accumulate(y for _, y in points)]
    widest, end = round(len(points) * SMOOTHING / 2), len(points) - 1
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(widest, index, end - index)
        total = sums[index + reach + 1] - sums[index - reach]
        smoothed.append((x, total / (2 * reach + 1)))
    return smoothed


BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def braille(points: Points, *, width: int, height: int) -> list[str]:
    """A curve as `height` lines of `width` braille characters, 2 x 4 dots each."""
    if not points:
        return []
    x_low, x_high = _range([x for x, _ in points])
    y_low, y_high = _range([y for _, y in points])
    columns, rows = width * 2, height * 4
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for column in range(columns):
        at = x_low + (x_high - x_low) * column / (columns - 1)
        row = round((y_high - _value_at(points, at)) / (y_high - y_low) * (rows - 1))
        first, last = (row, row) if before is None else (min(row, before), max(row, before))
        for dot in range(first, last + 1):
            cells[dot // 4][column // 2] |= BRAILLE[dot % 4][column % 2]
        before = row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _value_at(points: Points, x: float) -> float:
    """The curve's value at `x`, between points by a straight line."""
    low, high = 0, len(points) - 1
    if x <= points[0][0]:
        return points[0][1]
    if x >= points[-1][0]:
        return points[-1][1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if points[middle][0] <= x else (low, middle)
    (x0, y0), (x1, y1) = points[low], points[high]
    return y0 if x1 <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
