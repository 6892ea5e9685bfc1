from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptcli.data.dataset import TrainingRows, row_count
from gptcli.data.encode import Encoded
from gptcli.data.mixing import Mixture
from gptcli.data.permutation import permute
from gptcli.data.shards import Shards
from gptcli.errors import DataError
from tests.shards import write_side

EOS = 999


def write_shards(
    folder: Path, sources: list[list[NDArray[np.int64]]], shard_tokens: int, *, batch: int = 3, bos: bool = False
) -> Shards:
    """Shards of documents given as ids with BOS and EOS; bytes are made up as ten times the length."""

    def encoded(part: list[NDArray[np.int64]]) -> Encoded:
        lengths = np.array([len(document) for document in part], dtype=np.int64)
        return Encoded(np.concatenate(part).astype(np.uint16), lengths, lengths * 10)

    batches = [
        (f"source{index}", [encoded(documents[start : start + batch]) for start in range(0, len(documents), batch)])
        for index, documents in enumerate(sources)
    ]
    specials = {"bos": EOS, "eos": EOS, "pad": None, "adds_bos": bos}
    write_side(folder, np.dtype(np.uint16), shard_tokens, batches, tokenizer="t", vocab_size=1000, specials=specials)
    return Shards.open(folder, verify=True)


def make_documents(count: int, seed: int) -> list[NDArray[np.int64]]:
    random = np.random.RandomState(seed)
    return [np.append(random.randint(0, 900, random.randint(1, 40)), EOS) for _ in range(count)]


@pytest.mark.parametrize("shard_tokens", [3, 7, 50, 10_000])
def test_shards_are_full_read_back_exactly_and_are_plain_numpy_files(tmp_path: Path, shard_tokens: int) -> None:
    sources = [make_documents(20, 1), [], make_documents(5, 2)]
    shards = write_shards(tmp_path, sources, shard_tokens)
    assert shards.tokens == sum(len(d) for s in sources for d in s)
    assert (shards.documents, shards.bytes) == (25, shards.tokens * 10)
    for source, stream, about in zip(sources, shards.streams, shards.manifest["sources"], strict=True):
        expected = np.concatenate(source) if source else np.empty(0)
        counts = [shard["tokens"] for shard in about["shards"]]
        assert all(count == shard_tokens for count in counts[:-1]) and all(
            0 < count <= shard_tokens for count in counts
        )
        files = [np.load(tmp_path / shard["files"]["tokens"]["name"]) for shard in about["shards"]]
        assert np.array_equal(np.concatenate([np.empty(0), *files]), expected)
        assert len(stream) == len(expected)
        assert np.array_equal(stream.read(3, 30), expected[3:30])
    documents = [(ids.tolist(), size) for ids, size in shards.evaluation_documents()]
    assert documents == [(d[:-1].tolist(), len(d) * 10) for s in sources for d in s]


def test_evaluation_documents_come_without_bos(tmp_path: Path) -> None:
    sources = [[np.array([EOS, 1, 2, EOS]), np.array([EOS, 3, EOS])]]
    shards = write_shards(tmp_path, sources, 5, bos=True)
    assert [ids.tolist() for ids, _ in shards.evaluation_documents()] == [[1, 2], [3]]


def test_writing_in_other_batches_gives_the_same_bytes(tmp_path: Path) -> None:
    sources = [make_documents(30, 3)]
    for name, batch in (("a", 1), ("b", 7)):
        write_shards(tmp_path / name, sources, 64, batch=batch)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize("part", ["tokens", "offsets", "bytes"])
def test_a_damaged_file_is_named_and_never_used(tmp_path: Path, part: str) -> None:
    write_shards(tmp_path, [make_documents(9, 4)], 50)
    path = tmp_path / f"source-000-shard-00001.{part}.npy"
    whole = path.read_bytes()
    for damage in (whole[:-1], whole + b"x", whole.replace(b"NUMPY", b"OTHER"), b""):
        path.write_bytes(damage)
        with pytest.raises(DataError) as caught:
            Shards.open(tmp_path)
        assert caught.value.where == str(path)
        assert "Delete the folder" in str(caught.value.remedy)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"bytes 0 to .* are not what was written"):
        Shards.open(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        Shards.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "something else", "version": 1}')
    with pytest.raises(DataError, match=r"manifest|another format"):
        Shards.open(tmp_path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**30))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    positions = np.arange(size, dtype=np.int64)
    values = permute(positions, np.full(size, epoch, dtype=np.int64), size, seed)
    assert np.array_equal(np.sort(values), positions)


def test_permutations_differ_by_epoch_and_seed_look_random_and_never_change() -> None:
    size = 10_007
    positions = np.arange(size, dtype=np.int64)
    first, second = (permute(positions, np.full(size, epoch), size, 1337) for epoch in (0, 1))
    other = permute(positions, np.zeros(size, dtype=np.int64), size, 1338)
    assert (first == second).mean() < 0.01 and (first == other).mean() < 0.01
    assert abs(np.corrcoef(positions, first)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    mixed = permute(np.array([5, 5]), np.array([1, 0]), size, 1337)
    assert mixed.tolist() == [second[5], first[5]]
    huge = permute(np.array([0, 10**15 - 1]), np.array([0, 0]), 10**15, 7)
    assert huge.min() >= 0 and huge.max() < 10**15
    golden = permute(np.arange(8), np.zeros(8, dtype=np.int64), 8, 1337)
    assert golden.tolist() == GOLDEN


GOLDEN = [5, 6, 2, 4, 0, 3, 7, 1]


def naive_row(sources: list[list[NDArray[np.int64]]], row: int, length: int) -> list[int]:
    for documents in sources:
        stream = np.concatenate(documents)
        count = (len(stream) - 1) // length
        if row < count:
            return [int(token) for token in stream[row * length : row * length + length + 1]]
        row -= count
    raise IndexError(row)


@pytest.mark.parametrize("length", [1, 4, 16])
@pytest.mark.parametrize("shard_tokens", [3, 64, 10_000])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_equal_a_plain_loop_over_the_streams(tmp_path: Path, length: int, shard_tokens: int, count: int) -> None:
    sources = [make_documents(6, seed) for seed in range(count)]
    shards = write_shards(tmp_path, sources, shard_tokens)
    plain = TrainingRows(shards, sequence_length=length, seed=1, shuffle=False)
    counts = [row_count(sum(map(len, documents)), length) for documents in sources]
    rows = plain.rows_per_epoch
    assert rows == sum(counts)
    ks = np.arange(2 * rows, dtype=np.int64)[::-1]
    batch = plain.batch(ks)
    assert batch.dtype == np.int64 and batch.shape == (2 * rows, length + 1)
    had = [0] * count
    expected = []
    for source in Mixture(counts).locate(ks[::-1])[0].tolist():
        expected.append(naive_row([sources[source]], had[source] % counts[source], length))
        had[source] += 1
    assert batch[::-1].tolist() == expected


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_a_sole_source_is_keyed_by_seed_and_epoch_alone(tmp_path: Path, shuffle: bool) -> None:
    rows = TrainingRows(write_marked(tmp_path, [11]), sequence_length=1, seed=7, shuffle=shuffle, weights=[3.0])
    ks = np.arange(30, dtype=np.int64)
    expected = permute(ks % 11, ks // 11, 11, 7) if shuffle else ks % 11
    assert marks(rows, ks) == [(0, int(row)) for row in expected]


MARK = 10_000


def write_marked(folder: Path, counts: list[int]) -> Shards:
    """Sources of so many rows of length 1; a row's first token says which row of which source it is."""
    streams = [
        np.arange(count + 1) + MARK * source if count else np.array([EOS]) for source, count in enumerate(counts)
    ]
    return write_shards(folder, [[stream] for stream in streams], 50)


def marks(rows: TrainingRows, ks: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(source, row of the source) of each row of the run."""
    return [divmod(int(token), MARK) for token in rows.batch(ks)[:, 0]]


def test_without_weights_every_row_of_every_source_comes_once_an_epoch_evenly_mixed(tmp_path: Path) -> None:
    counts = [40, 0, 25]
    rows = TrainingRows(write_marked(tmp_path, counts), sequence_length=1, seed=7, shuffle=True)
    assert rows.rows_per_epoch == 65
    every = [(source, row) for source, count in enumerate(counts) for row in range(count)]
    for epoch in range(3):
        found = marks(rows, np.arange(65) + 65 * epoch)
        assert sorted(found) == every
        for end in range(66):
            assert abs(sum(source == 0 for source, _ in found[:end]) - end * 40 / 65) < 1
    assert rows.source_epochs(130) == [2.0, 0.0, 2.0]


def test_weights_give_each_source_its_share_and_a_small_one_begins_again_in_another_order(tmp_path: Path) -> None:
    rows = TrainingRows(write_marked(tmp_path, [12, 500]), sequence_length=1, seed=7, shuffle=True, weights=[0.7, 0.3])
    assert rows.rows_per_epoch == 512
    found = marks(rows, np.arange(512))
    for end in range(513):
        small = sum(source == 0 for source, _ in found[:end])
        assert int(end * 7 // 10) <= small <= -(-end * 7 // 10)
    places = [row for source, row in found if source == 0]
    first, second = places[:12], places[12:24]
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert rows.source_epochs(1000) == pytest.approx([700 / 12, 300 / 500])
    last = [k for k, (source, _) in enumerate(found) if source == 0][12]
    assert rows.row_id(last) == f"source0 tokens {second[0]}-{second[0] + 1} (epoch 1)"


def test_sources_of_one_size_are_shuffled_apart_and_stay_in_order_without_shuffling(tmp_path: Path) -> None:
    shards = write_marked(tmp_path, [30, 30])
    for shuffle in (True, False):
        rows = TrainingRows(shards, sequence_length=1, seed=7, shuffle=shuffle, weights=[1.0, 1.0])
        found = marks(rows, np.arange(60))
        one, other = ([row for source, row in found if source == wanted] for wanted in (0, 1))
        assert (one != other) == shuffle
        assert (one == list(range(30))) != shuffle


def test_rows_are_the_same_in_any_batch_far_from_each_other_too(tmp_path: Path) -> None:
    shards = write_marked(tmp_path, [12, 500, 77])
    make = functools.partial(TrainingRows, shards, sequence_length=1, seed=7, shuffle=True, weights=[0.5, 0.3, 0.2])
    far = np.array([3, 9000, 20_000, 100_000, 40_000, 65_535, 65_536, 10**12], dtype=np.int64)
    assert marks(make(), far) == [marks(make(), np.array([k]))[0] for k in far]


def test_a_source_with_a_weight_but_no_row_is_named(tmp_path: Path) -> None:
    shards = write_marked(tmp_path, [12, 0])
    with pytest.raises(DataError, match="source1 has a weight but not one row"):
        TrainingRows(shards, sequence_length=1, seed=7, shuffle=True, weights=[0.5, 0.5])


def test_shuffled_epochs_hold_every_row_once_and_one_row_is_the_same_in_any_batch(tmp_path: Path) -> None:
    sources = [make_documents(9, 1), make_documents(12, 2)]
    shards = write_shards(tmp_path, sources, 50)
    shuffled = TrainingRows(shards, sequence_length=8, seed=7, shuffle=True)
    rows = shuffled.rows_per_epoch
    every = sorted(naive_row(sources, row, 8) for row in range(rows))
    epochs = [shuffled.batch(np.arange(rows) + epoch * rows) for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == every for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(shuffled.batch(np.array([rows + 3]))[0], epochs[1][3])
    again = TrainingRows(shards, sequence_length=8, seed=7, shuffle=True)
    assert np.array_equal(again.batch(np.arange(rows)), epochs[0])


def test_a_row_is_named_by_source_place_and_epoch(tmp_path: Path) -> None:
    sources = [make_documents(4, 1), make_documents(4, 2)]
    rows = TrainingRows(write_shards(tmp_path, sources, 50), sequence_length=8, seed=7, shuffle=False)
    second = np.flatnonzero(rows._order._mixture.locate(np.arange(rows.rows_per_epoch))[0] == 1)
    assert rows.row_id(rows.rows_per_epoch + int(second[1])) == "source1 tokens 8-16 (epoch 1)"


def test_a_corpus_shorter_than_a_row_proposes_a_length_that_fits(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [[np.arange(100)]], 50)
    with pytest.raises(DataError, match="100 tokens") as caught:
        TrainingRows(shards, sequence_length=100, seed=1, shuffle=True)
    assert "data.sequence_length: 64" in str(caught.value.remedy)
    assert TrainingRows(shards, sequence_length=64, seed=1, shuffle=True).rows_per_epoch == 1
    assert TrainingRows(shards, sequence_length=99, seed=1, shuffle=True).rows_per_epoch == 1
