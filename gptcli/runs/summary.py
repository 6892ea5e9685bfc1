"""A run in one record of key figures: what `runs list`, `runs show` and the report have in common.

Figures come from `run.json`'s result, or from the last lines of metrics.jsonl where those are further (a run that
still trains, or died). Anything missing or of a wrong type is None, never an error: a table of runs must list them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from gptcli.errors import GptcliError
from gptcli.runs import metrics
from gptcli.runs.folder import RunFolder, parse_time, status

Points = list[tuple[float, float]]
SPAN_UNITS = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


@dataclass(frozen=True)
class Summary:
    """Key figures of a run; `problem` says why a run is `unreadable`."""

    name: str
    path: str
    status: str
    step: int | None
    steps: int | None
    tokens: int | None
    parameters: int | None
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    loss_unit: str | None
    tokens_per_second: float | None
    wall_seconds: float | None
    peak_bytes: int | None
    started: str | None
    ended: str | None
    device: str | None
    reason: str | None
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, in the order of the fields."""
        return asdict(self)


def summarize(run: RunFolder) -> Summary:
    """The key figures of a run."""
    problem: str | None = None
    fields: Mapping[str, Any] = {}
    state = "unreadable"
    lines: list[dict[str, Any]] = []
    try:
        fields, state = run.read(), status(run)
    except (GptcliError, OSError) as error:
        problem = str(error)
    try:
        lines = metrics.read(run.metrics)
    except GptcliError as error:
        problem = problem or "; ".join(error.lines()[:1])
    result = mapping(fields.get("result"))
    latest = last(lines, "loss")
    validation = mapping(last(lines, "validation").get("validation"))
    if (whole(latest.get("step")) or 0) <= (whole(result.get("step")) or 0):
        latest, validation = {**latest, **result}, mapping(result.get("validation")) or validation
    return Summary(
        name=run.name,
        path=str(run.path),
        status=state,
        step=whole(latest.get("step")),
        steps=whole(mapping(fields.get("plan")).get("steps")),
        tokens=whole(latest.get("tokens")),
        parameters=whole(fields.get("parameters")) or whole(mapping(fields.get("plan")).get("parameters")),
        loss=number(latest.get("loss")),
        validation_loss=number(validation.get("loss")),
        bits_per_byte=number(validation.get("bits_per_byte")),
        loss_unit=text(fields.get("loss_unit")),
        tokens_per_second=number(latest.get("tokens_per_second")),
        wall_seconds=number(latest.get("wall_seconds")) or number(latest.get("seconds")),
        peak_bytes=whole(latest.get("peak_bytes")) or _peak(lines),
        started=text(fields.get("started")),
        ended=text(fields.get("ended")),
        device=text(fields.get("device")),
        reason=text(fields.get("reason")),
        problem=problem,
    )


def points(lines: Iterable[Mapping[str, Any]], key: str, inner: str | None = None) -> Points:
    """(step, value) of the lines that have a finite number under `key` (or `key.inner`)."""
    found = []
    for line in lines:
        step = number(line.get("step"))
        value = number(mapping(line.get(key)).get(inner) if inner else line.get(key))
        if step is not None and value is not None:
            found.append((step, value))
    return found


def last(lines: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """The last line that has `key`; empty when none has."""
    return next((line for line in reversed(lines) if line.get(key) is not None), {})


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """The value as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """The value as an int, else None."""
    found = number(value)
    return None if found is None else int(found)


def text(value: Any) -> str | None:
    """The value if it is a text with something in it, else None."""
    return value if isinstance(value, str) and value else None


def _peak(lines: Sequence[Mapping[str, Any]]) -> int | None:
    seen = [size for line in lines if (size := whole(line.get("memory"))) is not None]
    return max(seen, default=None)


def count(value: float | None) -> str:
    """A number with a K, M, B or T: 11.5M."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:,.0f}{unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes with a binary unit: 1.2 GiB."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.5:
            return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def span(seconds: float | None) -> str:
    """A length of time in its two largest units: 2 h 5 min."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    for large, large_name, small, small_name in SPAN_UNITS:
        if left >= large:
            rest = left % large // small
            return f"{left // large} {large_name}" + (f" {rest} {small_name}" if rest else "")
    return f"{left} s"


def figure(value: float | None, digits: int = 4) -> str:
    """A number with fixed digits, `-` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def ago(moment: str | None, now: datetime | None = None) -> str:
    """How long ago an ISO time was, in one unit: 5 min ago."""
    parsed = parse_time(moment)
    if parsed is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - parsed).total_seconds()
    if seconds < 60:
        return "just now"
    for length, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {name} ago"
    return "-"
