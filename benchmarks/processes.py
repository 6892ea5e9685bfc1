"""Weak scaling: tokens a second of one process with one thread, and of two with one thread each and twice the rows.

    python benchmarks/processes.py

The model of 10 M parameters (GPT-2, 6 x 384, context 256) in fp32 on random tokens, with as many rows a process in each
case, in turns: medians of the steps' times (goal: two processes at least 1.7 times one). DDP, and FSDP beside it,
which gathers every layer twice a step over the loopback device.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from measuring import print_machine

TOKENS = 1_000_000
LENGTH = 256
WARM_UP = 3
CASES = {"one process": (1, "ddp"), "two, ddp": (2, "ddp"), "two, fsdp": (2, "fsdp")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="of each process, a step")
    parser.add_argument("--width", type=int, default=384)
    arguments = parser.parse_args()
    print_machine(("gptcli", "torch", "transformers", "accelerate"))
    found: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        folder = Path(name)
        np.random.default_rng(0).integers(0, 256, TOKENS, dtype=np.uint16).tofile(folder / "train.bin")
        for turn in range(arguments.rounds):
            for case, (processes, strategy) in CASES.items():
                seconds = step_seconds(folder, arguments, processes, strategy)
                found[case].append(processes * arguments.rows * LENGTH / seconds)
                print(f"round {turn + 1}  {case}: {found[case][-1]:,.0f} tokens a second", flush=True)
    rates = {case: statistics.median(values) for case, values in found.items()}
    for case, rate in rates.items():
        print(f"{case}: {rate:,.0f} tokens a second, {rate / rates['one process']:.2f} times one process")


def step_seconds(folder: Path, arguments: argparse.Namespace, processes: int, strategy: str) -> float:
    """The median time of a step, from one log line to the next."""
    train = {
        "max_steps": arguments.steps,
        "global_batch_size": arguments.rows * processes,
        "micro_batch_size": min(arguments.rows, 16),
        "precision": "fp32",
        "log_every": 1,
        "eval_every": 0,
        "save_every": 0,
    }
    recipe = {
        "name": "bench",
        "tokenizer": {"train": {"algorithm": "bytes"}},
        "data": {"train": {"tokens": "train.bin", "dtype": "uint16"}, "validation": 0, "sequence_length": LENGTH},
        "model": {"type": "gpt2", "config": {"n_layer": 6, "n_embd": arguments.width, "n_head": 6}},
        "train": train,
        "launch": {"processes": processes, "strategy": strategy},
        "tracking": {"to": []},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "gptcli", "pretrain", "recipe.yaml", "--overwrite", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in (folder / "runs" / "bench" / "metrics.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines][WARM_UP:]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


if __name__ == "__main__":
    main()
