"""Training speed and memory of `gptcli pretrain` beside nanoGPT, run_clm's Trainer and a bare loop of our own model.

    python benchmarks/train.py --nanogpt PATH           PATH: a checkout of karpathy/nanoGPT; without it, it is left out
    python benchmarks/train.py --shapes a --rounds 3    or: --ways gptcli,bare

Shapes (layers x width, context, batch, vocabulary): a = 4 x 128, 64, 12, 65; b = 6 x 384, 256, 16, 65; c = 6 x 512,
512, 8, 16,384. All are GPT-2 on random tokens, dropout 0 but for run_clm, which takes the configuration's 0.1 (one more
way leaves it out). One process after the other, each once a round; a figure is the median of the steps after the first
few of all rounds. Memory: the peak of the process tree, sampled every half second, anonymous proportional size and RSS
beside it.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from measuring import MEBI, Sampler, print_machine

PEERS = Path(__file__).with_name("peers_train.py")
LIBRARIES = ("gptcli", "torch", "transformers", "accelerate", "numpy")
INTERVAL_SECONDS = 0.5
SKIPPED = 3  # steps at the start that are not counted
TOKENS = 2_000_000
WAYS = {
    "gptcli": "gptcli pretrain",
    "bare": "bare loop of the same model, loss and optimizer",
    "nanogpt": "nanoGPT (compile off)",
    "nanogpt-compiled": "nanoGPT (compile on)",
    "trainer": "run_clm's Trainer",
    "trainer-plain": "run_clm's Trainer without dropout",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a step; `steps` of a run, `window` of them timed together."""

    layers: int
    width: int
    heads: int
    length: int
    batch: int
    vocabulary: int
    steps: int
    window: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


SHAPES = {
    "a": Shape(4, 128, 4, 64, 12, 65, 300, 20),
    "b": Shape(6, 384, 6, 256, 16, 65, 23, 5),
    "c": Shape(6, 512, 8, 512, 8, 16_384, 14, 5),
}


@dataclass
class Measured:
    """Seconds of each step that counts, and the highest memory of any round."""

    seconds: list[float] = field(default_factory=list)
    anonymous_bytes: int = 0
    rss_bytes: int = 0

    @property
    def step(self) -> float:
        """The median step, seconds."""
        return statistics.median(self.seconds)


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    print_machine(LIBRARIES)
    print(f"rounds: {arguments.rounds}; precision of gptcli and the bare loop: {arguments.precision}")
    ways = list(arguments.ways)
    if arguments.nanogpt is None:
        left_out = [way for way in ways if way.startswith("nanogpt")]
        ways = [way for way in ways if way not in left_out]
        if left_out:
            print(f"skipped: {', '.join(left_out)}: give a checkout of karpathy/nanoGPT with --nanogpt PATH")
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        for key in arguments.shapes:
            shape, work = SHAPES[key], Path(name) / key
            write_inputs(work, shape, arguments)
            results = {way: Measured() for way in ways}
            for _ in range(arguments.rounds):
                for way in ways:
                    run_way(way, work, shape, arguments.nanogpt, results[way])
            print_results(key, shape, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    if unknown := [*(set(arguments.shapes) - set(SHAPES)), *(set(arguments.ways) - set(WAYS))]:
        parser.error(f"unknown: {', '.join(unknown)}")
    return arguments


def write_inputs(work: Path, shape: Shape, arguments: argparse.Namespace) -> None:
    """The tokens, a tokenizer of as many entries, the recipe, and nanoGPT's data folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    work.mkdir()
    rng = np.random.default_rng(0)
    rng.integers(0, shape.vocabulary, TOKENS, dtype=np.uint16).tofile(work / "train.bin")
    entries = {f"<{index}>": index for index in range(shape.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(entries, unk_token="<0>")), eos_token="<0>", unk_token="<0>"
    )
    tokenizer.save_pretrained(str(work / "tokenizer"))
    recipe = {
        "name": "bench",
        "seed": 1,
        "tokenizer": {"from": str(work / "tokenizer")},
        "data": {
            "train": {"tokens": str(work / "train.bin"), "dtype": "uint16"},
            "validation": 0,
            "sequence_length": shape.length,
        },
        "model": {
            "type": "gpt2",
            "config": {"n_layer": shape.layers, "n_embd": shape.width, "n_head": shape.heads},
        },
        "train": {
            "max_steps": shape.steps,
            "global_batch_size": shape.batch,
            "micro_batch_size": shape.batch,
            "precision": arguments.precision,
            "learning_rate": 1e-3,
            "log_every": shape.window,
            "eval_every": 0,
            "save_every": 0,
        },
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    if arguments.nanogpt is not None:
        shutil.copytree(arguments.nanogpt, work / "nanogpt", ignore=shutil.ignore_patterns(".git", "data", "assets"))
        data = work / "nanogpt" / "data" / "bench"
        data.mkdir(parents=True)
        for name in ("train.bin", "val.bin"):
            os.link(work / "train.bin", data / name)
        import pickle

        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": shape.vocabulary}))


def run_way(way: str, work: Path, shape: Shape, nanogpt: Path | None, measured: Measured) -> None:
    """Run a way once and add what was measured."""
    if way == "gptcli":
        command = [str(Path(sys.executable).parent / "gptcli"), "pretrain", "recipe.yaml", "--overwrite", "--json"]
        # The first time also tokenizes, in the same process; what is timed are the steps.
        watch([*command[:1], "tokenize", "recipe.yaml", "--json"], work, Measured())
        watch(command, work, measured)
        measured.seconds += from_metrics(work / "runs" / "bench" / "metrics.jsonl")
    elif way.startswith("nanogpt"):
        times, _ = run_nanogpt(["train.py"], work, shape, measured, compile=way.endswith("compiled"))
        measured.seconds += windows(times[SKIPPED:], shape.window)
    else:
        command = [sys.executable, str(PEERS), way, "recipe.yaml"]
        times = json.loads(watch(command, work, measured).splitlines()[-1])
        measured.seconds += windows(times[SKIPPED:], shape.window)


def run_nanogpt(
    program: list[str], work: Path, shape: Shape, measured: Measured, **changes: str | int | bool
) -> tuple[list[float], str]:
    """Seconds of each step of nanoGPT's train.py, run by `program`, and what it printed; `changes`: further flags."""
    flags: dict[str, str | int | float | bool] = {
        "dataset": "bench",
        "device": "cpu",
        "eval_interval": 10**9,
        "eval_iters": 1,
        "log_interval": 1,
        "always_save_checkpoint": False,
        "gradient_accumulation_steps": 1,
        "batch_size": shape.batch,
        "block_size": shape.length,
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "dropout": 0.0,
        "max_iters": shape.steps,
        "warmup_iters": 1,
        **changes,
    }
    command = [sys.executable, *program, *(f"--{name}={value}" for name, value in flags.items())]
    printed = watch(command, work / "nanogpt", measured)
    times = re.findall(r"^iter \d+: .*time ([\d.]+)ms", printed, re.MULTILINE)
    return [float(found) / 1000 for found in times], printed


def windows(times: list[float], size: int) -> list[float]:
    """The mean step of every `size` steps."""
    return [sum(times[i : i + size]) / size for i in range(0, len(times) - size + 1, size)]


def from_metrics(path: Path) -> list[float]:
    """Seconds a step between neighbouring log lines, behind the steps that are not counted."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = itertools.pairwise(lines)
    return [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in pairs
        if before["step"] >= SKIPPED
    ]


def watch(command: list[str], folder: Path, measured: Measured) -> str:
    """Run a command with its caches in `folder`: what it printed; its memory goes into `measured`."""
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with Sampler(process.pid, INTERVAL_SECONDS) as sampler:
        out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{(out + errors)[-3000:]}")
    measured.anonymous_bytes = max(measured.anonymous_bytes, sampler.anonymous_bytes)
    measured.rss_bytes = max(measured.rss_bytes, sampler.rss_bytes)
    return out


def print_results(key: str, shape: Shape, results: dict[str, Measured]) -> None:
    """The table of a shape; the ratios set gptcli's speed and memory against each way's."""
    print(
        f"\n### ({key}) {shape.layers} x {shape.width}, context {shape.length}, batch {shape.batch}, vocabulary"
        f" {shape.vocabulary:,}\n\n| way | ms a step (min to max) | tokens/s | gptcli's speed over it"
        " | peak MiB anonymous | RSS | gptcli's memory over it |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    ours = results.get("gptcli")
    for way, measured in results.items():
        least, step, most = (1e3 * each for each in (min(measured.seconds), measured.step, max(measured.seconds)))
        speed = f"{measured.step / ours.step:.2f}" if ours else "-"
        memory = f"{ours.anonymous_bytes / measured.anonymous_bytes:.2f}" if ours else "-"
        print(
            f"| {WAYS[way]} | {step:,.1f} ({least:,.1f} to {most:,.1f}) | {shape.tokens / measured.step:,.0f} | {speed}"
            f" | {measured.anonymous_bytes / MEBI:,.0f} | {measured.rss_bytes / MEBI:,.0f} | {memory} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
