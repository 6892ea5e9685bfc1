"""Do OpenMP's threads spin or sleep while they wait? Training alone and beside a second training, in three ways.

    python benchmarks/waiting.py

gptcli sets OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT=2000 unless the environment has them; this runs 12 steps of the
quickstart with spinning threads, with sleeping ones, and so, in turn.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

ROUNDS = 3
WAYS = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "gptcli's": {},
}
OVERRIDES = ["train.max_steps=12", "train.sample_every=0", "train.eval_every=0", "data.validation=0"]


def main() -> None:
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rates(folder, {}, 1)  # fills the cache of prepared data
        for _ in range(ROUNDS):
            for count in (1, 2):
                for name, variables in WAYS.items():
                    figures.setdefault(f"{name}, {count} at once", []).extend(rates(folder, variables, count))
    for name, values in figures.items():
        print(f"{statistics.median(values):8,.0f} tokens/s each  ({min(values):,.0f} to {max(values):,.0f})  {name}")


def rates(folder: str, variables: dict[str, str], count: int) -> list[float]:
    """Tokens a second of each of `count` trainings that run at once."""
    gptcli = str(Path(sys.executable).parent / "gptcli")
    environment = {**os.environ, **variables}
    running = [
        subprocess.Popen(
            [gptcli, "pretrain", "quickstart", *OVERRIDES, f"name=run{index}", "--json", "--overwrite"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(count)
    ]
    return [json.loads(process.communicate()[0])["tokens_per_second"] for process in running]


if __name__ == "__main__":
    main()
