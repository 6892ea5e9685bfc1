"""What many GPUs would cost, by arithmetic alone: the tables of docs/scaling.md. Nothing in them is a measurement.

    python benchmarks/scaling.py              every table
    python benchmarks/scaling.py --write      and put them into docs/scaling.md

Each function is one formula of the page, with its source there. The constants in capitals are the assumptions.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import re
from dataclasses import dataclass
from math import ceil, log2, sqrt
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"

GPUS = (8, 64, 256, 1024)
MACHINE = 8  # GPUs of a machine
MEMORY = 80e9  # bytes of an H100
PEAK = 989e12  # FLOP/s of an H100, dense bf16 (data sheet)
UTILIZATION = 0.4  # of the peak, while nothing is waited for
NVLINK = 450e9  # bytes/s and GPU in one direction (data sheet)
NETWORK = 50e9  # bytes/s and GPU: 400 Gb/s InfiniBand each
REACHED = 0.8  # of both, by large collectives
HOP_SECONDS = 3e-6  # a message from one GPU to the next
BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at once
WEIGHT, GRADIENT, STATE = 2, 4, 16  # bytes a parameter: gathered in bf16; reduced in fp32; fp32 weight, gradient, Adam
SAVED = 12  # bytes a parameter in a checkpoint: fp32 weight and Adam's two averages
WRITER = 2e9  # bytes/s of one machine into a shared file system
FILE_SYSTEM = 50e9  # bytes/s of that file system
GPU_HOURS_PER_INTERRUPTION = 16_384 * 54 * 24 / 419  # Llama Team 2024, section 3.3.4
RESTART_SECONDS = 600  # from an interruption to the first step


@dataclass(frozen=True)
class Model:
    """A decoder's shape, the rows a GPU takes at once, and the rows of a usual global batch."""

    name: str
    layers: int
    width: int
    inner: int
    keys: int  # width of the keys, and of the values
    matrices: int  # of the feed-forward part: 2, or 3 with a gate
    vocabulary: int
    tied: bool
    sequence: int
    micro_rows: int
    global_rows: int
    recomputes: bool = False

    @property
    def parameters(self) -> int:
        """Without norms and biases: less than 0.1%."""
        return self.products + (0 if self.tied else self.vocabulary * self.width)

    @property
    def products(self) -> int:
        """Parameters of matrix products: the layers and the head."""
        layer = 2 * self.width * (self.width + self.keys) + self.matrices * self.width * self.inner
        return self.layers * layer + self.vocabulary * self.width

    @property
    def flops_per_token(self) -> int:
        """6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B)."""
        return 6 * self.products + 12 * self.layers * self.width * self.sequence

    def activations(self, rows: int) -> float:
        """Bytes kept for the backward pass (Korthikanti et al. 2022): 34 a layer, width and token, or 2."""
        # What is recomputed is kept for one layer at a time.
        layers = 2 * self.layers + 34 if self.recomputes else 34 * self.layers
        return layers * self.width * rows * self.sequence

    def compute_seconds(self, rows: int) -> float:
        """Forward and backward of rows on one GPU; recomputing adds a forward."""
        again = 4 / 3 if self.recomputes else 1
        return rows * self.sequence * self.flops_per_token * again / (UTILIZATION * PEAK)


MODELS = (
    Model("124 M", 12, 768, 3072, 768, 2, 50304, True, 1024, 16, 512),
    Model("1.2 B", 16, 2048, 8192, 2048, 3, 50304, True, 2048, 8, 512),
    Model("7 B", 32, 4096, 11008, 4096, 3, 32000, False, 4096, 2, 1024),
    Model("70 B", 80, 8192, 28672, 1024, 3, 32000, False, 4096, 2, 1024, recomputes=True),
)
WAYS = [(model, way) for model in MODELS[:2] for way in ("ddp", "fsdp", "hybrid")]
WAYS += [(MODELS[2], "fsdp"), (MODELS[2], "hybrid"), (MODELS[3], "fsdp")]  # the others do not fit


def bandwidth(gpus: int) -> float:
    """Bytes/s of a ring at each GPU: eight network cards carry eight rings, so that each sees them all."""
    return REACHED * (NVLINK if gpus <= MACHINE else min(NVLINK, MACHINE * NETWORK))


def all_reduce_bytes(size: float, gpus: int) -> float:
    """What each GPU sends to sum `size` bytes over all (Patarasuk and Yuan 2009)."""
    return 2 * (gpus - 1) / gpus * size


def gather_bytes(size: float, gpus: int) -> float:
    """What each GPU sends to gather `size` bytes from all, or to sum and scatter them: half of an all-reduce."""
    return (gpus - 1) / gpus * size


def group(way: str, gpus: int) -> int:
    """How many GPUs share one copy of the state."""
    return {"ddp": 1, "fsdp": gpus, "hybrid": min(gpus, MACHINE)}[way]


def state_bytes(model: Model, way: str, gpus: int) -> float:
    """Weights, gradients and Adam's averages on one GPU, and for shards the two layers that are gathered."""
    whole = model.parameters * STATE
    return whole if way == "ddp" else whole / group(way, gpus) + 2 * WEIGHT * model.parameters / model.layers


def fits(model: Model, way: str, gpus: int, rows: int) -> bool:
    return state_bytes(model, way, gpus) + model.activations(rows) < MEMORY


def communication_seconds(model: Model, way: str, gpus: int) -> tuple[float, float, float]:
    """Gathering for a forward pass, the same and scattering for a backward pass, and the sum once a step."""
    size, sharers = model.parameters, group(way, gpus)
    if way == "ddp":
        buckets = ceil(size * GRADIENT / BUCKET)
        latency = buckets * 2 * ceil(log2(gpus)) * HOP_SECONDS
        return 0.0, 0.0, all_reduce_bytes(size * GRADIENT, gpus) / bandwidth(gpus) + latency
    latency = (model.layers + 1) * (sharers - 1) * HOP_SECONDS
    gather = gather_bytes(size * WEIGHT, sharers) / bandwidth(sharers) + latency
    scatter = gather_bytes(size * GRADIENT, sharers) / bandwidth(sharers) + latency
    copies = gpus // sharers
    between = all_reduce_bytes(size * GRADIENT / sharers, copies) / (REACHED * NETWORK) if copies > 1 else 0.0
    return gather, gather + scatter, between


def step_seconds(model: Model, way: str, gpus: int, rows: int) -> tuple[float, float]:
    """A step of `rows` a GPU: its compute, and all of it with what cannot be hidden behind compute."""
    micro = min(rows, model.micro_rows)
    times = rows // micro
    compute = model.compute_seconds(micro)
    forward, backward, once = communication_seconds(model, way, gpus)
    waits = max(0.0, forward - compute / 3) + forward / (model.layers + 1)
    early = times - 1
    waits_backward = early * max(0.0, backward - 2 / 3 * compute) + max(0.0, backward + once - 2 / 3 * compute)
    tail = once * min(1.0, BUCKET / (model.parameters * GRADIENT)) if way == "ddp" else 0.0
    return times * compute, times * (compute + waits) + waits_backward + tail


def checkpoint_seconds(model: Model, writers: int) -> float:
    """One machine writes all of it, or each machine its part, once the tensors were gathered for it."""
    size = model.parameters * SAVED
    gather = size / (REACHED * NETWORK) if writers > 1 else 0.0
    return gather + size / min(writers * WRITER, FILE_SYSTEM)


def best_interval(save: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least: Young 1974, with Daly's terms (2006, equation 20)."""
    ratio = save / (2 * between_failures)
    return sqrt(2 * save * between_failures) * (1 + sqrt(ratio) / 3 + ratio / 9) - save


def lost_share(save: float, between_failures: float) -> float:
    """The share of time for saving, for repeating what was not saved, and for starting again."""
    interval = best_interval(save, between_failures)
    return save / (interval + save) + (interval / 2 + RESTART_SECONDS) / between_failures


def critical_batch(loss: float) -> float:
    """Tokens at which twice as many steps, or twice as much data, are needed (Kaplan et al. 2020, equation 1.4)."""
    return 2e8 * loss ** (-1 / 0.21)


# --- the tables ---


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Two or three digits that mean something."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def percent(model: Model, way: str, gpus: int, rows: int) -> str:
    if not rows:
        return "too few rows"
    if not fits(model, way, gpus, min(rows, model.micro_rows)):
        return "does not fit"
    compute, whole = step_seconds(model, way, gpus, rows)
    return f"{100 * compute / whole:.0f}%"


def bytes_table() -> str:
    rows = []
    for model in MODELS:
        size = model.parameters
        inside = gather_bytes(size * (2 * WEIGHT + GRADIENT), MACHINE)
        cells = [
            all_reduce_bytes(size * GRADIENT, 64),
            gather_bytes(size * (2 * WEIGHT + GRADIENT), 64),
            inside,
            all_reduce_bytes(size * GRADIENT / MACHINE, 64 // MACHINE),
        ]
        rows.append([model.name, f"{size / 1e6:,.0f} M", *(number(cell / 1e9) for cell in cells)])
    a_step, a_micro = "ddp, a step", "fsdp, a micro-batch"
    return table(
        ["model", "N", a_step, a_micro, "hybrid, in a machine, a micro-batch", "between machines, a step"], rows
    )


def memory_table() -> str:
    rows = []
    for model in MODELS:
        shards = [state_bytes(model, "fsdp", gpus) / 1e9 for gpus in GPUS]
        kept = f"{model.micro_rows} x {model.sequence:,}{', recomputed' if model.recomputes else ''}"
        activations = f"{number(model.activations(model.micro_rows) / 1e9)} ({kept})"
        rows.append([model.name, number(state_bytes(model, "ddp", 8) / 1e9), *map(number, shards), activations])
    return table(["model", "ddp", *(f"fsdp, {gpus:,}" for gpus in GPUS), "activations (rows)"], rows)


def overlap_table() -> str:
    rows = []
    for model, way in WAYS:
        compute = model.compute_seconds(model.micro_rows)
        cells = [sum(communication_seconds(model, way, gpus)) for gpus in (8, 64, 1024)]
        token = model.compute_seconds(1) / model.sequence
        gather, scatter, once = communication_seconds(model, way, 1024)
        needed = max(gather / (token / 3), (scatter + once) / (2 / 3 * token))
        tokens = f"{model.micro_rows * model.sequence:,}"
        milliseconds = [number(1e3 * cell) for cell in (compute, *cells)]
        rows.append([model.name, way, tokens, *milliseconds, f"{needed:,.0f}"])
    exchange = [f"exchange, {gpus:,}" for gpus in (8, 64, 1024)]
    return table(["model", "way", "tokens", "compute", *exchange, "tokens that hide it, 1,024"], rows)


def weak_table() -> str:
    rows = []
    for model, way in WAYS:
        cells = [percent(model, way, gpus, model.micro_rows) for gpus in GPUS]
        _, seconds = step_seconds(model, way, 1024, model.micro_rows)
        batch = 1024 * model.micro_rows * model.sequence
        rows.append([model.name, way, *cells, f"{batch / 1e6:.1f} M", f"{batch / seconds / 1e6:.1f} M", "none"])
    columns = ["model", "way", *(f"{gpus:,}" for gpus in GPUS), "tokens a step, 1,024", "tokens/s, 1,024", "measured"]
    return table(columns, rows)


def strong_table() -> str:
    rows = []
    for model, way in WAYS:
        cells = [percent(model, way, gpus, model.global_rows // gpus) for gpus in GPUS]
        batch = f"{model.global_rows} x {model.sequence:,}"
        rows.append([model.name, way, batch, *cells, "none"])
    return table(["model", "way", "rows a step", *(f"{gpus:,}" for gpus in GPUS), "measured"], rows)


def checkpoint_table() -> str:
    rows = []
    for model in MODELS:
        size = model.parameters * SAVED / 1e9
        cells = [checkpoint_seconds(model, writers) for writers in (1, 8, 128)]
        rows.append([model.name, number(size), *(number(cell) for cell in cells), "none"])
    return table(["model", "GB", "one writer", "64 GPUs, 8 writers", "1,024 GPUs, 128 writers", "measured"], rows)


def failure_table() -> str:
    rows = []
    for gpus in GPUS:
        between = 3600 * GPU_HOURS_PER_INTERRUPTION / gpus
        cells = []
        for model in (MODELS[1], MODELS[3]):
            for writers in (1, gpus // MACHINE):
                save = checkpoint_seconds(model, writers)
                minutes, lost = best_interval(save, between) / 60, lost_share(save, between)
                cells.append(f"{minutes:,.0f} min, {100 * lost:.1f}%")
        rows.append([f"{gpus:,}", number(between / 3600), *cells])
    return table(["GPUs", "hours", "1.2 B, one writer", "sharded", "70 B, one writer", "sharded"], rows)


def data_table() -> str:
    rows = []
    for model in MODELS:
        rate = model.sequence / model.compute_seconds(1)
        size = 2 if model.vocabulary <= 65_536 else 4
        reads = rate / model.sequence
        cells = [f"{rate:,.0f}", number(rate * size / 1e3), number(rate * size * 1024 / 1e6), number(reads * 1024)]
        rows.append([model.name, *cells])
    return table(["model", "tokens/s, a GPU", "kB/s, a GPU", "MB/s, 1,024", "rows/s, 1,024"], rows)


def batch_table() -> str:
    batches = (0.5e6, 1e6, 4e6, 16e6)
    rows = []
    for loss in (4.0, 3.0, 2.5, 2.0):
        critical = critical_batch(loss)
        rows.append([f"{loss:.1f}", f"{critical / 1e6:.2f} M", *(f"{1 + batch / critical:.1f}" for batch in batches)])
    return table(["loss", "critical batch", *(f"{batch / 1e6:g} M tokens a step" for batch in batches)], rows)


TABLES = {
    "bytes": bytes_table,
    "memory": memory_table,
    "overlap": overlap_table,
    "weak": weak_table,
    "strong": strong_table,
    "batch": batch_table,
    "checkpoint": checkpoint_table,
    "failures": failure_table,
    "data": data_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    write = parser.parse_args().write
    text = PAGE.read_text(encoding="utf-8") if write else ""
    for name, make in TABLES.items():
        made = f"<!-- {name} -->\n{make()}\n<!-- end -->"
        print(f"{made}\n")
        text = re.sub(rf"<!-- {name} -->\n(.*?\n)??<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)
    if write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
