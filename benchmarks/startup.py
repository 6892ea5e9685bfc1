"""How long until the command line answers, and until the first optimizer step is done.

    make bench            or: python benchmarks/startup.py

`gptcli --help` and a recipe error, beside Python and `import torch`: whole processes, one after the other in turn,
median of 9 after one warm-up round; goal 0.30 s. Then `gptcli pretrain quickstart`, tokenized before, until the line of
step 1 is in metrics.jsonl (the run is ended there), beside a bare `from transformers import Trainer,
AutoModelForCausalLM`: median of 5 in turn; goal: at most 2 s more.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from measuring import seconds_until

ROUNDS = 9
STEP_ROUNDS = 5
TRAINER = "from transformers import Trainer, AutoModelForCausalLM"


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
        first: dict[str, list[float]] = {f"python -c '{TRAINER}'": [], "gptcli pretrain quickstart, first step": []}
        for turn in range(STEP_ROUNDS + 1):
            for name, measure in zip(first, (until_imported, until_first_step), strict=True):
                took = measure(Path(folder))
                if turn:
                    first[name].append(took)
        seconds |= first
    for name, values in seconds.items():
        print(f"{statistics.median(values):6.3f} s  ({min(values):.3f} to {max(values):.3f})  {name}")
    imported, stepped = (statistics.median(values) for values in first.values())
    print(f"{stepped - imported:6.3f} s  the first step after the bare import; goal: at most 2")


def until_imported(folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", TRAINER], cwd=folder, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def until_first_step(folder: Path) -> float:
    """Seconds from the start of the command until the line of the first step is written."""
    metrics = folder / "runs" / "quickstart" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [str(Path(sys.executable).parent / "gptcli"), "pretrain", "quickstart", "--overwrite", "--quiet"]
    return seconds_until(lambda: metrics.is_file() and metrics.stat().st_size > 0, command, folder)


if __name__ == "__main__":
    main()
