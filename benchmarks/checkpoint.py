"""What checkpoints cost: the time of a save beside that of a hundred steps, and of a resume beside a fresh start.

    python benchmarks/checkpoint.py

GPT-2 of 10 M parameters (6 x 384, context 256, batch 16) on random tokens, saved every ten steps: what the steps behind
a save take longer than the others, as a share of a hundred steps (goal: below 3%). Then the same command until its
first new step, from a checkpoint and from nothing, in turns (goal: at most 2 s more than the time to load, which is
part of the figure here). Medians.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
from measuring import MEBI, print_machine, seconds_until

SAVE_EVERY = 10
HUNDRED = 100
TOKENS = 1_000_000
RECIPE = {
    "name": "bench",
    "tokenizer": {"train": {"algorithm": "bytes"}},
    "data": {"train": {"tokens": "train.bin", "dtype": "uint16"}, "validation": 0, "sequence_length": 256},
    "model": {"type": "gpt2", "config": {"n_layer": 6, "n_embd": 384, "n_head": 6}},
    "train": {
        "max_tokens": "1B",
        "global_batch_size": 16,
        "lr_scheduler": "constant",
        "warmup": 5,
        "log_every": 1,
        "eval_every": 0,
        "save_every": SAVE_EVERY,
        "save_total_limit": 2,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print_machine(("gptcli", "torch", "transformers", "safetensors"))
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        folder = Path(name)
        np.random.default_rng(0).integers(0, 256, TOKENS, dtype=np.uint16).tofile(folder / "train.bin")
        (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
        until_step(folder, arguments.steps, "--overwrite")
        seconds = {line["step"]: line["seconds"] for line in lines(folder)}
        gaps = {step: seconds[step + 1] - seconds[step] for step in list(seconds)[3:-1]}
        saved = statistics.median(gap for step, gap in gaps.items() if step % SAVE_EVERY == 0)
        plain = statistics.median(gap for step, gap in gaps.items() if step % SAVE_EVERY)
        newest = max(folder.glob("runs/bench/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        size = sum(path.stat().st_size for path in newest.iterdir())
        print(f"a step: {plain:.3f} s; a save of {size / MEBI:.0f} MiB: {saved - plain:.3f} s")
        print(
            f"{(saved - plain) / (HUNDRED * plain):.2%} of the time of training, saved every {HUNDRED} steps; goal: 3%"
        )
        step = int(newest.name.split("-")[1])
        kept = folder / "kept"
        shutil.copytree(folder / "runs", kept)
        resumed, fresh = [], []
        for _ in range(arguments.rounds):
            shutil.rmtree(folder / "runs")
            shutil.copytree(kept, folder / "runs")
            resumed.append(until_step(folder, step + 1))
            fresh.append(until_step(folder, 1, "--overwrite"))
    more = statistics.median(resumed) - statistics.median(fresh)
    print(
        f"first step: resumed {statistics.median(resumed):.2f} s, fresh {statistics.median(fresh):.2f} s: {more:+.2f} s"
    )


def lines(folder: Path) -> list[dict[str, float]]:
    path = folder / "runs" / "bench" / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def until_step(folder: Path, step: int, *arguments: str) -> float:
    """Seconds from the start of the command until the line of a step is written; the run is killed there."""
    command = [str(Path(sys.executable).parent / "gptcli"), "pretrain", "recipe.yaml", "--quiet", *arguments]
    if "--overwrite" in arguments:
        shutil.rmtree(folder / "runs", ignore_errors=True)
    # A resume cuts the lines back first, so that the step's line is a new one.
    cut_back = not lines(folder)

    def ready() -> bool:
        nonlocal cut_back
        found = lines(folder)
        written = bool(found) and found[-1]["step"] >= step
        cut_back = cut_back or not written
        return written and cut_back

    return seconds_until(ready, command, folder)


if __name__ == "__main__":
    main()
