"""Rows of whole documents: every prediction once, none over the length, and what is not learnt has no label."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptcli.data.encode import Encoded
from gptcli.data.packed import IGNORED, PackedRows, padding
from gptcli.data.packing import Overlong, Packing, best_fit, pieces
from gptcli.data.row_index import RowIndex, row_index
from gptcli.data.shards import Shards
from gptcli.errors import DataError
from tests.shards import write_side
from tests.tiny import byte_tokenizer, wrapped

LENGTH = 16
Documents = list[tuple[list[int], list[bool]]]


def make_documents(count: int, seed: int, longest: int = 40) -> Documents:
    """Documents of 2 to `longest` tokens, no token twice, the first half of each a prompt."""
    random = np.random.RandomState(seed)
    found, token = [], 10
    for _ in range(count):
        size = int(random.randint(2, longest + 1))
        found.append((list(range(token, token + size)), [place >= size // 2 for place in range(size)]))
        token += size
    return found


def write(folder: Path, sources: list[Documents], *, supervised: bool = True, shard_tokens: int = 37) -> Shards:
    batches = []
    for number, documents in enumerate(sources):
        tokens = np.array([token for ids, _ in documents for token in ids], dtype=np.uint16)
        marks = np.array([mark for _, of in documents for mark in of], dtype=np.uint8)
        lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
        batches.append((f"source{number}", [Encoded(tokens, lengths, lengths, marks if supervised else None)]))
    specials = {"bos": 0, "eos": 0, "pad": 1, "adds_bos": False}
    about = {"tokenizer": "t", "vocab_size": 300, "specials": specials}
    write_side(folder / "train", np.dtype(np.uint16), shard_tokens, batches, **about)
    return Shards.open(folder / "train", verify=True)


def index_of(shards: Shards, packing: str = "isolated", overlong: str = "split", **other: bool) -> RowIndex:
    folder = shards.folder.parent / "tokenizer"
    if not folder.exists():
        wrapped(byte_tokenizer()).save_pretrained(str(folder))
    how = Packing(LENGTH, packing, overlong, **other)
    return row_index(shards, how, folder, lambda: None, lambda _: None)[0]


def rows_of(shards: Shards, index: RowIndex, **options: object) -> PackedRows:
    return PackedRows(shards, index, **{"seed": 7, "shuffle": True, **options})  # type: ignore[arg-type]


def predictions(batch: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(input, label) of every label that counts."""
    known = batch[:, 1] != IGNORED
    return list(zip(batch[:, 0][known].tolist(), batch[:, 1][known].tolist(), strict=True))


def expected(documents: Documents) -> list[tuple[int, int]]:
    return [(ids[j], ids[j + 1]) for ids, marks in documents for j in range(len(ids) - 1) if marks[j + 1]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=200), capacity=st.integers(50, 80))
def test_best_fit_never_overfills_a_row_and_is_within_its_bound(sizes: list[int], capacity: int) -> None:
    rows = best_fit(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(rows, weights=sizes)
    assert filled.max() <= capacity and filled.min() > 0
    assert len(filled) <= 11 / 9 * -(-sum(sizes) // capacity) + 4 or len(filled) <= 2 * sum(sizes) / capacity
    assert np.array_equal(rows, naive_best_fit(sizes, capacity))


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The textbook's loop; of several rows with the same room the newest to have it."""
    rows, left = [0] * len(sizes), []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = [(room, -changed, row) for row, (room, changed) in enumerate(left) if room >= sizes[index]]
        row = min(fitting)[2] if fitting else len(left)
        if not fitting:
            left.append((capacity, 0))
        left[row] = (left[row][0] - sizes[index], 1 + max(changed for _, changed in left))
        rows[index] = row
    return rows


@pytest.mark.parametrize("packing", ["isolated", "none"])
@pytest.mark.parametrize("supervised", [True, False])
def test_an_epoch_predicts_every_supervised_token_once(tmp_path: Path, packing: str, supervised: bool) -> None:
    sources = [make_documents(60, 1), make_documents(25, 2)]
    shards = write(tmp_path, sources, supervised=supervised)
    rows = rows_of(shards, index_of(shards, packing), batch=3)
    documents = [(ids, marks if supervised else [True] * len(ids)) for part in sources for ids, marks in part]
    count = rows.rows_per_epoch
    for epoch in range(3):
        ks = np.arange(epoch * count, (epoch + 1) * count)
        found = predictions(pad(rows, ks))
        assert Counter(found) == Counter(expected(documents))
        assert rows.labels_at((epoch + 1) * count) == (epoch + 1) * len(found)
    assert not np.array_equal(pad(rows, np.arange(count)), pad(rows, np.arange(count, 2 * count)))


def pad(rows: PackedRows, ks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows in batches of their own width, filled up to `LENGTH`."""
    parts = [rows.batch(ks[at : at + 3]) for at in range(0, len(ks), 3)]
    wide = [np.pad(part, ((0, 0), (0, 0), (0, LENGTH - part.shape[2])), constant_values=IGNORED) for part in parts]
    return np.concatenate(wide)


def test_positions_begin_again_with_each_document_and_with_the_filling(tmp_path: Path) -> None:
    shards = write(tmp_path, [make_documents(40, 3, longest=9)])
    rows = rows_of(shards, index_of(shards))
    batch = rows.batch(np.arange(rows.rows_per_epoch))
    assert batch.shape == (rows.rows_per_epoch, 3, LENGTH)
    lengths = rows.lengths(np.arange(rows.rows_per_epoch))
    for (ids, labels, positions), length in zip(batch, lengths, strict=True):
        begins = np.flatnonzero(positions[:length] == 0)
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            assert np.array_equal(positions[begin:end], np.arange(end - begin))
            assert np.array_equal(ids[begin:end], np.arange(ids[begin], ids[begin] + end - begin))  # one document
        assert np.array_equal(positions[length:], np.arange(LENGTH - length))
        assert (labels[length:] == IGNORED).all() and (ids[length:] == 1).all()


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_what_is_counted_is_what_batches_hold(tmp_path: Path, packing: str) -> None:
    shards = write(tmp_path, [make_documents(60, 1), make_documents(25, 2)])
    rows = rows_of(shards, index_of(shards, packing), batch=2, weights=[0.7, 0.3])
    random = np.random.RandomState(0)
    other = rows_of(shards, rows.index, batch=2, weights=[0.7, 0.3])
    tokens = labels = 0
    for k in range(3 * rows.rows_per_epoch):
        assert (rows.tokens_at(k), rows.labels_at(k)) == (tokens, labels)
        if random.rand() < 0.1:  # whatever was asked before
            assert (other.tokens_at(k), other.labels_at(k)) == (tokens, labels)
        tokens += int(rows.lengths(np.array([k]))[0])
        labels += len(predictions(rows.batch(np.array([k]))))


def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    shards = write(tmp_path, [make_documents(60, 1), make_documents(25, 2)])
    for packing in ("isolated", "none"):
        one, other = (rows_of(shards, index_of(shards, packing), batch=2) for _ in range(2))
        ks = np.arange(900)
        whole = one.batch(ks)
        for k in np.random.RandomState(1).permutation(ks)[:100]:
            row = other.batch(np.array([k]))
            assert np.array_equal(row[0], whole[k, :, : row.shape[2]])


def test_rows_of_like_length_are_together_and_shares_stay(tmp_path: Path) -> None:
    shards = write(tmp_path, [make_documents(400, 1, longest=17), make_documents(200, 2, longest=17)])
    index = index_of(shards, "none")
    grouped, plain = (rows_of(shards, index, batch=4, shuffle=shuffle) for shuffle in (True, False))
    assert padding(grouped, 4) < padding(plain, 4) / 3
    assert padding(grouped, 4) < 0.1
    counts = [np.cumsum(grouped._order.places(np.arange(600))[0] == source) for source in (0, 1)]
    for source, rows in enumerate(grouped.proportions.rows):
        share = rows / grouped.rows_per_epoch
        assert np.abs(counts[source] - share * np.arange(1, 601)).max() <= 1
    within = grouped.lengths(np.arange(400)).reshape(-1, 4)
    steps = within.mean(axis=1)
    assert np.corrcoef(steps[:-1], steps[1:])[0, 1] < 0.5  # steps do not go from short to long


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop", "error"])
def test_a_document_longer_than_a_row_is_treated_as_asked(overlong: str) -> None:
    offsets = np.array([0, 5, 5 + 35, 41, 41 + 17, 41 + 17 + 18])  # of 5, 35, 1, 17 and 18 tokens
    if overlong == "error":
        with pytest.raises(Overlong) as caught:
            pieces(offsets, LENGTH, overlong)
        assert (caught.value.document, caught.value.tokens) == (1, 35)
        return
    begins, lengths, left_out = pieces(offsets, LENGTH, overlong)
    assert left_out["without_label"] == 1
    assert (
        list(zip(begins.tolist(), lengths.tolist(), strict=True))
        == {
            "split": [(0, 5), (5, 17), (21, 17), (37, 3), (41, 17), (58, 17), (74, 2)],
            "truncate": [(0, 5), (5, 17), (41, 17), (58, 17)],
            "drop": [(0, 5), (41, 17)],
        }[overlong]
    )
    counts = {"split": (0, 0), "truncate": (2, 0), "drop": (0, 2)}[overlong]
    assert (left_out["truncated"], left_out["dropped"]) == counts


def test_a_prompt_without_its_completion_is_left_out_and_counted(tmp_path: Path) -> None:
    documents = [(list(range(10, 50)), [place >= 36 for place in range(40)]), ([60, 61], [False, True])]
    shards = write(tmp_path, [documents])
    cut = index_of(shards, overlong="truncate")
    assert cut.left_out == {"truncated": 1, "dropped": 0, "without_label": 1}
    assert (cut.rows, cut.labels, cut.tokens) == ([1], 1, 1)
    split = index_of(shards)
    assert (split.left_out["without_label"], split.labels) == (2, 5)
    whole = index_of(shards, every_label=True)
    assert (whole.left_out["without_label"], whole.labels, whole.tokens) == (0, 40, 40)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    shards = write(tmp_path, [[([60, 61], [False, True]), (list(range(10, 50)), [False] * 40)]])
    with pytest.raises(DataError) as caught:
        index_of(shards, overlong="error")
    assert "document 2 has 40 tokens, and a row takes 16 + 1" in caught.value.what
    assert caught.value.where == "source0" and "truncate" in str(caught.value.remedy)
    shards = write(tmp_path / "b", [[(list(range(10, 50)), [False] * 40)]])
    with pytest.raises(DataError, match="nothing is left to learn of 1 documents") as caught:
        index_of(shards)
    assert "finetune.train_on: all" in str(caught.value.remedy)
    assert not list((tmp_path / "b").glob("*rows-*"))
    assert index_of(shards, every_label=True).labels == 39
    shards = write(tmp_path / "c", [make_documents(5, 1), [([60, 61], [True, False])]])
    with pytest.raises(DataError, match="source1 has a weight but not one row"):
        rows_of(shards, index_of(shards), weights=[1.0, 1.0])


def test_the_index_is_made_once_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    shards = write(tmp_path, [make_documents(60, 1)])
    index_of(shards)
    (folder,) = tmp_path.glob("rows-*")
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    again: list[str] = []
    how = Packing(LENGTH, "isolated", "split")
    assert row_index(shards, how, tmp_path, lambda: None, again.append)[1] and not again
    assert before == {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    path = folder / "source-000.begins.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert not row_index(shards, how, tmp_path, lambda: None, again.append)[1]
    assert "source-000.begins.npy" in again[0] and "not what was written" in again[0]
    assert {name: content for name, (_, content) in before.items()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    index_of(shards, "none")
    index_of(shards, every_label=True)
    assert len(list(tmp_path.glob("rows-*"))) == 3
