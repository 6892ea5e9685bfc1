"""Texts -> token arrays, as the tokenizer's own `tokenizer.json` gives them: a pure function of a list of texts.

Byte tokens need no tokenizer call at all; others come from the fast encoder where that is proven equal. Where the
pre-tokenizer is one whose word boundaries are known, a long text is cut at newlines that no word can cross, so that it
is encoded in bounded memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gptcli.data.fast import FastTokenizer, compare, fast_tokenizer, is_sure
from gptcli.data.media.item import Medium
from gptcli.data.tokenizer import PATTERNS, Specials, bytes_tokenizer, load_fast, special_ids

BATCH_CHARACTERS = 500_000  # twice as many took 7% more memory, and no less time
CUT_CHARACTERS = 100_000
PARALLELISM = "TOKENIZERS_PARALLELISM"  # read by `tokenizers` at each call
# In each of PATTERNS a word ends with a newline before a space and a letter, and with one between a letter and a
# character before it that is no white space, with or without the text that follows. Python's \s holds all that the
# patterns' \s does.
_LETTER = "[A-Za-zÀ-ÖØ-öø-ÿа-яА-Яぁ-んァ-ヶ一-龥가-힣]"
SAFE_CUT = re.compile(rf"\n(?= {_LETTER})|(?<=\S)\n(?={_LETTER})")


@dataclass(frozen=True)
class Encoded:
    """Documents as one array: their tokens (BOS and EOS included), and the tokens and UTF-8 bytes of each.

    `supervised` (uint8, one a token): 1 for the tokens that are to be predicted; None: all are. `media`: those of each
    document, in order; None: this data has none.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    bytes: NDArray[np.int64]
    supervised: NDArray[np.uint8] | None = None
    media: Sequence[Sequence[Medium]] | None = None


T = TypeVar("T", bound=Any)
EncodePieces: TypeAlias = Callable[[Sequence[str]], list[NDArray[Any]]]
Check: TypeAlias = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer made ready: call it with texts to get an `Encoded`.

    Attributes:
        vocab_size: one more than the largest id.
        dtype: uint16 below 65,536 entries, else uint32.
        specials: the special tokens.
        pieces: the ids of texts, without special tokens at their ends; may raise `Unequal`.
        cuts: a text as parts whose ids, one after the other, are the text's.
        check: raises `Unequal` when `pieces` does not give the ids of `tokenizers` for a text.
        slow_because: why `tokenizers` is used; None with the fast encoder, and where no tokenizer call is needed.
    """

    vocab_size: int
    dtype: np.dtype[Any]
    specials: Specials
    pieces: EncodePieces
    cuts: Callable[[str], list[str]]
    check: Check
    slow_because: str | None = None

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The tokens of `texts`, each with its EOS, and BOS where the tokenizer adds one."""
        cut = [self.cuts(text) for text in texts]
        encoded = self.pieces([piece for pieces in cut for piece in pieces])
        counts = np.fromiter(map(len, cut), dtype=np.int64, count=len(cut))
        return self.joined(encoded, counts, np.fromiter(map(utf8_size, texts), dtype=np.int64, count=len(texts)))

    def joined(self, encoded: list[NDArray[Any]], counts: NDArray[np.int64], utf8_bytes: NDArray[np.int64]) -> Encoded:
        """Documents from their parts' ids: `counts` parts each, with `utf8_bytes` bytes of text."""
        ends: list[NDArray[Any]] = [np.array([self.specials.eos], dtype=self.dtype)]
        if self.specials.adds_bos:
            ends.append(np.array([self.specials.bos], dtype=self.dtype))
        sizes = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        last = np.cumsum(counts)
        total = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        lengths = total[last] - total[last - counts] + len(ends)
        # EOS stands behind a document's last piece, BOS before its first.
        parts = [part for pieces in _grouped(encoded, counts) for part in (*ends[1:], *pieces, ends[0])]
        tokens = np.concatenate(parts, dtype=self.dtype, casting="unsafe") if parts else np.empty(0, dtype=self.dtype)
        return Encoded(tokens, lengths, utf8_bytes)


def make_encoder(folder: Path, *, fast: bool = True) -> Encoder:
    """The encoder of a tokenizer folder: the fast one where it is proven equal, unless `fast` is false."""
    tokenizer = load_fast(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size < 65_536 else np.uint32)
    specials = special_ids(folder, tokenizer)
    if _is_bytes(content):
        return Encoder(vocab_size, dtype, specials, _bytes_pieces(content, dtype), _whole, _unchecked)
    found = fast_tokenizer(folder, tokenizer) if fast else "it is not wanted"
    cuts = safe_cuts if can_cut(content) else _whole
    if isinstance(found, str):
        return Encoder(vocab_size, dtype, specials, _slow_pieces(tokenizer, dtype), cuts, _unchecked, found)
    return Encoder(
        vocab_size,
        dtype,
        specials,
        _fast_pieces(found, tokenizer),
        cuts,
        lambda texts: compare(found, tokenizer, texts),
    )


def utf8_size(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def document_tokens(texts: Iterable[str], encoder: Encoder) -> Iterator[tuple[NDArray[np.int64], int]]:
    """(ids without BOS and EOS, UTF-8 bytes) of each text, encoded in batches: what evaluation of a file reads."""
    first = 1 if encoder.specials.adds_bos else 0
    for batch in batches(texts):
        encoded = encoder(batch)
        ends = np.cumsum(encoded.lengths)
        for end, length, size in zip(ends, encoded.lengths, encoded.bytes, strict=True):
            yield encoded.tokens[end - length + first : end - 1].astype(np.int64), int(size)


def batches(items: Iterable[T], limit: int = BATCH_CHARACTERS, size: Callable[[T], int] = len) -> Iterator[list[T]]:
    """Group items (texts by their characters, unless `size` says otherwise) up to a limit; a larger one is alone."""
    batch: list[T] = []
    filled = 0
    for item in items:
        length = size(item)
        if batch and filled + length > limit:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += length
    if batch:
        yield batch


def safe_cuts(text: str, characters: int = CUT_CHARACTERS) -> list[str]:
    """Cut a long text behind newlines at which every one of PATTERNS ends a word; the pieces join to the text."""
    if len(text) <= characters:
        return [text]
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
def tokenizer_threads(*, every_core: bool) -> Iterator[None]:
    """Let `tokenizers` use every core inside (unless the user has set it otherwise), or one thread."""
    before = os.environ.get(PARALLELISM)
    if every_core and before is not None:
        yield
        return
    os.environ[PARALLELISM] = "true" if every_core else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


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


def _slow_pieces(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> EncodePieces:
    def pieces(texts: Sequence[str]) -> list[NDArray[Any]]:
        arrays: list[NDArray[Any]] = []
        for batch in batches(texts):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            arrays += [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
        return arrays

    return pieces


def _fast_pieces(fast: FastTokenizer, slow: Tokenizer) -> EncodePieces:
    def pieces(texts: Sequence[str]) -> list[NDArray[Any]]:
        fast.trim()
        if is_sure("".join(texts)):  # one look instead of one for each of many short texts
            return [fast(text) for text in texts]
        return [
            fast(text) if is_sure(text) else np.array(slow.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
            for text in texts
        ]

    return pieces


def _grouped(arrays: list[NDArray[Any]], counts: NDArray[np.int64]) -> Iterator[list[NDArray[Any]]]:
    done = 0
    for count in counts.tolist():
        yield arrays[done : done + count]
        done += count


def _unchecked(texts: Sequence[str]) -> None:
    del texts


def _whole(text: str) -> list[str]:
    return [text]
