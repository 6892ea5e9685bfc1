"""One way to generate, for `generate.py`: its own process, so that its memory is its own.

    python benchmarks/peers_generate.py WAY FOLDER TOKENS [NANOGPT]

WAY is one of ours, bare (a plain loop of forward passes with transformers' cache), transformers (`generate`), nanogpt;
ours-file, padded (`generate` on batches in file order). Prints JSON: seconds, tokens.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import json
import random
import time
from pathlib import Path
from typing import Any

import torch

ROWS, PROMPTS = 32, 256
SHORT, LONG = (12, 20), (120, 200)  # tokens of a prompt and of its answer: tenfold, all sizes between equally likely


def main() -> None:
    way, folder, tokens, *more = sys.argv[1:]
    if way == "nanogpt":
        made = nanogpt(Path(more[0]), Path(folder), int(tokens))
    else:
        made = {
            "ours": ours,
            "bare": bare,
            "transformers": transformers_one,
            "ours-file": ours_file,
            "padded": padded,
        }[way](Path(folder), int(tokens))
    print(json.dumps({"seconds": made[0], "tokens": made[1]}))


def loaded(folder: Path) -> tuple[Any, Any]:
    from gptcli.model.load import load_model, load_tokenizer

    return load_model(folder, dtype="fp32"), load_tokenizer(folder)


def prompt_of(size: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 60) for _ in range(size)]


def ours(folder: Path, tokens: int) -> tuple[float, int]:
    """`complete`, streamed and drawn as by default; the closing token is held back."""
    from gptcli.generation.settings import Settings
    from gptcli.generation.text import complete

    model, tokenizer = loaded(folder)
    pieces: list[str] = []

    def run(count: int) -> int:
        settings = Settings(max_new_tokens=count, min_new_tokens=count, seed=1)
        return complete(model, tokenizer, prompt_of(16), settings, on_text=pieces.append)[0].tokens

    return timed(run, tokens)


def bare(folder: Path, tokens: int) -> tuple[float, int]:
    """The least that there is to do: forward passes and the largest logit."""
    from transformers import DynamicCache

    model, _ = loaded(folder)

    @torch.no_grad()
    def run(count: int) -> int:
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([prompt_of(16)])
        for _ in range(count):
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            ids.item()
        return count

    return timed(run, tokens)


def transformers_one(folder: Path, tokens: int) -> tuple[float, int]:
    """transformers' `generate` with the same settings."""
    model, _ = loaded(folder)

    def run(count: int) -> int:
        ids = torch.tensor([prompt_of(16)])
        made = model.generate(
            inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **drawn()
        )
        return int(made.shape[1] - 16)

    return timed(run, tokens)


def drawn() -> dict[str, Any]:
    return {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "eos_token_id": 0, "pad_token_id": 1}


def nanogpt(repository: Path, folder: Path, tokens: int) -> tuple[float, int]:
    """What nanoGPT's sample.py calls, on its model of the same size."""
    sys.path.insert(0, str(repository))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    config = json.loads((folder / "config.json").read_text())
    model = GPT(
        GPTConfig(
            block_size=config["n_positions"],
            vocab_size=config["vocab_size"],
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            dropout=0.0,
            bias=True,
        )
    ).eval()

    def run(count: int) -> int:
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt_of(16)]), count, temperature=0.8, top_k=50)
        return int(made.shape[1] - 16)

    return timed(run, tokens)


def timed(run: Any, tokens: int) -> tuple[float, int]:
    run(8)
    start = time.perf_counter()
    made = run(tokens)
    return time.perf_counter() - start, made


def work() -> list[tuple[list[int], int]]:
    """Prompts and the lengths of their answers, as they stand in the file."""
    draw = random.Random(1)

    def size(low: int, high: int) -> int:
        return round(low * (high / low) ** draw.random())

    return [(prompt_of(size(SHORT[0], LONG[0]), seed), size(SHORT[1], LONG[1])) for seed in range(PROMPTS)]


def ours_file(folder: Path, tokens: int) -> tuple[float, int]:
    """What a file job does with one batch of its plan: sorted, the longest first, 32 rows at once."""
    from gptcli.generation.choose import Chooser
    from gptcli.generation.decode import Budget, decode, pads_well
    from gptcli.generation.noise import sequence_key
    from gptcli.generation.row import Row
    from gptcli.generation.settings import Settings

    model, tokenizer = loaded(folder)
    choose = Chooser(Settings(min_new_tokens=1000), [0], tokenizer)

    @torch.no_grad()
    def run(count: int) -> int:
        chosen = sorted(work()[:count], key=lambda one: -len(one[0]))
        rows = [Row(ids, most, sequence_key(1, ids, 0), tokenizer.decode, frozenset([0])) for ids, most in chosen]
        assert pads_well(model, vocabulary=len(tokenizer))
        decode(model, rows, choose, Budget(rows=ROWS))
        return sum(row.finish().tokens for row in rows)

    return timed(run, tokens)


def padded(folder: Path, tokens: int) -> tuple[float, int]:
    """`generate` on 32 prompts after 32, padded on the left; a row ends with its answer, a batch with its longest."""
    from transformers import StoppingCriteriaList

    model, tokenizer = loaded(folder)

    def run(count: int) -> int:
        chosen, made = work()[:count], 0
        for first in range(0, len(chosen), ROWS):
            batch = chosen[first : first + ROWS]
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([[1] * (longest - len(ids)) + ids for ids, _ in batch])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch])
            ends = torch.tensor([most for _, most in batch])

            def ended(input_ids: torch.Tensor, scores: Any, start: int = longest, ends: Any = ends, **_: Any) -> Any:
                return input_ids.shape[1] - start >= ends

            out = model.generate(
                inputs=ids,
                attention_mask=mask,
                max_new_tokens=int(ends.max()),
                min_new_tokens=int(ends.max()),
                stopping_criteria=StoppingCriteriaList([ended]),
                **drawn(),
            )
            texts = tokenizer.batch_decode(out[:, longest:])
            made += sum(most for (_, most), text in zip(batch, texts, strict=True) if text)
        return made

    return timed(run, tokens)


if __name__ == "__main__":
    main()
