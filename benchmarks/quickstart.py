"""The first five minutes: the commands of `make demo` in a fresh folder with an empty cache: time and result.

    make bench            or: python benchmarks/quickstart.py

Goal on two cores: well within 300 s in all, held-out bits per byte at most 1.75.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

COMMANDS = (
    ["pretrain", "quickstart", "--json"],
    ["eval", "--json"],
    ["generate", "--prompt", "The str.join() method", "--prompt", "Return a new list", "--seed", "1", "--json"],
)


def main() -> None:
    gptcli = str(Path(sys.executable).parent / "gptcli")
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GPTCLI_CACHE": f"{folder}/cache"}
        for command in COMMANDS:
            start = time.perf_counter()
            done = subprocess.run(
                [gptcli, *command], cwd=folder, env=environment, capture_output=True, text=True, check=True
            )
            seconds = time.perf_counter() - start
            total += seconds
            print(f"{seconds:6.1f} s  gptcli {' '.join(command)}")
            for line in done.stdout.splitlines():
                print(f"          {json.dumps(shown(json.loads(line)), ensure_ascii=False)}")
    print(f"{total:6.1f} s  in all")


def shown(result: dict[str, object]) -> dict[str, object]:
    """The figures of a result that do not name a temporary folder."""
    return {key: value for key, value in result.items() if key not in {"run", "model"}}


if __name__ == "__main__":
    main()
