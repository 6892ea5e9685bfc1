"""The peers of `tokenize.py`, one way to turn text files into token files a process; it starts this file itself.

    python -P benchmarks/peers_tokenize.py WAY CORPUS TOKENIZER PATTERN OUTPUT --processes 2

Each way is written after the public script it names, with what would only slow it down left out (the held-out share,
progress bars). The last line printed is JSON: `seconds` from behind the imports to the finished file, `tokens` made,
and where the way drops some, `kept`. `-P`: this folder's tokenize.py would hide the standard library's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK_SIZE = 1024
SHARDS = 1024  # the batches in which nanoGPT's prepare.py writes its file
BATCH = 1000  # documents a call of encode_batch_fast: what datasets' map takes by default
CHECKED = 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("pattern")
    parser.add_argument("output", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(json.dumps(WAYS[arguments.way](arguments)))


def run_clm(arguments: argparse.Namespace, sample_by: str) -> dict[str, Any]:
    """transformers' examples/pytorch/language-modeling/run_clm.py: map to tokens, map to blocks, in arrow files.

    A last batch of less than a block gives none, as in its versions before the one that raises an error there.
    """
    import pyarrow.compute
    from datasets import load_dataset
    from transformers import AutoTokenizer

    start = time.perf_counter()
    files = {"train": str(arguments.corpus if arguments.corpus.is_file() else arguments.corpus / "*.txt")}
    rows = load_dataset("text", data_files=files, sample_by=sample_by, keep_linebreaks=True, split="train")
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.tokenizer))

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"])

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(itertools.chain(*lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        blocks = {
            name: [values[first : first + BLOCK_SIZE] for first in range(0, end, BLOCK_SIZE)]
            for name, values in joined.items()
        }
        return {**blocks, "labels": blocks["input_ids"].copy()}

    tokenized = rows.map(tokenize, batched=True, num_proc=arguments.processes, remove_columns=rows.column_names)
    blocks = tokenized.map(group, batched=True, num_proc=arguments.processes)
    seconds = time.perf_counter() - start
    lengths = pyarrow.compute.list_value_length(tokenized.data.column("input_ids"))
    tokens = pyarrow.compute.sum(lengths).as_py()
    return {"seconds": seconds, "tokens": tokens, "kept": len(blocks) * BLOCK_SIZE}


def nanogpt(arguments: argparse.Namespace) -> dict[str, Any]:
    """nanoGPT's data/openwebtext/prepare.py: a document at a time through tiktoken, then one uint16 file."""
    import numpy as np
    import tiktoken.registry
    from datasets import load_dataset

    from gptcli.data import tokenizer as _imported_before_the_clock  # noqa: F401

    start = time.perf_counter()
    encoding = tiktoken_encoding(arguments.tokenizer, arguments.pattern)
    # As with tiktoken's own encodings, a worker is then sent the name and not the ranks.
    tiktoken.registry.ENCODINGS[encoding.name] = encoding
    end = next(iter(encoding._special_tokens.values()))
    rows = load_dataset(
        "text",
        data_files={"train": str(arguments.corpus / "*.txt")},
        sample_by="document",
        split="train",
        num_proc=arguments.processes,
    )

    def process(row: dict[str, str]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(row["text"])
        ids.append(end)
        return {"ids": ids, "len": len(ids)}

    tokenized = rows.map(process, remove_columns=["text"], num_proc=arguments.processes)
    count = int(np.sum(tokenized["len"][:], dtype=np.uint64))
    array = np.memmap(arguments.output / "train.bin", dtype=np.uint16, mode="w+", shape=(count,))
    done = 0
    shards = min(SHARDS, len(tokenized))
    for index in range(shards):
        shard = tokenized.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"][:])
        array[done : done + len(ids)] = ids
        done += len(ids)
    array.flush()
    return {"seconds": time.perf_counter() - start, "tokens": done}


def encode_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """`Tokenizer.encode_batch_fast` over documents, on all cores by its own threads, to one uint16 file."""
    import numpy as np
    from tokenizers import Tokenizer

    start = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    end = tokenizer.token_to_id(end_of_text(arguments.tokenizer))
    tokens = 0
    with (arguments.output / "train.bin").open("wb") as file:
        paths = documents(arguments.corpus)
        for first in range(0, len(paths), BATCH):
            texts = [read(path) for path in paths[first : first + BATCH]]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array([*encoding.ids, end], dtype=np.uint16)
                tokens += len(ids)
                file.write(ids)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare tiktoken's ids with the tokenizer's on some documents. Raises `SystemExit` if they differ."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    encoding = tiktoken_encoding(arguments.tokenizer, arguments.pattern)
    paths = documents(arguments.corpus)
    chosen = paths[:: max(1, len(paths) // CHECKED)]
    for path in chosen:
        text = read(path)
        if encoding.encode_ordinary(text) != tokenizer.encode(text, add_special_tokens=False).ids:
            raise SystemExit(f"tiktoken and {arguments.tokenizer} give different ids for {path}")
    return {"documents": len(chosen)}


def tiktoken_encoding(folder: Path, pattern: str) -> Any:
    """The tokenizer of a folder as a tiktoken `Encoding`; its only special token is the one that ends a text.

    GPT-2's pattern is taken as tiktoken itself writes it: the same words, found faster.
    """
    import tiktoken

    from gptcli.data.tokenizer import PATTERNS, byte_characters

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    byte = {character: value for value, character in enumerate(byte_characters())}
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    ranks = {
        bytes(byte[character] for character in entry): index
        for entry, index in content["model"]["vocab"].items()
        if entry not in added
    }
    words = PATTERNS[pattern]
    if pattern == "gpt2":
        from tiktoken_ext.openai_public import r50k_pat_str as words
    end = end_of_text(folder)
    return tiktoken.Encoding(
        f"benchmark-{pattern}", pat_str=words, mergeable_ranks=ranks, special_tokens={end: added[end]}
    )


def end_of_text(folder: Path) -> str:
    """The text of the token that a tokenizer's folder names for the end of a text."""
    return str(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"])


def documents(corpus: Path) -> list[Path]:
    """The files of a corpus, a document each."""
    return sorted(corpus.glob("*.txt"))


def read(path: Path) -> str:
    """The text of a file, its line ends as they are."""
    return path.read_bytes().decode("utf-8")


WAYS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "lines": lambda arguments: run_clm(arguments, "line"),
    "documents": lambda arguments: run_clm(arguments, "document"),
    "nanogpt": nanogpt,
    "tokenizers": encode_batch,
    "check": check,
}

if __name__ == "__main__":
    main()
