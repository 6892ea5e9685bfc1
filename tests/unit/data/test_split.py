from __future__ import annotations

import numpy as np

from gptcli.data.split import Split, digest_of, sample_bucket, sample_buckets, split_of
from gptcli.recipe.schema import Tail


def digest(text: str) -> bytes:
    return digest_of(text.encode())


def test_a_share_is_held_out_by_the_text_alone() -> None:
    texts = [f"document {n}" for n in range(20_000)]
    split = split_of(0.05)
    held_out = {text for text in texts if split(text, text.encode())[1] is not None}
    assert 0.045 < len(held_out) / len(texts) < 0.055
    assert all((split(text, text.encode()) == (None, text)) == (text in held_out) for text in reversed(texts))
    smaller = split_of(0.01)
    assert {text for text in texts if smaller(text, text.encode())[1]} < held_out
    assert split_of(0.0)("x", b"x") == ("x", None)


def test_a_tail_is_cut_by_characters_as_nanogpt_does() -> None:
    text = "äöü" * 371_798
    train, validation = split_of(Tail(tail=0.1))(text, text.encode())
    assert (train, validation) == (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])
    assert Split(tail=0.1)("a", b"a") == (None, "a")


def test_the_sample_is_bounded_and_independent_of_order() -> None:
    texts = [f"{n} " * (n % 50 + 1) for n in range(2000)]
    buckets = np.array([sample_bucket(digest(text)) for text in texts], dtype=np.uint16)
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    taken = sample_buckets([(buckets[:700], sizes[:700]), (buckets[700:], sizes[700:])], 20_000)
    assert 15_000 < sizes[buckets < taken].sum() <= 20_000
    assert sample_buckets([(buckets[::-1], sizes[::-1])], 20_000) == taken
    assert (buckets < sample_buckets([(buckets, sizes)])).all()
    assert (buckets[:1] < sample_buckets([(buckets[:1], np.array([10**9]))])).all()  # a sole text, to be cut
