"""What a plan is made from: the machine, and values chosen with the reason that is printed with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """What a plan needs to know of the machine.

    Attributes:
        kind: cpu, cuda or mps.
        fast_bf16: whether this model trains faster in bf16 than in fp32.
        bf16_reason: how that is known.
        processes: the number of training processes on all machines (the world size).
        memory_bytes: of one device.
        capability: a GPU's compute capability, (8, 0) for an A100; None without one.
        rocm: whether the GPU is AMD's.
        compiler: whether torch.compile has a compiler to build with.
        packages: those of triton, torchao, liger_kernel, flash_attn and flash_attn_interface that can be used.
        threads: that an operation on a CPU is shared by.
        nodes: machines.
        here: whether it is this machine: only then can anything be timed.
    """

    kind: str
    fast_bf16: bool
    processes: int
    memory_bytes: int
    bf16_reason: str = ""
    capability: tuple[int, int] | None = None
    rocm: bool = False
    compiler: bool = False
    packages: frozenset[str] = frozenset()
    threads: int = 1
    nodes: int = 1
    here: bool = True


@dataclass(frozen=True)
class Decision:
    """A value that `auto` (or a share, or another unit) stood for, and why."""

    key: str
    value: str
    reason: str


class Choices:
    """What the recipe says, else what the run began with, else a choice, which is written down with its reason."""

    def __init__(self, decided: Mapping[str, str], decisions: list[Decision]) -> None:
        self._decided = decided
        self._decisions = decisions

    def __call__(self, key: str, given: str | bool, choose: Callable[[], tuple[str | bool, str]]) -> str:
        """The value of a key of the recipe, `given` there."""
        if given != "auto":
            return _text(given)
        before = self._decided.get(key)
        value, reason = (before, "as this run began") if before else choose()
        self._decisions.append(Decision(key, _text(value), reason))
        return _text(value)


def _text(value: str | bool) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else value
