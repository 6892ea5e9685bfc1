from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptcli.data import duplicates, pieces
from gptcli.data.duplicates import repeated
from gptcli.data.shards import Shards
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import load_fast

Prepare = Callable[..., Prepared]
BPE = "{train: {algorithm: bpe, vocab_size: 300}}"


def decoded(shards: Shards | None) -> list[str]:
    assert shards is not None
    return [bytes(ids.astype(np.uint8)).decode() for ids, _ in shards.evaluation_documents()]


def first_ones(texts: list[str], seen: set[str] | None = None) -> list[str]:
    """A plain loop over a set."""
    seen = set() if seen is None else seen
    kept = []
    for text in texts:
        if text not in seen:
            seen.add(text)
            kept.append(text)
    return kept


@pytest.mark.parametrize("at_once", [1, 7, 100, 4_000_000])
def test_all_but_the_first_are_found_over_files_in_any_number_of_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(duplicates, "SORTED_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (400, 16), dtype=np.uint8)
    pool[:20, :8] = pool[0, :8]  # alike in one half only
    pool[20:40, 8:] = pool[20, 8:]
    seen: set[bytes] = set()
    files, expected = [], []
    for number, count in enumerate((0, 300, 1, 0, 500, 70, 0)):
        digests = pool[rng.integers(0, len(pool), count)]
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], digests)
        expected.append([row.tobytes() in seen or seen.add(row.tobytes()) is not None for row in digests])
    found = repeated(files)
    assert [part.tolist() for part in found] == expected
    assert sum(map(sum, expected)) > 400
    assert [part.dtype for part in found] == [np.bool_] * len(files)


def test_no_files_and_files_without_documents_have_no_duplicates(tmp_path: Path) -> None:
    assert repeated([]) == []
    np.save(tmp_path / "a.npy", np.empty((0, 16), dtype=np.uint8))
    assert [part.tolist() for part in repeated([tmp_path / "a.npy"])] == [[]]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Three files of some ten pieces each in which a fifth of the lines stands elsewhere too."""
    monkeypatch.setattr(pieces, "SMALLEST", 4_000)
    rand = random.Random(5)
    pool = [f"text {number} " + "and more of it " * rand.randrange(1, 6) for number in range(1_000)]
    found = {}
    for name in ("a.txt", "b.txt", "c.txt"):
        found[name] = [rand.choice(pool).strip() for _ in range(700)]
        found[name][5] = found[name][1]
        (tmp_path / name).write_text("\n".join(found[name]) + "\n")
    return found


def data(train: str, validation: str, deduplicate: str) -> str:
    return (
        f"{{train: {train}, documents: line, validation: {validation}, deduplicate: {deduplicate}, sequence_length: 8}}"
    )


@pytest.mark.parametrize("tokenizer", ["{train: {algorithm: bytes}}", BPE])
def test_the_first_of_equal_documents_stays_over_pieces_files_and_sources(
    prepared: Prepare, corpus: dict[str, list[str]], tokenizer: str
) -> None:
    lines = [line for each in corpus.values() for line in each]
    result = prepared(data("[a.txt, b.txt, c.txt]", "0", "exact"), tokenizer=tokenizer)
    kept = first_ones(lines)
    if tokenizer == BPE:
        decode = load_fast(result.tokenizer).decode
        assert [decode(ids.tolist()) for ids, _ in result.train.evaluation_documents()] == kept
    else:
        assert decoded(result.train) == kept
    assert result.report["dropped"] == {"duplicate": len(lines) - len(kept)}
    assert result.report["duplicates"] == len(lines) - len(kept)
    assert result.report["dropped_examples"][0].endswith("a.txt:6: duplicate")


def test_duplicates_are_counted_and_kept_when_the_recipe_does_not_ask_for_more(
    prepared: Prepare, corpus: dict[str, list[str]]
) -> None:
    lines = [line for each in corpus.values() for line in each]
    result = prepared(data("[a.txt, b.txt, c.txt]", "0", "none"))
    assert decoded(result.train) == lines
    assert result.report["dropped"] == {}
    assert result.report["duplicates"] == len(lines) - len(set(lines))


def test_what_stands_in_the_validation_sources_is_left_out_of_training(
    prepared: Prepare, corpus: dict[str, list[str]]
) -> None:
    result = prepared(data("[a.txt, b.txt]", "c.txt", "exact"))
    held_out = first_ones(corpus["c.txt"])
    kept = first_ones(corpus["a.txt"] + corpus["b.txt"], set(held_out))
    assert (decoded(result.train), decoded(result.validation)) == (kept, held_out)
    assert result.report["duplicates"] == 2_100 - len(kept) - len(held_out)


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_equal_documents_are_on_one_side_of_a_share(
    prepared: Prepare, corpus: dict[str, list[str]], deduplicate: str
) -> None:
    lines = [line for each in corpus.values() for line in each]
    result = prepared(data("[a.txt, b.txt, c.txt]", "30%", deduplicate))
    train, validation = decoded(result.train), decoded(result.validation)
    assert not set(train) & set(validation)
    expected = lines if deduplicate == "none" else first_ones(lines)
    assert train == [line for line in expected if line not in set(validation)]
    assert validation == [line for line in expected if line in set(validation)]
    assert 0.2 * len(expected) < len(validation) < 0.4 * len(expected)
    assert result.report["duplicates"] == len(lines) - len(set(lines))


def test_the_tail_of_each_document_that_stays_is_held_out(prepared: Prepare, corpus: dict[str, list[str]]) -> None:
    result = prepared(data("[a.txt, b.txt]", "{tail: 25%}", "exact"))
    kept = first_ones(corpus["a.txt"] + corpus["b.txt"])
    assert decoded(result.train) == [line[: int(len(line) * 0.75)] for line in kept]
    assert decoded(result.validation) == [line[int(len(line) * 0.75) :] for line in kept]
