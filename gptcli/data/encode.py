"""Texts -> token arrays, as the tokenizer's own `tokenizer.json` gives them: a pure function of a list of texts.

Byte tokens need no tokenizer call at all. Where the pre-tokenizer is one whose word boundaries are known, a long text
is cut at newlines that no word can cross, so that it is encoded on all cores and in bounded memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gptcli.data.tokenizer import PATTERNS, Specials, bytes_tokenizer, load_fast, special_ids

BATCH_CHARACTERS = 2_000_000
CUT_CHARACTERS = 100_000
# In each of PATTERNS a word ends with a newline before a space and a letter, and with one between a letter and a
# character before it that is no white space, with or without the text that follows. Python's \s holds all that the
# patterns' \s does.
_LETTER = "[A-Za-zÀ-ÖØ-öø-ÿа-яА-Яぁ-んァ-ヶ一-龥가-힣]"
SAFE_CUT = re.compile(rf"\n(?= {_LETTER})|(?<=\S)\n(?={_LETTER})")


@dataclass(frozen=True)
class Encoded:
    """Documents as one array: their tokens (BOS and EOS included), and the tokens and UTF-8 bytes of each."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    bytes: NDArray[np.int64]


EncodePieces: TypeAlias = Callable[[Sequence[str]], list[NDArray[Any]]]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer made ready: call it with texts to get an `Encoded`."""

    vocab_size: int
    dtype: np.dtype[Any]
    specials: Specials
    pieces: EncodePieces
    cuts: Callable[[str], list[str]]

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The tokens of `texts`, each with its EOS, and BOS where the tokenizer adds one."""
        prefix = [self.specials.bos] if self.specials.adds_bos else []
        begin = np.array(prefix, dtype=self.dtype)
        end = np.array([self.specials.eos], dtype=self.dtype)
        cut = [self.cuts(text) for text in texts]
        encoded = iter(self.pieces([piece for pieces in cut for piece in pieces]))
        arrays: list[NDArray[Any]] = []
        lengths = np.empty(len(texts), dtype=np.int64)
        for index, pieces in enumerate(cut):
            document = [begin, *(next(encoded) for _ in pieces), end]
            lengths[index] = sum(map(len, document))
            arrays += document
        sizes = np.fromiter((len(text.encode("utf-8")) for text in texts), dtype=np.int64, count=len(texts))
        tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=self.dtype)
        return Encoded(tokens, lengths, sizes)


def make_encoder(folder: Path) -> Encoder:
    """The encoder of a tokenizer folder. Token ids are uint16 below 65,536 entries, else uint32."""
    tokenizer = load_fast(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size < 65_536 else np.uint32)
    specials = special_ids(folder)
    if _is_bytes(content):
        return Encoder(vocab_size, dtype, specials, _bytes_pieces(content, dtype), _whole)
    return Encoder(
        vocab_size, dtype, specials, _bpe_pieces(tokenizer, dtype), safe_cuts if can_cut(content) else _whole
    )


def document_tokens(texts: Iterable[str], encoder: Encoder) -> Iterator[tuple[NDArray[np.int64], int]]:
    """(ids without BOS and EOS, UTF-8 bytes) of each text, encoded in batches: what evaluation of a file reads."""
    first = 1 if encoder.specials.adds_bos else 0
    for batch in batches(texts):
        encoded = encoder(batch)
        ends = np.cumsum(encoded.lengths)
        for end, length, size in zip(ends, encoded.lengths, encoded.bytes, strict=True):
            yield encoded.tokens[end - length + first : end - 1].astype(np.int64), int(size)


def batches(texts: Iterable[str], characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Group texts until they hold `characters` in all; a longer one is alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > characters:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def safe_cuts(text: str, characters: int = CUT_CHARACTERS) -> list[str]:
    """Cut a long text behind newlines at which every one of PATTERNS ends a word; the pieces join to the text."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > characters and (match := SAFE_CUT.search(text, start + characters)):
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]] if pieces else [text]


def can_cut(content: dict[str, Any]) -> bool:
    """Whether `safe_cuts` holds for a tokenizer.json: no normalizer, a known pattern, no token that takes space."""
    if (
        content.get("normalizer") is not None
        or content["model"].get("type") != "BPE"
        or content["model"].get("dropout")
    ):
        return False
    greedy = any(token["lstrip"] or token["rstrip"] or "\n" in token["content"] for token in content["added_tokens"])
    return not greedy and _known_words(content.get("pre_tokenizer"))


@contextlib.contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Let `tokenizers` use every core inside, also in a process that was forked; the user's own setting goes before."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]


def _known_words(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if any(step["type"] == "ByteLevel" and step["add_prefix_space"] for step in steps):
        return False
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return bool(steps[0].get("use_regex", True))
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = steps
    pattern = split["pattern"].get("Regex")
    plain = split["behavior"] == "Isolated" and not split["invert"] and not byte_level.get("use_regex", True)
    return bool(plain and pattern in PATTERNS.values())


def _is_bytes(content: dict[str, Any]) -> bool:
    ours = json.loads(bytes_tokenizer().to_str())
    return all(content.get(key) == ours[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens"))


def _bytes_pieces(content: dict[str, Any], dtype: np.dtype[Any]) -> EncodePieces:
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    pattern = re.compile("(" + "|".join(map(re.escape, added)) + ")")

    def ids(text: str) -> NDArray[Any]:
        # A special token that is written in the text becomes its id, as tokenizers and transformers have it.
        parts = pattern.split(text)
        arrays = [
            np.array([added[part]], dtype=dtype)
            if index % 2
            else np.frombuffer(part.encode("utf-8"), dtype=np.uint8).astype(dtype)
            for index, part in enumerate(parts)
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    return lambda texts: [ids(text) for text in texts]


def _bpe_pieces(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> EncodePieces:
    def pieces(texts: Sequence[str]) -> list[NDArray[Any]]:
        arrays: list[NDArray[Any]] = []
        for batch in batches(texts):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            arrays += [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
        return arrays

    return pieces


def _whole(text: str) -> list[str]:
    return [text]
