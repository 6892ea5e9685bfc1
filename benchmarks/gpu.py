"""Training speed, MFU and peak memory on this machine's GPU: 124M beside nanoGPT, a llama of 1B, fp8.

    python benchmarks/gpu.py --nanogpt PATH             PATH: a checkout of karpathy/nanoGPT; without it, it is left out
    python benchmarks/gpu.py --cases 1b --steps 50      or: --cases 124m,1b
    python benchmarks/gpu.py --toy                      the same code in toy sizes on a CPU; its figures mean nothing

124m: GPT-2, context 1,024, micro-batches of 12 rows, 5 a step, bf16, compiled on both sides. 1b: a llama of 16 x 2,048
with 32 heads and 8 for keys, context 2,048, 4 rows, 4 a step, in bf16 and, where the card has it, in fp8. Tokens are
random; one process after the other. Tokens/s: the median of the log lines (nanoGPT: steps) behind the first ones. MFU:
6 N + 12 L H Q T FLOPs a token over the card's dense bf16 peak, fp8 too. Memory: the CUDA allocator's peak, both sides.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import json
import re
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import train
from measuring import MEBI, print_machine
from train import Measured, Shape, watch, write_inputs

from gptcli.device import best_device, device_name, peak_flops
from gptcli.train.assemble import look_at
from gptcli.train.modes import lacks

LIBRARIES = ("gptcli", "torch", "transformers", "accelerate", "triton", "torchao", "liger-kernel", "flash-attn")
SKIPPED = 5  # steps at the start that are not counted
# Runs nanoGPT's train.py as it is, and prints what it does not: the allocator's peak.
WRAPPER = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak bytes", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


@dataclass(frozen=True)
class Case:
    """A model, its step (`shape.batch` rows at once, `accumulation` times) and what is run of it."""

    model: dict[str, Any]
    shape: Shape
    accumulation: int
    ways: tuple[str, ...]


LLAMA = {"num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True}
CASES = {
    "124m": Case({"type": "gpt2"}, Shape(12, 768, 12, 1024, 12, 50_304, 0, 5), 5, ("bf16", "auto", "plain", "nanogpt")),
    "1b": Case({"type": "llama", "config": LLAMA}, Shape(16, 2048, 32, 2048, 4, 32_768, 0, 5), 4, ("bf16", "fp8")),
}
TOY_LLAMA = {"num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": True}
TOYS = {
    "124m": replace(CASES["124m"], shape=Shape(2, 64, 4, 64, 2, 512, 0, 5), accumulation=2),
    "1b": replace(
        CASES["1b"],
        model={"type": "llama", "config": TOY_LLAMA},
        shape=Shape(2, 64, 4, 64, 2, 512, 0, 5),
        accumulation=2,
    ),
}
WAYS = {
    "bf16": "gptcli, bf16",
    "auto": "gptcli, bf16, micro-batch auto",
    "plain": "gptcli, bf16, compile off",
    "fp8": "gptcli, fp8",
    "nanogpt": "nanoGPT, bf16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU")
    arguments = parser.parse_args()
    device = best_device()
    if device.type != "cuda" and not arguments.toy:
        raise SystemExit("there is no GPU here; --toy tries this script on the CPU")
    print_machine(LIBRARIES)
    print(f"device: {device_name(device)}" + ("; a toy: these figures mean nothing" if arguments.toy else ""))
    arguments.precision, hardware = "bf16", look_at(device)
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        for key in arguments.cases:
            case = (TOYS if arguments.toy else CASES)[key]
            case = replace(case, shape=replace(case.shape, steps=arguments.steps))
            work = Path(name) / key
            write(work, case, arguments)
            results: dict[str, tuple[float, int]] = {}
            flops = 0
            for way in case.ways:
                if way == "nanogpt" and arguments.nanogpt is None:
                    print("skipped: nanoGPT: give a checkout of karpathy/nanoGPT with --nanogpt PATH")
                elif way == "fp8" and (missing := lacks("fp8", hardware)) is not None:
                    print(f"skipped: {': '.join(filter(None, missing))}")
                elif way == "nanogpt":
                    results[way] = run_nanogpt(work, case, toy=arguments.toy)
                else:
                    rate, memory, flops = run_gptcli(way, work, case, toy=arguments.toy)
                    results[way] = rate, memory
            print_results(key, case, results, flops, peak_flops(device, "bf16"))


def write(work: Path, case: Case, arguments: argparse.Namespace) -> None:
    """The inputs as `train.py` writes them, with this case's model and accumulation, and the data tokenized."""
    write_inputs(work, case.shape, arguments)
    path = work / "recipe.yaml"
    recipe = json.loads(path.read_text())
    if case.model["type"] == "llama":
        shape = case.shape
        sizes = {"num_hidden_layers": shape.layers, "hidden_size": shape.width, "num_attention_heads": shape.heads}
        recipe["model"] = {"type": "llama", "config": {**sizes, **case.model["config"]}}
    recipe["train"]["global_batch_size"] = case.shape.batch * case.accumulation
    path.write_text(json.dumps(recipe))
    watch([gptcli(), "tokenize", "recipe.yaml", "--json"], work, Measured())


def gptcli() -> str:
    return str(Path(sys.executable).parent / "gptcli")


def run_gptcli(way: str, work: Path, case: Case, *, toy: bool) -> tuple[float, int, int]:
    """Tokens a second, peak bytes and FLOPs a token of a run."""
    compiled = str(way != "plain" and not toy).lower()
    settings = [f"train.precision={'fp8' if way == 'fp8' else 'bf16'}", f"train.compile={compiled}"]
    if way == "auto":
        settings.append("train.micro_batch_size=auto")
    printed = watch([gptcli(), "pretrain", "recipe.yaml", "--overwrite", "--json", *settings], work, Measured())
    run = work / "runs" / "bench"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if line["step"] > SKIPPED]
    plan = json.loads((run / "run.json").read_text())["plan"]
    return statistics.median(rates), json.loads(printed)["peak_bytes"], plan["flops_per_token"]


def run_nanogpt(work: Path, case: Case, *, toy: bool) -> tuple[float, int]:
    """Tokens a second and peak bytes of nanoGPT's train.py."""
    shape, measured = case.shape, Measured()
    times, printed = train.run_nanogpt(
        ["-c", WRAPPER, "train.py"],
        work,
        shape,
        measured,
        device="cpu" if toy else "cuda",
        compile=not toy,
        gradient_accumulation_steps=case.accumulation,
        bias=True,  # as GPT-2 has it
    )
    found = re.search(r"^peak bytes (\d+)$", printed, re.MULTILINE)
    assert found is not None
    return shape.tokens * case.accumulation / statistics.median(times[SKIPPED:]), int(
        found[1]
    ) or measured.anonymous_bytes


def print_results(key: str, case: Case, results: dict[str, tuple[float, int]], flops: int, peak: float | None) -> None:
    """The table of a case; the last column sets each way's speed against nanoGPT's."""
    shape = case.shape
    print(
        f"\n### {key}: {shape.layers} x {shape.width}, context {shape.length:,}, {shape.batch} rows x"
        f" {case.accumulation}, vocabulary {shape.vocabulary:,}\n\n| way | tokens/s | MFU | peak MiB | over nanoGPT |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for way, (rate, memory) in results.items():
        mfu = "-" if peak is None else f"{100 * rate * flops / peak:.1f}%"
        over = f"{rate / results['nanogpt'][0]:.2f}" if "nanogpt" in results else "-"
        print(f"| {WAYS[way]} | {rate:,.0f} | {mfu} | {memory / MEBI:,.0f} | {over} |", flush=True)


if __name__ == "__main__":
    main()
