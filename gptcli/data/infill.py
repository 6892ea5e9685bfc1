"""Fill in the middle: some documents are cut into prefix, middle and suffix, and their middle is written last.

So a model learns to write what stands between two texts. Where a document is cut, and in which order its parts stand,
depends on its text and the seed alone. Source: Bavarian et al. 2022 (arXiv:2207.14255): parts of random length in
characters, whole documents before they are cut into rows, PSM and (its second variant of) SPM mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcli.data.encode import Encoded, Encoder, utf8_size
from gptcli.data.tokenizer import load_fast
from gptcli.errors import RecipeError

# The tokens before prefix, suffix and middle, as models spell them. Sources: huggingface.co/Qwen/Qwen2.5-Coder-7B,
# bigcode/starcoder2-7b, bigcode/santacoder, codellama/CodeLlama-7b-hf, deepseek-ai/deepseek-coder-6.7b-base.
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
TOKENS = SPELLINGS[0]


@dataclass(frozen=True)
class Infill:
    """Which documents are cut: a share `rate` of them, of these a share `spm_rate` with the suffix first."""

    rate: float
    spm_rate: float
    seed: int

    def parts(self, text: str) -> list[str | int] | None:
        """The parts of a text with 0, 1, 2 for the token before prefix, suffix and middle; None: it stays whole."""
        drawn = hashlib.blake2b(text.encode("utf-8"), digest_size=32, salt=self.seed.to_bytes(8, "big")).digest()
        whole, order, *cuts = (int.from_bytes(drawn[at : at + 8], "big") for at in range(0, 32, 8))
        if whole >= self.rate * 2**64:
            return None
        begin, end = sorted((len(text) + 1) * cut >> 64 for cut in cuts)
        prefix, middle, suffix = text[:begin], text[begin:end], text[end:]
        if order < self.spm_rate * 2**64:
            return [0, 1, suffix, 2, prefix, middle]
        return [0, prefix, 1, suffix, 2, middle]


def infill_ids(tokenizer: Path, *, where: str | None = None) -> tuple[int, ...]:
    """The ids of a tokenizer's tokens before prefix, suffix and middle. Raises `RecipeError` where it has none."""
    vocabulary = load_fast(tokenizer).get_vocab(with_added_tokens=True)
    for names in SPELLINGS:
        if all(name in vocabulary for name in names):
            return tuple(vocabulary[name] for name in names)
    raise RecipeError(
        f"the tokenizer has no tokens to fill in the middle with ({', '.join(TOKENS)}, or as other models spell them)",
        where=where,
        remedy="Take the tokenizer of a code model (tokenizer.from), or train one: tokenizer.train: {algorithm: bpe}.",
    )


def infilled(encoder: Encoder, texts: Sequence[str], infill: Infill, ids: Sequence[int]) -> Encoded:
    """The tokens of `texts` as the encoder gives them, some cut; `ids` are those of the three tokens."""
    documents = [infill.parts(text) or [text] for text in texts]
    # Each part is encoded apart, as `generate` gets it.
    pieces = [
        [piece for part in parts for piece in ([part] if isinstance(part, int) else encoder.cuts(part))]
        for parts in documents
    ]
    encoded = iter(encoder.pieces([piece for each in pieces for piece in each if isinstance(piece, str)]))
    arrays = [
        np.array([ids[piece]], dtype=encoder.dtype) if isinstance(piece, int) else next(encoded)
        for each in pieces
        for piece in each
    ]
    counts = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    sizes = np.fromiter(map(utf8_size, texts), dtype=np.int64, count=len(texts))
    return encoder.joined(arrays, counts, sizes)
