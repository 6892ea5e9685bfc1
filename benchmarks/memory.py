"""The plan's estimate of memory beside the peak of the training process: is it within 15%?

    python benchmarks/memory.py

Each case is `gptcli pretrain` in a process of its own, for a few steps, without validation, samples or saves on the
way. Measured: the highest anonymous memory of that process and its children (Pss_Anon), read from outside every 20 ms
until the last step, so with all that Python and the libraries hold (the estimate's line "libraries"), which is what
`peak_bytes` and a `ulimit` see too. Estimated: `memory_bytes` of the plan that the run wrote to run.json, which is
what `gptcli plan` prints.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measuring import MEBI, Sampler, print_machine

GOAL = 0.15
STEPS = 4
TOKENS = 2_000_000
LLAMA = {"type": "llama", "config": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6}}
GPT2 = {"type": "gpt2", "config": {"n_layer": 8, "n_embd": 512, "n_head": 8}}
QWEN3 = {"type": "qwen3", "config": {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8}}
# name: (model, vocabulary, length of a row, rows of a step, settings of train)
CASES: dict[str, tuple[dict[str, Any], int, int, int, dict[str, Any]]] = {
    "llama 10 M": (LLAMA, 258, 256, 16, {}),
    "llama 10 M, 4 at once": (LLAMA, 258, 256, 16, {"micro_batch_size": 4}),
    "llama 10 M, 1 at once": (LLAMA, 258, 256, 16, {"micro_batch_size": 1}),
    "llama 10 M, checkpointing": (LLAMA, 258, 256, 16, {"activation_checkpointing": True}),
    "gpt2 33 M": (GPT2, 16384, 512, 8, {}),
    "gpt2 33 M, checkpointing": (GPT2, 16384, 512, 8, {"activation_checkpointing": True}),
    "qwen3 29 M": (QWEN3, 16384, 128, 32, {}),
    "qwen3 29 M, checkpointing": (QWEN3, 16384, 128, 32, {"activation_checkpointing": True}),
    "qwen3 29 M, muon": (QWEN3, 16384, 128, 32, {"optimizer": "muon"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["auto"])
    parser.add_argument("--case", action="append", help="only these; default: all")
    parser.add_argument("--detail", action="store_true", help="the estimate's lines too")
    arguments = parser.parse_args()
    print_machine(("gptcli", "torch", "transformers", "accelerate"))
    print("| model | precision | rows x length | estimate MiB | measured MiB | estimate / measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    missed = 0
    for name in arguments.case or CASES:
        for precision in arguments.precision:
            plan, peak = run(name, precision)
            ratio = plan["memory_bytes"] / peak
            missed += abs(ratio - 1) > GOAL
            precision = plan["precision"]
            shape = f"{plan['micro_batch_size']} x {plan['sequence_length']}"
            figures = f"{plan['memory_bytes'] / MEBI:,.0f} | {peak / MEBI:,.0f} | {ratio:.2f}"
            print(f"| {name} | {precision} | {shape} | {figures} |", flush=True)
            if arguments.detail:
                print("   ", {use: round(size / MEBI) for use, size in plan["memory"].items()}, flush=True)
    sys.exit(bool(missed))


def run(name: str, precision: str) -> tuple[dict[str, Any], int]:
    """The plan of a case as the run wrote it, and the peak of its process in bytes."""
    model, vocabulary, length, rows, settings = CASES[name]
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as temporary:
        folder = Path(temporary)
        np.random.default_rng(0).integers(0, 256, TOKENS, dtype=np.uint16).tofile(folder / "train.bin")
        recipe = {
            "name": "bench",
            "tokenizer": {"train": {"algorithm": "bytes"}},
            "data": {"train": {"tokens": "train.bin", "dtype": "uint16"}, "validation": 0, "sequence_length": length},
            "model": {**model, "config": {**model["config"], "vocab_size": vocabulary}},
            "train": {
                "max_steps": STEPS,
                "global_batch_size": rows,
                "precision": precision,
                "eval_every": 0,
                "save_every": 0,
                **settings,
            },
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        command = [sys.executable, "-m", "gptcli", "pretrain", "recipe.yaml", "--quiet"]
        environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache")}
        with (folder / "errors.txt").open("w") as errors:
            process = subprocess.Popen(command, cwd=folder, env=environment, stderr=errors)
            with Sampler(process.pid, 0.02) as sampler:
                while process.poll() is None and not final(folder):
                    process_wait(process)
        if process.wait() != 0:
            raise SystemExit((folder / "errors.txt").read_text())
        return json.loads((folder / "runs" / "bench" / "run.json").read_text())["plan"], sampler.anonymous_bytes


def final(folder: Path) -> bool:
    """Whether training is over and the model is being written."""
    return (folder / "runs" / "bench" / "final").exists()


def process_wait(process: subprocess.Popen[bytes]) -> None:
    """A twentieth of a second, or the end of the process."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return


if __name__ == "__main__":
    main()
