"""How long until nanoGPT's final loss? tinyshakespeare by characters, first 90% to train, last 10% to validate.

    python benchmarks/time_to_loss.py --nanogpt PATH [--text input.txt]

nanoGPT runs the CPU command of its README (2,000 iterations). `gptcli pretrain shakespeare-bytes` runs twice: to reach
nanoGPT's final loss, in few steps, and with the steps that fit into nanoGPT's wall time. Seconds are those of the whole
process, imports and start-up included, until the line with the loss is printed. nanoGPT's loss is its own estimate on
20 random batches; ours is over every held-out character in windows of the same 64, which sees no more context.
Goal: a quarter of nanoGPT's time.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import os
import pickle
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import print_machine

LIBRARIES = ("gptcli", "torch", "transformers", "numpy")
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare" / "input.txt"
NANOGPT = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]
NANOGPT_LINE = re.compile(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)")
OUR_LINE = re.compile(r"step ([\d,]+)  validation loss ([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=225, help="of the short run [225]")
    parser.add_argument("--long-steps", type=int, default=1300, help="of the long run, 0 for none [1300]")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        raise SystemExit(f"there is no {arguments.text}: give the text with --text")
    print_machine(LIBRARIES)
    print("\n| run | steps | seconds | nats a character |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        if arguments.nanogpt is None:
            print("skipped: nanoGPT: give a checkout with --nanogpt PATH")
        else:
            shutil.copytree(arguments.nanogpt, f"{name}/nano", ignore=shutil.ignore_patterns(".git", "assets"))
            write_characters(arguments.text, Path(name) / "nano" / "data" / "shakespeare_char")
            show("nanoGPT", [sys.executable, "train.py", *NANOGPT], Path(name) / "nano", NANOGPT_LINE)
        gptcli = str(Path(sys.executable).parent / "gptcli")
        for kind, steps in (("short", arguments.steps), ("long", arguments.long_steps)):
            settings = [f"data.train.path={arguments.text.resolve()}", f"train.max_steps={steps}", f"name={kind}"]
            command = [gptcli, "pretrain", "shakespeare-bytes", *settings, "train.sample_every=0", "train.save_every=0"]
            if steps:
                show(f"gptcli, {kind}", command, Path(name), OUR_LINE)


def write_characters(text: Path, folder: Path) -> None:
    """What nanoGPT's prepare.py makes of the text, without the download."""
    content = text.read_text(encoding="utf-8")
    characters = sorted(set(content))
    ids = {character: index for index, character in enumerate(characters)}
    numbers = np.array([ids[character] for character in content], dtype=np.uint16)
    cut = int(len(content) * 0.9)
    folder.mkdir(parents=True, exist_ok=True)
    numbers[:cut].tofile(folder / "train.bin")
    numbers[cut:].tofile(folder / "val.bin")
    about = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(about))


def show(name: str, command: list[str], folder: Path, pattern: re.Pattern[str]) -> None:
    """Run a command and print each loss with the seconds since its start."""
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / f"cache-{name}"), "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    last: list[str] = []
    for line in process.stdout:
        last = [*last[-20:], line]
        if found := pattern.search(line):
            seconds = time.perf_counter() - started
            print(f"| {name} | {found[1]} | {seconds:.1f} | {found[2]} |", flush=True)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(last)}")
    print(f"| {name}, at its end | | {time.perf_counter() - started:.1f} | |", flush=True)


if __name__ == "__main__":
    main()
