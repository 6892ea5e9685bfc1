"""How fast texts are made: one sequence, a file of prompts, and the first character.

    make bench            or: python benchmarks/generate.py [--rounds N] [--nanogpt PATH]

All in fp32 with random weights, so that speed alone is measured; each way in its own process, in turn, medians of the
rounds, peak anonymous memory of the process. One sequence: 300 tokens from a llama of 10.7 M parameters (6 layers x
384); goal: at least 0.95 of a bare loop of forward passes. A file: 256 prompts of 12 to 120 tokens with answers of 20
to 200; goal: at least 2 times `generate` on batches of 32 in file order, padded. nanoGPT, given by its path: 500 tokens
from a GPT-2 of the same size; goal: 5 times. The first character of `gptcli generate`, whole command: at most 1.5 s
after `from transformers import AutoModelForCausalLM, AutoTokenizer`.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import MEBI, Sampler, print_machine

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nanogpt", type=Path, default=None)
    options = parser.parse_args()
    print_machine(("torch", "transformers"))
    with tempfile.TemporaryDirectory() as place:
        llama, gpt2 = Path(place) / "llama", Path(place) / "gpt2"
        make(llama, "llama")
        make(gpt2, "gpt2")
        one = compare({"ours": llama, "bare": llama, "transformers": llama}, 300, options.rounds)
        print(f"one sequence: {one['ours'] / one['bare']:.2f} of a bare loop (goal 0.95)")
        file = compare({"ours-file": llama, "padded": llama}, 256, options.rounds)
        print(f"a file of 256 prompts: {file['ours-file'] / file['padded']:.2f} times padded batches (goal 2)")
        if options.nanogpt is None:
            print("nanoGPT: left out, no --nanogpt PATH")
        else:
            more = compare({"ours": gpt2, "nanogpt": gpt2}, 500, options.rounds, str(options.nanogpt))
            print(f"500 tokens of a GPT-2: {more['ours'] / more['nanogpt']:.2f} times nanoGPT (goal 5)")
        first_character(llama, max(5, options.rounds))


def make(folder: Path, kind: str) -> None:
    """A model of 10.7 M parameters with random weights and a tokenizer of characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocab = {piece: index for index, piece in enumerate(["<|endoftext|>", "<|pad|>", "<|unk|>", *CHARACTERS])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    sizes: dict[str, Any] = {"vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if kind == "llama":
        sizes |= {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
        sizes |= {"max_position_embeddings": 1024}
    else:
        sizes |= {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 1024}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(ways: dict[str, Path], tokens: int, rounds: int, *more: str) -> dict[str, float]:
    """Tokens a second of each way, the median; printed with the peak memory."""
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    for _ in range(rounds):
        for way, folder in ways.items():
            script = Path(__file__).with_name("peers_generate.py")
            command = [sys.executable, str(script), way, str(folder), str(tokens), *more]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, Sampler(process.pid) as seen:
                output = process.communicate()[0]
            if process.returncode:
                raise SystemExit(f"{way} ended with {process.returncode}")
            told = json.loads(output.splitlines()[-1])
            speeds[way].append(told["tokens"] / told["seconds"])
            peaks[way] = max(peaks.get(way, 0), seen.anonymous_bytes)
    for way, values in speeds.items():
        median, low, high = statistics.median(values), min(values), max(values)
        print(f"  {way:13} {median:8.1f} tokens/s ({low:.1f} to {high:.1f}), peak {peaks[way] / MEBI:,.0f} MiB")
    return {way: statistics.median(values) for way, values in speeds.items()}


def first_character(folder: Path, rounds: int) -> None:
    """Seconds until the command's first character behind the prompt, and of the bare import, in turn."""
    gptcli = str(Path(sys.executable).parent / "gptcli")
    command = [gptcli, "generate", str(folder), "--prompt", "", "--quiet", "--seed", "1"]
    imported, first = [], []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORT], check=True)
        middle = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.read(1)
            end = time.perf_counter()
            process.kill()
        if turn:
            imported.append(middle - start)
            first.append(end - middle)
    one, other = statistics.median(imported), statistics.median(first)
    print(f"  {IMPORT}: {one:.2f} s; the first character: {other:.2f} s")
    print(f"the first character: {other - one:.2f} s after the bare import (goal 1.5)")


if __name__ == "__main__":
    main()
