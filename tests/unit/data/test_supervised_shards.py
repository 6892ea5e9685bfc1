"""Shards that say which tokens are to be predicted: what is read is what was written, with numpy alone if need be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gptcli.data.encode import Encoded
from gptcli.data.shards import MANIFEST, Shards
from gptcli.errors import DataError
from gptcli.files import read_json, write_json
from tests.shards import write_side

LENGTHS = ([3, 5, 2, 9], [4, 1, 6])
SPECIALS = {"bos": None, "eos": 9, "pad": None, "adds_bos": False}


def batch(lengths: list[int], seed: int, *, supervised: bool = True) -> Encoded:
    rand = np.random.RandomState(seed)
    total = sum(lengths)
    mask = rand.randint(0, 2, total).astype(np.uint8) if supervised else None
    tokens = rand.randint(0, 9, total).astype(np.uint16)
    return Encoded(tokens, np.array(lengths), np.array(lengths) * 2, mask)


def write(folder: Path, *, supervised: bool = True) -> list[Encoded]:
    made = [batch(lengths, number, supervised=supervised) for number, lengths in enumerate(LENGTHS)]
    about = {"tokenizer": "t", "vocab_size": 10, "specials": SPECIALS}
    write_side(folder, np.dtype(np.uint16), 4, [(f"s{n}", [each]) for n, each in enumerate(made)], **about)
    return made


def test_what_is_supervised_is_read_as_it_was_written_over_shard_ends(tmp_path: Path) -> None:
    made = write(tmp_path / "train")
    shards = Shards.open(tmp_path / "train", verify=True)
    assert shards.has_supervision
    for stream, encoded in zip(shards.streams, made, strict=True):
        assert encoded.supervised is not None and stream.supervised is not None
        assert [len(part) for part in stream.supervised] == [len(part) for part in stream.shards]
        for begin, end in ((0, len(stream)), (2, 7), (3, 4), (4, 4), (5, len(stream) + 9)):
            found = stream.read_supervised(begin, end)
            assert found.dtype == np.bool_
            np.testing.assert_array_equal(found, encoded.supervised[begin:end].astype(bool))
    assert shards.manifest["supervised"] == sum(
        int(each.supervised.sum()) for each in made if each.supervised is not None
    )


@pytest.mark.parametrize("supervised", [True, False])
def test_documents_begin_where_they_were_put(tmp_path: Path, supervised: bool) -> None:
    write(tmp_path / "train", supervised=supervised)
    shards = Shards.open(tmp_path / "train")
    for number, lengths in enumerate(LENGTHS):
        offsets = shards.document_offsets(number)
        assert offsets.dtype == np.int64
        assert offsets.tolist() == [0, *np.cumsum(lengths).tolist()]


def test_shards_of_text_have_no_such_part_and_all_their_tokens_are_predicted(tmp_path: Path) -> None:
    write(tmp_path / "train", supervised=False)
    shards = Shards.open(tmp_path / "train")
    assert not shards.has_supervision and shards.manifest["version"] == 2
    assert not list((tmp_path / "train").glob("*.supervised.npy"))
    assert all(stream.supervised is None for stream in shards.streams)
    assert shards.streams[0].read_supervised(3, 8).tolist() == [True] * 5


def test_numpy_alone_reads_what_is_supervised(tmp_path: Path) -> None:
    made = write(tmp_path / "train")
    manifest = read_json(tmp_path / "train" / MANIFEST)
    for source, encoded in zip(manifest["sources"], made, strict=True):
        parts = [np.load(tmp_path / "train" / shard["files"]["supervised"]["name"]) for shard in source["shards"]]
        assert {part.dtype for part in parts} == {np.dtype(np.uint8)}
        np.testing.assert_array_equal(np.concatenate(parts), encoded.supervised)


def test_other_supervision_is_another_fingerprint_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train")
    path = tmp_path / "a" / "train" / "source-000-shard-00000.supervised.npy"
    before = Shards.open(tmp_path / "a" / "train").fingerprint
    manifest = read_json(tmp_path / "a" / "train" / MANIFEST)
    manifest["sources"][0]["shards"][0]["files"]["supervised"]["sha256"] = "0" * 64
    write_json(tmp_path / "a" / "train" / MANIFEST, manifest)
    with pytest.raises(DataError, match="fingerprint"):
        Shards.open(tmp_path / "a" / "train")
    write(tmp_path / "b" / "train")
    assert Shards.open(tmp_path / "b" / "train").fingerprint == before
    path = tmp_path / "b" / "train" / path.name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path)
    with pytest.raises(DataError) as caught:
        Shards.open(tmp_path / "b" / "train", verify=True)
    assert caught.value.where == str(path)
