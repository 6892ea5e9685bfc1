"""Causal attention in blocks beside torch's own kernel on this CPU: forward and backward, medians taken in turns.

python benchmarks/attention.py
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import statistics
import time
from collections.abc import Callable

import torch
from measuring import print_machine
from torch.nn.functional import scaled_dot_product_attention

from gptcli.model.attention import causal_attention

SHAPES = ((12, 4, 64, 32), (16, 6, 256, 64), (8, 8, 512, 64), (4, 8, 1024, 64), (2, 8, 2048, 64))
ROUNDS = 9


def main() -> None:
    print_machine(("gptcli", "torch"))
    print("\n| batch x heads, time, width | type | torch, ms | blocks, ms | torch / blocks |")
    print("| --- | --- | --- | --- | --- |")
    for batch, heads, length, width in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [torch.randn(batch, heads, length, width, dtype=dtype, requires_grad=True) for _ in range(3)]
            slope = torch.randn(batch, heads, length, width, dtype=dtype)
            ways: tuple[Callable[[], torch.Tensor], ...] = (
                lambda inputs=inputs: scaled_dot_product_attention(*inputs, is_causal=True),  # type: ignore[misc]
                lambda inputs=inputs: causal_attention(  # type: ignore[misc]
                    *(tensor.flatten(0, 1) for tensor in inputs), inputs[0].shape[-1] ** -0.5
                ).unflatten(0, inputs[0].shape[:2]),
            )
            theirs, ours = timed(ways, inputs, slope)
            print(
                f"| {batch} x {heads}, {length}, {width} | {str(dtype)[6:]} | {theirs:.1f} | {ours:.1f}"
                f" | {theirs / ours:.2f} |"
            )


def timed(ways: tuple[Callable[[], torch.Tensor], ...], inputs: list[torch.Tensor], slope: torch.Tensor) -> list[float]:
    """The median milliseconds of each way's forward and backward pass, without the first."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 1):
        for way, found in zip(ways, times, strict=True):
            started = time.perf_counter()
            torch.autograd.grad(way(), inputs, slope)
            found.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(found[1:]) for found in times]


if __name__ == "__main__":
    main()
