"""GELU with its derivative beside torch's own on this CPU: forward and backward, medians taken in turns.

python benchmarks/activation.py
"""

from __future__ import annotations

import os
import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's
# As gptcli does, before torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import statistics
import time
from collections.abc import Callable

import torch
from measuring import print_machine
from torch.nn.functional import gelu

from gptcli.model.activation import TanhGelu

# Tokens of a micro-batch and width between the matrices of an MLP: shapes b, c and a of train.py.
SHAPES = ((4096, 1536), (4096, 2048), (768, 512))
ROUNDS = 25


def main() -> None:
    print_machine(("gptcli", "torch"))
    print("\n| tokens x width | type | threads | torch, ms | ours, ms | torch / ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    ways: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (lambda x: gelu(x, approximate="tanh"), TanhGelu())
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        for tokens, width in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                values = torch.randn(tokens, width).to(dtype).requires_grad_()
                theirs, ours = timed(ways, values, torch.randn(tokens, width).to(dtype))
                print(
                    f"| {tokens:,} x {width:,} | {str(dtype)[6:]} | {threads} | {theirs:.2f} | {ours:.2f}"
                    f" | {theirs / ours:.2f} |",
                    flush=True,
                )


def timed(
    ways: tuple[Callable[[torch.Tensor], torch.Tensor], ...], values: torch.Tensor, slope: torch.Tensor
) -> list[float]:
    """The median milliseconds of each way's forward and backward pass, without the first."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 1):
        for way, found in zip(ways, times, strict=True):
            started = time.perf_counter()
            torch.autograd.grad(way(values), values, slope)
            found.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(found[1:]) for found in times]


if __name__ == "__main__":
    main()
