"""How fast the loss of a text is measured, and whether memory depends on the size of the text.

    make bench            or: python benchmarks/evaluate.py [--rounds N] [--text FILE] [--threads N]

A llama of 4 layers x 256 with random weights and a vocabulary of 8,192, in fp32; documents of very unequal length (the
paragraphs of --text, else the topics of pydoc), windows of 512 tokens. Each way in its own process, in turn, medians of
the rounds, peak anonymous memory of the process; all begin with texts and a loaded model, and end with summed nats,
which are compared. Goals: at least 2 times lm_eval's rolling perplexity (`pip install 'gptcli[eval]'`; left out where
it is not installed) and at least 0.9 of a bare loop of batched forward passes. Memory: `evaluate` on a file of 1 MB by
lines and on one ten times as large, with a smaller model; goal: at most 5% more.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from measuring import MEBI, Sampler, make_llama, print_machine

FILE_BYTES = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--bytes", type=int, default=200_000, help="how much of the text")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print_machine(("torch", "transformers", "lm_eval"))
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place) / "model", Path(place) / "small"
        documents = texts(options.text, options.bytes)
        make_llama(folder, documents, vocabulary=8192, hidden_size=256, num_hidden_layers=4)
        (folder / "texts.json").write_text(json.dumps(documents))
        speed(folder, options.rounds)
        make_llama(small, documents, vocabulary=512, hidden_size=32, num_hidden_layers=1)
        memory(small, documents)


def texts(path: Path | None, size: int) -> list[str]:
    """Documents of `size` bytes together: the paragraphs of a file, or pydoc's topics."""
    if path is None:
        from pydoc_data.topics import topics

        found = list(topics.values())
    else:
        found = path.read_text(encoding="utf-8").split("\n \n")
    chosen, filled = [], 0
    for text in (text for text in found if text.strip()):
        if filled >= size:
            break
        chosen.append(text)
        filled += len(text.encode())
    return chosen


def speed(folder: Path, rounds: int) -> None:
    """Tokens a second of each way, and the ratios that are the goals."""
    ways = ["ours", "bare"]
    if importlib.util.find_spec("lm_eval") is None:
        print("lm_eval: left out, it is not installed")
    else:
        ways += ["lm_eval-1", "lm_eval-4", "lm_eval-16"]
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            told[way].append(run(way, folder))
    medians = {}
    for way, found in told.items():
        speeds = [each["tokens"] / each["seconds"] for each in found]
        medians[way] = statistics.median(speeds)
        peak = max(each["peak"] for each in found) / MEBI
        print(
            f"  {way:11} {medians[way]:8,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f}), "
            f"peak {peak:,.0f} MiB, loss {found[0]['nats'] / found[0]['tokens']:.5f}"
        )
    print(f"{medians['ours'] / medians['bare']:.2f} of a bare loop of {told['bare'][0]['tokens']:,} tokens (goal 0.9)")
    if peers := [speed for way, speed in medians.items() if way.startswith("lm_eval")]:
        print(f"{medians['ours'] / max(peers):.2f} times lm_eval with the best of its batch sizes (goal 2)")


def memory(folder: Path, documents: list[str]) -> None:
    """The peak memory of `evaluate` on a file and on one ten times as large."""
    lines = [line for text in documents for line in text.splitlines() if line.strip()]
    peaks = []
    for times in (1, 10):
        file = folder / f"{times}.txt"
        filled = 0
        with file.open("w", encoding="utf-8") as out:
            while filled < times * FILE_BYTES:
                for number, line in enumerate(lines):
                    filled += out.write(f"{filled} {number} {line}\n")
        found = run("evaluate", folder, str(file))
        peaks.append(found["peak"])
        print(f"  {file.stat().st_size / 1e6:.0f} MB: peak {found['peak'] / MEBI:,.1f} MiB, {found['seconds']:.0f} s")
    print(f"memory: {peaks[1] / peaks[0] - 1:+.1%} on a file ten times as large (goal: at most 5%)")


def run(way: str, folder: Path, *more: str) -> dict[str, Any]:
    """What one way tells, with the peak of its anonymous memory in bytes."""
    command = [sys.executable, str(Path(__file__).with_name("peers_evaluate.py")), way, str(folder), *more]
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with process, Sampler(process.pid) as seen:
        output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{way} ended with {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak": seen.anonymous_bytes}


if __name__ == "__main__":
    main()
