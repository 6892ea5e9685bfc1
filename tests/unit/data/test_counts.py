from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from gptcli.data.counts import EXCERPT, NOTABLE, QUANTILES, STRANGE_BYTES, Counts
from gptcli.data.encode import Encoded

SPECIALS = {256}
Marked = tuple[int, int, str, str]


def batch(texts: list[str], lengths: list[int]) -> Encoded:
    """Documents of so many tokens, the last of each a special one."""
    tokens = np.zeros(sum(lengths), dtype=np.uint16)
    tokens[np.cumsum(lengths) - 1] = 256
    return Encoded(tokens, np.array(lengths), np.array([len(text.encode()) for text in texts]))


def documents(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """(text, tokens) of documents, no two of them with the same number of tokens, or of tokens a byte."""
    rand = random.Random(seed)
    lengths = rand.sample(range(2, 50_000), count)
    return [("x" * rand.choice([10, STRANGE_BYTES - 1, STRANGE_BYTES, 997, 1009]), length) for length in lengths]


def added(counts: Counts, found: list[tuple[str, int]], size: int, first: int = 0) -> Counts:
    for start in range(0, len(found), size):
        part = found[start : start + size]
        texts = [text for text, _ in part]
        mark: Any = lambda index, start=start: (0, first + start + index, "", "")  # noqa: E731
        counts.add(texts, batch(texts, [length for _, length in part]), SPECIALS, 1, mark)
    return counts


@pytest.mark.parametrize("size", [1, 3, NOTABLE, 64, 5_000])
def test_the_longest_and_the_strangest_are_those_of_a_plain_sort(size: int) -> None:
    found = documents(1_000)
    counts = added(Counts(), found, size)
    longest = sorted(((length - 1, number) for number, (_, length) in enumerate(found)), reverse=True)[:NOTABLE]
    assert [(score, mark[1]) for score, mark, _ in sorted(counts.longest, reverse=True)] == longest
    ratios = [
        ((length - 1) / len(text), number) for number, (text, length) in enumerate(found) if len(text) >= STRANGE_BYTES
    ]
    strangest = [(score, mark[1]) for score, mark, _ in sorted(counts.strangest, reverse=True)]
    assert strangest == sorted(ratios, reverse=True)[:NOTABLE]


@pytest.mark.parametrize("count", [1, 2, 11, 101, 1_000])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 30, count)
    counts = added(Counts(), [("x", int(length)) for length in lengths], 17)
    expected = {name: int(np.quantile(lengths, share, method="lower")) for name, share in QUANTILES.items()}
    assert counts.quantiles() == expected
    assert Counts().quantiles() == {}


def test_counts_of_pieces_kept_as_json_add_up_to_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = documents(600)
    whole = added(Counts(), found, 50)
    merged = Counts()
    for piece in range(3):
        part = added(Counts(), found[piece * 200 : piece * 200 + 200], 50, piece * 200)
        merged.merge(Counts.from_json(json.loads(json.dumps(part.to_json())), piece))
    assert merged.lengths == whole.lengths
    assert merged.quantiles() == whole.quantiles()
    for mine, theirs in ((merged.longest, whole.longest), (merged.strangest, whole.strangest)):
        assert sorted((score, mark[2], text) for score, mark, text in mine) == sorted(
            (score, mark[1], text) for score, mark, text in theirs
        )
    assert {mark[0] for _, mark, _ in merged.longest} == {mark[2] // 200 for _, mark, _ in merged.longest}


def test_nul_and_special_tokens_in_texts_are_counted_beside_those_at_the_ends() -> None:
    encoded = batch(["a\0b", "c", "\0\0"], [5, 2, 3])
    encoded.tokens[[0, 1, 7]] = 256
    counts = Counts()
    counts.add(["a\0b", "c", "\0\0"], encoded, SPECIALS, 1, lambda index: (0, index, "", ""))  # type: ignore[arg-type, return-value]
    counts.merge(counts)
    assert (counts.with_nul, counts.specials_in_text) == (4, 6)


def test_only_a_few_documents_and_the_beginnings_of_their_texts_are_kept() -> None:
    counts = added(Counts(), [("y" * 10_000, length) for length in range(3, 3_000)], 100)
    assert len(counts.longest) == len(counts.strangest) == NOTABLE
    assert all(len(text) == EXCERPT for _, _, text in counts.longest + counts.strangest)
    assert len(json.dumps(counts.to_json())) < 60_000
