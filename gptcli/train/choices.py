"""What `auto` stands for where no rule is known: timed on this machine, once, and kept.

A timing is stored under `$GPTCLI_CACHE` by all that it depends on, so that the choice is the same the next time. The
random state is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptcli.device import cpu_name, has_fast_bf16
from gptcli.files import cache_root, fingerprint, read_json, write_json

if TYPE_CHECKING:
    import torch

# What is faster by less is not worth another arithmetic.
MARGIN = 1.2
# Work and time that one timing may take; a product of the model's shapes has fewer rows where it would take more.
PRODUCT_FLOPS = 2e10
SHAPE_SECONDS = 0.3
LEAST_TOKENS = 128
FORMAT = 1

Shapes = Sequence[tuple[tuple[int, int], int]]


def choose_bf16(device: torch.device, shapes: Shapes, tokens: int) -> tuple[bool, str]:
    """Whether to train in bf16 here, and why: on a CPU that has it, by timing the model's own matrix products.

    Args:
        device: where it trains.
        shapes: ((outputs, inputs), count) of the model's matrices.
        tokens: of a micro-batch.
    """
    if not has_fast_bf16(device):
        return False, "this CPU has neither AVX512-BF16 nor AMX" if device.type == "cpu" else "no fast bf16 here"
    if device.type == "cuda":
        return True, "this GPU multiplies bf16 fast"
    full, half = timed_products(shapes, tokens)
    ratio = full / half if half else 0.0
    verdict = "" if ratio >= MARGIN else f", less than {MARGIN}"
    return ratio >= MARGIN, f"this model's products are {ratio:.2f} times as fast in bf16 as in fp32 here{verdict}"


def timed_products(shapes: Shapes, tokens: int) -> tuple[float, float]:
    """Seconds of a micro-batch's matrix products, forward and backward, in fp32 and in bf16: stored, else measured."""
    import torch

    key = [FORMAT, "products", cpu_name(), torch.get_num_threads(), torch.__version__, sorted(shapes), tokens]
    path = cache_root() / "choices" / f"{fingerprint(key)}.json"
    try:
        stored = read_json(path)
        return float(stored["fp32"]), float(stored["bf16"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or no file of ours: measured anew
    full = half = 0.0
    for (outputs, inputs), count in shapes:
        rows = max(LEAST_TOKENS, min(tokens, int(PRODUCT_FLOPS / (6 * outputs * inputs))))
        seconds = _product_seconds(outputs, inputs, rows)
        full += seconds[0] * count * tokens / rows
        half += seconds[1] * count * tokens / rows
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fp32": full, "bf16": half})
    return full, half


def _product_seconds(outputs: int, inputs: int, rows: int) -> tuple[float, float]:
    """The best time of a linear layer's forward and backward pass in fp32, and under autocast with its conversions."""
    import torch
    from torch.nn.functional import linear

    hidden = torch.full((rows, inputs), 0.5, requires_grad=True)
    weight = torch.full((outputs, inputs), 0.01, requires_grad=True)
    slope = torch.full((rows, outputs), 0.1)
    best = [float("inf"), float("inf")]
    started = time.perf_counter()
    rounds = 0
    while rounds < 2 or time.perf_counter() - started < SHAPE_SECONDS:  # the first is slow: memory, kernels
        for index in (0, 1):
            begin = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=index == 1):
                product = linear(hidden, weight)
            torch.autograd.grad(product, (hidden, weight), slope.to(product.dtype))
            best[index] = min(best[index], time.perf_counter() - begin)
        rounds += 1
    return best[0], best[1]
