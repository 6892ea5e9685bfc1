from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptcli.data.dataset import TrainingRows, row_count
from gptcli.data.encode import Encoded
from gptcli.data.permutation import permute
from gptcli.data.shards import Shards, ShardWriter
from gptcli.errors import DataError

EOS = 999


def write_shards(
    folder: Path, sources: list[list[NDArray[np.int64]]], shard_tokens: int, *, batch: int = 3, bos: bool = False
) -> Shards:
    """Shards of documents given as ids with BOS and EOS; bytes are made up as ten times the length."""
    writer = ShardWriter(folder, np.dtype(np.uint16), shard_tokens)
    for index, documents in enumerate(sources):
        writer.begin_source(f"source{index}")
        for start in range(0, len(documents), batch):
            part = documents[start : start + batch]
            lengths = np.array([len(document) for document in part], dtype=np.int64)
            writer.add(Encoded(np.concatenate(part).astype(np.uint16), lengths, lengths * 10))
    specials = {"bos": EOS, "eos": EOS, "pad": None, "adds_bos": bos}
    writer.finish(tokenizer="t", vocab_size=1000, specials=specials)
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
    Shards.open(tmp_path)
    with pytest.raises(DataError, match="other content"):
        Shards.open(tmp_path, verify=True)
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
    rows = plain.rows_per_epoch
    assert rows == sum(row_count(sum(map(len, documents)), length) for documents in sources)
    ks = np.arange(2 * rows, dtype=np.int64)[::-1]
    batch = plain.batch(ks)
    assert batch.dtype == np.int64 and batch.shape == (2 * rows, length + 1)
    assert batch.tolist() == [naive_row(sources, int(k) % rows, length) for k in ks]


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
    first = row_count(sum(map(len, sources[0])), 8)
    assert rows.row_id(rows.rows_per_epoch + first + 1) == "source1 tokens 8-16 (epoch 1)"


def test_a_corpus_shorter_than_a_row_proposes_a_length_that_fits(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [[np.arange(100)]], 50)
    with pytest.raises(DataError, match="100 tokens") as caught:
        TrainingRows(shards, sequence_length=100, seed=1, shuffle=True)
    assert "data.sequence_length: 64" in str(caught.value.remedy)
    assert TrainingRows(shards, sequence_length=64, seed=1, shuffle=True).rows_per_epoch == 1
    assert TrainingRows(shards, sequence_length=99, seed=1, shuffle=True).rows_per_epoch == 1
