from __future__ import annotations

from gptcli.data.split import sample, split_tail, splitter
from gptcli.recipe.schema import Tail


def test_a_share_is_held_out_by_the_text_alone() -> None:
    texts = [f"document {n}" for n in range(20_000)]
    split = splitter(0.05)
    held_out = {text for text in texts if split(text)[1] is not None}
    assert 0.045 < len(held_out) / len(texts) < 0.055
    assert all((split(text) == (None, text)) == (text in held_out) for text in reversed(texts))
    smaller = splitter(0.01)
    assert {text for text in texts if smaller(text)[1]} < held_out
    assert splitter(0.0)("x") == ("x", None)


def test_a_tail_is_cut_by_characters_as_nanogpt_does() -> None:
    text = "äöü" * 371_798
    train, validation = splitter(Tail(tail=0.1))(text)
    assert (train, validation) == (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])
    assert split_tail("a", 0.1) == (None, "a")


def test_the_sample_is_bounded_and_independent_of_order() -> None:
    texts = [f"{n} " * (n % 50 + 1) for n in range(2000)]
    chosen = sample(texts, 20_000)
    assert 15_000 < sum(map(len, chosen)) <= 20_000
    assert set(sample(texts[::-1], 20_000)) == set(chosen)
    assert chosen == [text for text in texts if text in set(chosen)]
    assert sample(texts) == texts
    assert sample(["é" * 100], 99) == ["é" * 49]
