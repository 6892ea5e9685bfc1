from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptcli.data.encode import make_encoder
from gptcli.data.infill import TOKENS, Infill, infilled
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import load_fast
from gptcli.errors import RecipeError

Prepare = Callable[..., Prepared]
TEXTS = [f"def add_{n}(a, b):\n    return a + b + {n}  # größer 😀\n" for n in range(400)]


def joined(parts: list[str | int]) -> str:
    """The text that the parts are of, by the token before each."""
    found = {0: "", 1: "", 2: ""}
    at = 0
    for part in parts:
        if isinstance(part, int):
            at = part
        else:
            found[at] += part
    return found[0] + found[2] + found[1]


def test_the_parts_are_the_text_and_the_middle_is_written_last() -> None:
    cut = [parts for text in TEXTS if (parts := Infill(1.0, 0.0, 7).parts(text)) is not None]
    assert len(cut) == len(TEXTS)
    assert [joined(parts) for parts in cut] == TEXTS
    assert {tuple(part for part in parts if isinstance(part, int)) for parts in cut} == {(0, 1, 2)}


def test_suffix_first_has_prefix_and_middle_in_one_piece() -> None:
    for text in TEXTS:
        parts = Infill(1.0, 1.0, 7).parts(text)
        assert parts is not None
        assert [part for part in parts if isinstance(part, int)] == [0, 1, 2]
        _, _, suffix, _, prefix, middle = parts
        assert f"{prefix}{middle}{suffix}" == text


def test_shares_are_as_asked_and_cuts_are_anywhere() -> None:
    infill = Infill(0.5, 0.25, 3)
    found = [infill.parts(text) for text in TEXTS]
    cut = [parts for parts in found if parts is not None]
    assert 160 <= len(cut) <= 240
    assert 60 <= 400 * sum(parts[1] == 1 for parts in cut) / len(cut) <= 140
    begins = Counter(len(str(parts[1])) * 4 // 50 for parts in cut if parts[1] != 1)
    assert len(begins) >= 4


def test_the_same_text_and_seed_are_cut_the_same_and_another_seed_otherwise() -> None:
    one, other = Infill(0.9, 0.5, 1), Infill(0.9, 0.5, 2)
    assert [one.parts(text) for text in TEXTS] == [Infill(0.9, 0.5, 1).parts(text) for text in TEXTS]
    assert [one.parts(text) for text in TEXTS] != [other.parts(text) for text in TEXTS]


def test_training_documents_are_cut_and_held_out_ones_stay_whole(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("\n\n".join(text.strip() for text in TEXTS), encoding="utf-8")
    data = "{train: {path: code.txt, documents: blank-line}, validation: 20%, sequence_length: 16}"
    given = "{train: {algorithm: bpe, vocab_size: 300}}"
    found = prepared(data, "train.objective=fim", "train.fim.rate=1.0", tokenizer=given)
    tokenizer = load_fast(found.tokenizer)
    ids = [tokenizer.token_to_id(token) for token in TOKENS]
    assert found.validation is not None
    for shards, times in ((found.train, 1), (found.validation, 0)):
        documents = [each.tolist() for each, _ in shards.evaluation_documents()]
        assert documents
        assert all(document.count(number) == times for document in documents for number in ids)
    texts = {text.strip() for text in TEXTS}
    encoder = make_encoder(found.tokenizer)
    chosen = sorted(texts)[:50]
    again = infilled(encoder, chosen, Infill(1.0, 0.5, 1337), ids)
    assert np.array_equal(again.bytes, encoder(chosen).bytes)
    for text, end, length in zip(chosen, np.cumsum(again.lengths), again.lengths, strict=True):
        own = again.tokens[end - length : end - 1].tolist()
        pieces = Infill(1.0, 0.5, 1337).parts(text)
        assert pieces is not None
        expected = [
            number
            for part in pieces
            for number in ([ids[part]] if isinstance(part, int) else tokenizer.encode(part).ids)
        ]
        assert own == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{train: code.txt, validation: 0}", "no tokens to fill in the middle"),
        ("{train: code.txt, format: prompt, prompt: '{text}', completion: '{b}'}", "data.format is prompt"),
    ],
)
def test_what_cannot_be_cut_is_said(prepared: Prepare, tmp_path: Path, data: str, said: str) -> None:
    (tmp_path / "code.txt").write_text(TEXTS[0], encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        prepared(data, "train.objective=fim")
