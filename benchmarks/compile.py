"""Does torch.compile pay on this machine? The steps of `gptcli pretrain` with it and without, taken in turns.

    python benchmarks/compile.py                     6 x 384, context 256, 16 rows, vocabulary 65 (10.7 M parameters)
    python benchmarks/compile.py --precisions fp32   or: bf16,fp32

Attention is torch's own on both sides but for one more row, `auto`, which is what a run without compiling takes. The
seconds until compiled code is ready are those that gptcli prints.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import re
import tempfile
from pathlib import Path

from measuring import print_machine
from train import LIBRARIES, SHAPES, Measured, from_metrics, watch, write_inputs

WAYS = {
    "off, attention auto": ["train.compile=false"],
    "off": ["train.compile=false", "train.attention=sdpa"],
    "on": ["train.compile=true", "train.attention=sdpa"],
}
READY = re.compile(r"^compile: (?:ready after (\d+) s|(.*))$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["bf16", "fp32"])
    parser.add_argument("--shape", choices=list(SHAPES), default="b")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.nanogpt, shape = None, SHAPES[arguments.shape]
    print_machine(LIBRARIES)
    gptcli = str(Path(sys.executable).parent / "gptcli")
    print("\n| precision | compile | ms a step (min to max) | tokens/s | seconds until ready |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        work = Path(name) / "work"
        arguments.precision = "fp32"
        write_inputs(work, shape, arguments)
        watch([gptcli, "tokenize", "recipe.yaml", "--json"], work, Measured())
        for precision in arguments.precisions:
            results = {way: Measured() for way in WAYS}
            ready = "-"
            for _ in range(arguments.rounds):
                for way, settings in WAYS.items():
                    command = [gptcli, "pretrain", "recipe.yaml", "--overwrite", f"train.precision={precision}"]
                    printed = watch([*command, *settings], work, results[way])
                    results[way].seconds += from_metrics(work / "runs" / "bench" / "metrics.jsonl")
                    if found := READY.search(printed):
                        ready = found[1] or found[2]
            for way, measured in results.items():
                least, step, most = (
                    1e3 * each for each in (min(measured.seconds), measured.step, max(measured.seconds))
                )
                rate, seconds = shape.tokens / measured.step, ready if way == "on" else "-"
                figures = f"{step:,.0f} ({least:,.0f} to {most:,.0f}) | {rate:,.0f} | {seconds}"
                print(f"| {precision} | {way} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
