"""The units of a file job: which prompts are completed and saved together.

A pure function of the prompts' lengths and the settings, so that a job that goes on has the same units, and another one
of the same file too. The longest prompts come first: what does not fit is met at once, and the last units, for which
the other processes wait, are the short ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Lengths: TypeAlias = NDArray[np.int64]

# Prompts and texts of a unit at their full length. How many of them are in memory at once is the engine's to say.
UNIT_TOKENS = 1 << 20
# What is lost by a kill; enough that the end of a unit, when few are left to be completed together, does not count.
UNIT_SEQUENCES = 256
# With several processes: units for each of them, so that all are at work until near the end.
UNITS_A_PROCESS = 4
FEWEST_SEQUENCES = 32


@dataclass(frozen=True)
class Units:
    """Prompts in the order of work, and where each unit begins in it (and, last, the end)."""

    order: Lengths
    starts: Lengths

    def __len__(self) -> int:
        return len(self.starts) - 1

    def prompts(self, unit: int) -> list[int]:
        """The numbers, in the file, of the prompts of a unit, in its order."""
        found: list[int] = self.order[self.starts[unit] : self.starts[unit + 1]].tolist()
        return found


def plan_units(
    lengths: Lengths, *, new_tokens: int, copies: int, context: int | None, most_prompts: int, most_tokens: int
) -> Units:
    """Cut prompts, the longest first and equals in the order of the file, into units.

    Args:
        lengths: tokens of each prompt.
        new_tokens: at most, of each text.
        copies: texts of each prompt.
        context: tokens of prompt and text at most; None: no limit.
        most_prompts: of a unit.
        most_tokens: of a unit's prompts and texts at full length; a single prompt may have more.
    """
    order = np.argsort(-lengths, kind="stable")
    most = most_tokens if context is None else min(most_tokens, context)  # a prompt that has more is a unit by itself
    ends = np.cumsum(copies * np.minimum(lengths[order] + min(new_tokens, most), most))
    starts = [0]
    while starts[-1] < len(order):
        begin = starts[-1]
        spent = ends[begin - 1] if begin else 0
        fitting = int(np.searchsorted(ends, spent + most_tokens, side="right"))
        starts.append(max(begin + 1, min(fitting, begin + most_prompts)))
    return Units(order, np.array(starts, dtype=np.int64))


def prompts_a_unit(prompts: int, *, copies: int, processes: int) -> int:
    """How many prompts a unit has at most, where the command does not say it."""
    sequences = UNIT_SEQUENCES
    if processes > 1:
        shared = -(-prompts * copies // (UNITS_A_PROCESS * processes))
        sequences = max(min(FEWEST_SEQUENCES, -(-prompts * copies // processes)), min(shared, sequences))
    return max(1, sequences // copies)


def share(units: int, rank: int, processes: int) -> range:
    """The units of one of several processes: of those that follow each other, one each."""
    return range(rank, units, processes)
