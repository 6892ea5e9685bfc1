"""JSON lines of a run: metrics.jsonl and samples.jsonl.

One writer, many readers. A line is whole or, when its writer was killed in the middle of it, cut off: readers leave
such a tail out and the next append removes it. Numbers that are not finite are written as null, as JSON has none.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from gptcli.errors import CheckpointError, writing
from gptcli.files import write_atomic

TAIL_BLOCK = 1 << 16


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one line; half a line left by a killed writer is removed first.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    data = json.dumps(finite(line), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
    with writing(path, "a line", "The last checkpoint is good."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _remove_half_line(file.fileno(), file.seek(0, os.SEEK_END))
            file.write(data)


def _remove_half_line(descriptor: int, size: int) -> None:
    end = size
    while end:
        start = max(0, end - TAIL_BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def finite(value: Any) -> Any:
    """The value with every number that is not finite as None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; [] when there is no file.

    Raises:
        CheckpointError: a line (not a cut-off last one) is not a JSON object.
    """
    return [value for _, value in _lines(path)]


def truncate(path: Path, step: int) -> None:
    """Cut back to the lines of steps up to `step`, atomically; the bytes of the lines that stay are kept."""
    if path.is_file():
        write_atomic(path, b"".join(raw for raw, value in _lines(path) if _step(value) <= step))


def _step(value: dict[str, Any]) -> float:
    step = value.get("step")
    return step if isinstance(step, int | float) else math.inf


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        raw_lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    lines = []
    for number, raw in enumerate(raw_lines, 1):
        if not raw.endswith(b"\n") or not raw.strip():
            continue
        try:
            value = json.loads(raw, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise CheckpointError("is not a JSON object", where=f"{path}:{number}", remedy="Remove the line.")
        lines.append((raw, value))
    return lines
