"""Do OpenMP's threads spin or sleep while they wait? Training alone and beside a second training, both ways.

    python benchmarks/waiting.py

gptcli sets OMP_WAIT_POLICY=PASSIVE unless the environment has it; this runs 40 steps of the quickstart with both
values, in turn.
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
OVERRIDES = ["train.max_steps=40", "train.sample_every=0", "train.eval_every=0", "data.validation=0"]


def main() -> None:
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rates(folder, "ACTIVE", 1)  # fills the cache of prepared data
        for _ in range(ROUNDS):
            for count in (1, 2):
                for policy in ("ACTIVE", "PASSIVE"):
                    figures.setdefault(f"{policy}, {count} at once", []).extend(rates(folder, policy, count))
    for name, values in figures.items():
        print(f"{statistics.median(values):8,.0f} tokens/s each  ({min(values):,.0f} to {max(values):,.0f})  {name}")


def rates(folder: str, policy: str, count: int) -> list[float]:
    """Tokens a second of each of `count` trainings that run at once."""
    gptcli = str(Path(sys.executable).parent / "gptcli")
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
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
