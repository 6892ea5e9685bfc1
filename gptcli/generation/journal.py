"""What a file job has done so far: finished units, appended to a file a process, with a checksum each.

A unit counts when all of it is there; a torn end, as a kill or a full disk leaves it, is cut off. Memory: one unit,
and for each prompt where its completions stand (18 bytes).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from gptcli.errors import writing
from gptcli.files import fsync_folder
from gptcli.generation.batches import Units

PATTERN = "done-*.jsonl"
MOST_HEADER_BYTES = 1 << 12
KEPT = "What was done before is kept."


@dataclass(frozen=True)
class Block:
    """A finished unit in a journal: its number, its tokens, what it was made on, and where its lines stand."""

    unit: int
    tokens: int
    made_on: str
    begin: int
    size: int


class Journal:
    """The journal of one process, to append to."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"done-{rank}.jsonl"
        with writing(self.path, "the results", KEPT):
            self._file = self.path.open("ab", buffering=0)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX)  # until a worker is gone whose parent was killed
            self._end = max((block.begin + block.size for block in read_blocks(self.path)), default=0)
            self._file.truncate(self._end)
            fsync_folder(folder)

    def append(self, unit: int, lines: Sequence[str], *, tokens: int, made_on: str) -> None:
        """Append a unit, durably or not at all; `lines` are the completions of its prompts, each a line of JSON.

        Raises:
            CheckpointError: the disk does not take it.
        """
        body = "".join(f"{line}\n" for line in lines).encode()
        head = {"unit": unit, "tokens": tokens, "on": made_on, "bytes": len(body)}
        head["xxh3"] = _checksum(head, body)
        data = memoryview(json.dumps(head).encode() + b"\n" + body)
        with writing(self.path, "the results", KEPT):
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._end += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_blocks(path: Path) -> Iterator[Block]:
    """The finished units of a journal, up to the first that is not whole; none where there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while (block := _next_block(file)) is not None:
            yield block


def _next_block(file: BinaryIO) -> Block | None:
    line = file.readline(MOST_HEADER_BYTES)
    try:
        head: dict[str, Any] = json.loads(line)
        checksum, size = head.pop("xxh3"), head["bytes"]
        body = file.read(size)
        if not line.endswith(b"\n") or len(body) != size or _checksum(head, body) != checksum:
            return None
        return Block(head["unit"], head["tokens"], head["on"], file.tell() - size, size)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(head: dict[str, Any], body: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(head, sort_keys=True).encode() + body)


class Done:
    """All that the journals of a job hold."""

    def __init__(self, folder: Path, units: Units) -> None:
        self._paths = sorted(folder.glob(PATTERN))
        self._units = units
        self.blocks: dict[int, tuple[int, Block]] = {}  # by unit: which journal, and where in it
        for number, path in enumerate(self._paths):
            for block in read_blocks(path):
                self.blocks.setdefault(block.unit, (number, block))

    def __contains__(self, unit: int) -> bool:
        return unit in self.blocks

    @property
    def prompts(self) -> int:
        """How many prompts are done."""
        return sum(len(self._units.prompts(unit)) for unit in self.blocks)

    @property
    def tokens(self) -> int:
        """The new tokens of the units that are done."""
        return sum(block.tokens for _, block in self.blocks.values())

    @property
    def made_on(self) -> list[str]:
        """What the units were made on ("fp32 on cpu"), each once."""
        return sorted({block.made_on for _, block in self.blocks.values()})

    def completions(self) -> Iterator[str]:
        """The completions of every prompt, in the order of the file; all units have to be done."""
        total = len(self._units.order)
        journals, begins, sizes = np.zeros(total, np.int16), np.zeros(total, np.int64), np.zeros(total, np.int64)
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(path.open("rb")) for path in self._paths]
            for unit, (number, block) in self.blocks.items():
                files[number].seek(block.begin)
                begin = block.begin
                for prompt in self._units.prompts(unit):
                    size = len(files[number].readline())
                    journals[prompt], begins[prompt], sizes[prompt] = number, begin, size
                    begin += size
            descriptors = [file.fileno() for file in files]
            for prompt in range(total):
                line = os.pread(descriptors[journals[prompt]], int(sizes[prompt]) - 1, int(begins[prompt]))
                yield line.decode()
