"""How long until the command line answers: `gptcli --help` and a recipe error, beside Python and `import torch`.

    make bench            or: python benchmarks/startup.py

Whole processes, one after the other in turn, median of 9 after one warm-up round. Goal: 0.30 s.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROUNDS = 9


def main() -> None:
    gptcli = str(Path(sys.executable).parent / "gptcli")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unknown.yaml").write_text("train: {max_stepz: 10}\n")
        (Path(folder) / "wrong.yaml").write_text("train: {max_steps: many}\n")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "gptcli --help": [gptcli, "--help"],
            "gptcli pretrain --help": [gptcli, "pretrain", "--help"],
            "gptcli pretrain unknown.yaml (an unknown key)": [gptcli, "pretrain", "unknown.yaml"],
            "gptcli pretrain wrong.yaml (a wrong type)": [gptcli, "pretrain", "wrong.yaml"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(ROUNDS + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{statistics.median(values):6.3f} s  ({min(values):.3f} to {max(values):.3f})  {name}")


if __name__ == "__main__":
    main()
