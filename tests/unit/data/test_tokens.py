"""Tokens made before: a .bin, a .npy, a folder of our shards, read as the texts that made them would have been."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from gptcli.data import tokens as module
from gptcli.data.dataset import TrainingRows
from gptcli.data.shards import Shards
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import Specials, train_bpe, write_config
from gptcli.data.tokens import TokensInput, read_tokens, token_bytes
from gptcli.errors import DataError, GptcliError
from tests import tiny

Prepare = Callable[..., Prepared]
EOS = 256
TEXTS = ["The first, été", "中文 and more", "x", "the last one 🙂\n"]


def stream_of(texts: Sequence[str], *, closed: bool = True) -> list[int]:
    """The bytes tokenizer's stream of texts, `closed` by a last EOS."""
    ids = [each for text in texts for each in [*text.encode(), EOS]]
    return ids if closed else ids[:-1]


def write(path: Path, ids: Sequence[int], dtype: str = "uint16") -> Path:
    array = np.array(ids, dtype=dtype)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        array.tofile(path)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def streams(shards: Shards) -> list[list[int]]:
    return [stream.read(0, len(stream)).tolist() for stream in shards.streams]


def texts_of(shards: Shards | None) -> list[str]:
    assert shards is not None
    return [bytes(ids.astype(np.uint8)).decode() for ids, _ in shards.evaluation_documents()]


def save(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, {"eos_token": tiny.END, "pad_token": tiny.PAD}, **config)
    return folder


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize(
    ("name", "dtype", "keys"),
    [
        ("a.bin", "uint16", ""),
        ("a.bin", "uint16", ", dtype: uint16"),
        ("a.bin", "uint32", ", dtype: uint32"),
        ("a.npy", "uint16", ""),
        ("a.npy", "uint32", ""),
        ("a.npy", "int64", ""),
        ("a.npy", ">u2", ""),
        ("a.npy", "uint8", ""),
    ],
)
def test_the_stream_read_back_is_that_of_the_file_and_its_bytes_those_of_the_texts(
    prepared: Prepare, tmp_path: Path, name: str, dtype: str, keys: str, closed: bool
) -> None:
    if dtype == "uint8":
        with pytest.raises(OverflowError):
            write(tmp_path / name, stream_of(TEXTS), dtype)
        write(tmp_path / name, list(b"no end of text"), dtype)
        wanted = ["no end of text"]
    else:
        write(tmp_path / name, stream_of(TEXTS, closed=closed), dtype)
        wanted = TEXTS
    result = prepared(f"{{train: {{tokens: {name}{keys}}}, validation: 0, sequence_length: 4}}")
    assert streams(result.train) == [stream_of(wanted)]
    found = list(result.train.evaluation_documents())
    assert [bytes(ids.astype(np.uint8)).decode() for ids, _ in found] == wanted
    assert [size for _, size in found] == [len(text.encode()) for text in wanted]
    assert (result.report["train"]["documents"], result.report["dropped"]) == (len(wanted), {})
    assert result.report["train"]["bytes"] == sum(len(text.encode()) for text in wanted)


def test_documents_are_counted_by_their_ends_and_empty_ones_are_dropped_and_counted(
    prepared: Prepare, tmp_path: Path
) -> None:
    write(tmp_path / "a.bin", [EOS, 65, 66, EOS, EOS, EOS, 67, 257, EOS, EOS])
    result = prepared("{train: {tokens: a.bin}, validation: 0, sequence_length: 2}")
    assert streams(result.train) == [[65, 66, EOS, 67, 257, EOS]]
    assert (result.train.documents, result.report["dropped"]) == (2, {"empty": 4})
    assert result.report["dropped_examples"][0].endswith("a.bin:1: empty")
    assert result.report["train"]["longest"][0]["document"].endswith("a.bin:5")
    # `<|pad|>` is 7 bytes of text.
    assert [size for _, size in result.train.evaluation_documents()] == [2, 1 + 7]


def test_each_file_of_a_glob_ends_its_last_document(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number, text in enumerate(TEXTS):
        write(tmp_path / "parts" / f"{number}.bin", stream_of([text, "end"], closed=False))
    result = prepared("{train: {tokens: parts/*.bin}, validation: 0, sequence_length: 4}")
    assert streams(result.train) == [stream_of([each for text in TEXTS for each in (text, "end")])]


@pytest.mark.parametrize(
    "kind",
    [
        "bytes",
        "bpe",
        "bos is eos",
        "bos",
        "byte fallback",
        pytest.param(
            "byte fallback, specials",
        ),
    ],
)
def test_our_shards_and_their_stream_in_a_file_are_read_back_as_they_were(
    prepared: Prepare, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "tok"
    if kind == "bpe":
        train_bpe(TEXTS * 3, folder, vocab_size=280, pattern="gpt4")
    elif kind == "bos is eos":
        save(folder, tiny.byte_tokenizer(bos=True), bos_token=tiny.END)
    elif kind == "bos":
        save(folder, tiny.byte_tokenizer(), bos_token=tiny.PAD, add_bos_token=True)
    elif kind.startswith("byte fallback"):
        save(folder, tiny.fallback_tokenizer())
    tokenizer = "{train: {algorithm: bytes}}" if kind == "bytes" else "{from: tok}"
    special = [] if kind == "byte fallback" else [f"it says {tiny.PAD} here"]
    texts = [*TEXTS, "hello world, the cat", *special, "é" * 50]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = "tokenize.shard_tokens=40"
    made = prepared("{train: a.jsonl, validation: 0, sequence_length: 4}", shards, tokenizer=tokenizer)
    assert len(made.train.streams[0].shards) > 2
    read = "{train: {tokens: %s}, validation: 0, sequence_length: 4}"
    write(tmp_path / "a.npy", streams(made.train)[0])
    sources = [made.train.folder, made.train.folder.parent, "a.npy"]
    for source in sources:
        again = prepared(read % source, shards, tokenizer=tokenizer)
        assert again.train.fingerprint == made.train.fingerprint
        assert (again.report["dropped"], again.train.documents) == ({}, len(texts))
        counted = ("bytes", "tokens", "document_tokens", "specials_in_text")
        assert {key: again.report["train"][key] for key in counted} == {
            key: made.report["train"][key] for key in counted
        }


def test_several_sources_in_shards_are_one_and_both_sides_can_be_named(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {number}" for number in range(60)))
    (tmp_path / "b.txt").write_text("one more\nand another")
    made = prepared(
        "{train: [a.txt, b.txt], documents: line, validation: 20%, sequence_length: 4}", "tokenize.shard_tokens=100"
    )
    assert made.validation is not None
    data = "{train: {tokens: %s}, validation: {tokens: %s}, sequence_length: 4}"
    again = prepared(data % (made.train.folder, made.validation.folder))
    assert streams(again.train) == [[token for stream in streams(made.train) for token in stream]]
    assert texts_of(again.train) == texts_of(made.train)
    assert texts_of(again.validation) == texts_of(made.validation)


def test_a_bos_is_put_where_it_is_missing_and_not_twice(prepared: Prepare, tmp_path: Path) -> None:
    save(tmp_path / "other", tiny.byte_tokenizer(), bos_token=tiny.PAD, add_bos_token=True)
    save(tmp_path / "same", tiny.byte_tokenizer(bos=True), bos_token=tiny.END)
    one, two = [40, 41], [42, 43, 44]
    data = "{train: {tokens: a.bin}, validation: 0, sequence_length: 2}"
    for ids in ([1, *one, 0, 1, *two, 0], [*one, 0, *two, 0], [1, *one, 0, *two], [*one, 0, 1, *two]):
        write(tmp_path / "a.bin", ids)
        assert streams(prepared(data, tokenizer="{from: other}").train) == [[1, *one, 0, 1, *two, 0]]
    for ids in ([0, *one, 0, 0, *two, 0], [*one, 0, *two, 0], [0, *one, 0, *two], [*one, 0, 0, *two]):
        write(tmp_path / "a.bin", ids)
        result = prepared(data, tokenizer="{from: same}")
        assert streams(result.train) == [[0, *one, 0, 0, *two, 0]]
        assert result.report["dropped"] == {}


def test_entries_have_a_size_of_their_own_only_where_they_stand_for_bytes(tmp_path: Path) -> None:
    sizes = token_bytes(save(tmp_path / "bytes", tiny.byte_tokenizer()))
    loaded = tiny.byte_tokenizer()
    assert sizes is not None
    for text in [*TEXTS, tiny.TEXT, f"{tiny.PAD}x{tiny.END}"]:
        ids = loaded.encode(text).ids
        assert sizes[ids].sum() == len(text.encode())
    assert token_bytes(save(tmp_path / "fallback", tiny.fallback_tokenizer())) is None
    words = Tokenizer(models.WordLevel({tiny.END: 0, tiny.PAD: 1, "hello": 2, "world": 3}, unk_token=tiny.PAD))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert words.decode(words.encode("hello world").ids) == "hello world"
    assert token_bytes(save(tmp_path / "words", words)) is None


def one_by_one(ids: list[int], specials: Specials) -> list[list[int]]:
    """The documents of a stream by a plain loop."""
    found: list[list[int]] = []
    at = 0
    while at < len(ids):
        if specials.adds_bos and ids[at] == specials.bos:
            at += 1
            if at == len(ids) and specials.bos == specials.eos:
                break
        end = at
        while end < len(ids) and ids[end] != specials.eos:
            end += 1
        found.append(ids[at:end])
        at = end + 1
    return found


@pytest.mark.parametrize("specials", [Specials(1, 0, 2, False), Specials(1, 0, 2, True), Specials(0, 0, 2, True)])
def test_documents_are_the_same_whatever_is_read_at_once_and_wherever_files_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, specials: Specials
) -> None:
    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4), st.integers(1, 9))
    def same(parts: list[list[int]], chunk: int) -> None:
        monkeypatch.setattr(module, "CHUNK", chunk)
        files = tuple(write(tmp_path / f"{number}.bin", part) for number, part in enumerate(parts))
        found = [ids.tolist() for ids in read_tokens(TokensInput(files[0], files), specials)]
        assert found == one_by_one([token for part in parts for token in part], specials)

    same()


def test_a_document_larger_than_what_is_read_at_once_is_whole(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    texts = ["a" * 50, "b" * 7, "c" * 6, "d" * 20]
    write(tmp_path / "a.bin", stream_of(texts))
    assert texts_of(prepared("{train: {tokens: a.bin}, validation: 0, sequence_length: 4}").train) == texts


def test_a_limit_counts_documents_that_are_not_empty(prepared: Prepare, tmp_path: Path) -> None:
    for name, texts in (("0.bin", ["a", "", "bb"]), ("1.bin", ["", "ccc", "dddd", "eeeee"])):
        write(tmp_path / name, stream_of(texts))
    result = prepared("{train: {tokens: '*.bin', limit: 4}, validation: 0, sequence_length: 2}")
    assert texts_of(result.train) == ["a", "bb", "ccc", "dddd"]


def test_a_validation_share_does_not_depend_on_order_or_on_where_files_end(prepared: Prepare, tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(100)]
    data = "{train: {tokens: '%s'}, validation: 20%%, sequence_length: 4}"
    write(tmp_path / "a.bin", stream_of(texts))
    first = prepared(data % "a.bin")
    write(tmp_path / "b-0.npy", stream_of(texts[70:][::-1]), "int64")
    write(tmp_path / "b-1.npy", stream_of(texts[:70]), "uint32")
    second = prepared(data % "b-*.npy")
    assert sorted(texts_of(first.train)) == sorted(texts_of(second.train))
    assert sorted(texts_of(first.validation)) == sorted(texts_of(second.validation))
    assert sorted(texts_of(first.train) + texts_of(first.validation)) == sorted(texts)
    assert 8 <= len(texts_of(first.validation)) <= 35


def test_a_tail_cuts_each_document_at_int_of_n_times_1_minus_share_tokens(prepared: Prepare, tmp_path: Path) -> None:
    texts = ["x", *(chr(97 + number) * number for number in range(2, 26))]
    write(tmp_path / "a.bin", stream_of(texts))
    result = prepared("{train: {tokens: a.bin}, validation: {tail: 10%}, sequence_length: 4}")
    cuts = [int(len(text) * (1 - 0.1)) for text in texts]
    assert texts_of(result.train) == [text[:at] for text, at in zip(texts, cuts, strict=True) if at]
    assert texts_of(result.validation) == [text[at:] for text, at in zip(texts, cuts, strict=True)]


def test_repetitions_are_left_out_over_files_and_of_the_validation_sources(prepared: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.bin", stream_of(["one", "two", "one", "held out"]))
    write(tmp_path / "b.npy", stream_of(["two", "three"]), "int64")
    write(tmp_path / "val.bin", stream_of(["held out"]))
    data = "{train: [{tokens: a.bin}, {tokens: b.npy}], validation: {tokens: val.bin}, sequence_length: 2%s}"
    result = prepared(data % ", deduplicate: exact")
    assert [each.count(EOS) for each in streams(result.train)] == [2, 1]
    assert texts_of(result.train) == ["one", "two", "three"]
    assert texts_of(result.validation) == ["held out"]
    assert (result.report["dropped"], result.report["duplicates"]) == ({"duplicate": 3}, 3)
    kept = prepared(data % "")
    assert (kept.train.documents, kept.report["duplicates"]) == (6, 3)


def test_repetitions_follow_the_tokenizer_after_a_job_that_was_stopped(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "zero", tiny.byte_tokenizer())
    content = json.loads((tmp_path / "zero" / "tokenizer_config.json").read_text())
    shutil.copytree(tmp_path / "zero", tmp_path / "one")
    (tmp_path / "one" / "tokenizer_config.json").write_text(
        json.dumps(content | {"eos_token": tiny.PAD, "pad_token": tiny.END})
    )
    write(tmp_path / "a.bin", [40, 0, 41, 1, 40, 0, 41, 1, 42, 0, 43])
    data = "{train: {tokens: a.bin}, validation: 0, deduplicate: exact, sequence_length: 2}"
    wanted = [streams(prepared(data, tokenizer=f"{{from: {name}}}").train) for name in ("zero", "one")]
    cache = Path(os.environ["GPTCLI_CACHE"])
    for folder in (cache / "data").iterdir():
        shutil.rmtree(folder)

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gptcli.data.tokenize.encode", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(data, tokenizer="{from: zero}")
    assert [streams(prepared(data, tokenizer=f"{{from: {name}}}").train) for name in ("one", "zero")] == wanted[::-1]


def test_tokens_and_texts_mix_with_weights(prepared: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.bin", stream_of(["tokens " * 20, "more"]))
    (tmp_path / "b.txt").write_text("a text that is read " * 10)
    data = (
        "{train: [{tokens: a.bin, weight: 3}, {path: b.txt, weight: 1}], validation: 0, deduplicate: exact,"
        " sequence_length: 8}"
    )
    result = prepared(data)
    assert [source["name"] for source in result.report["train"]["sources"]] == ["a.bin", "b.txt"]
    assert [source["weight"] for source in result.report["train"]["sources"]] == [0.75, 0.25]
    rows = TrainingRows(result.train, sequence_length=8, seed=1, shuffle=False, weights=[3, 1])
    sources = [rows.row_id(number).split()[0] for number in range(8)]
    assert (sources.count("a.bin"), sources.count("b.txt")) == (6, 2)


def test_training_reads_its_rows_from_tokens_made_before(prepared: Prepare, tmp_path: Path) -> None:
    ids = stream_of(TEXTS * 3)
    write(tmp_path / "a.bin", ids)
    shards = prepared("{train: {tokens: a.bin}, validation: 0, sequence_length: 8}", "tokenize.shard_tokens=50").train
    rows = TrainingRows(shards, sequence_length=8, seed=7, shuffle=True)
    count = (len(ids) - 1) // 8
    assert rows.rows_per_epoch == count
    found = rows.batch(np.arange(2 * count))
    expected = sorted(ids[begin : begin + 9] for begin in range(0, count * 8, 8))
    assert sorted(found[:count].tolist()) == sorted(found[count:].tolist()) == expected
    assert rows.row_id(0).startswith("a.bin tokens ")


def test_the_key_is_the_content_of_the_files_and_not_where_they_lie(prepared: Prepare, tmp_path: Path) -> None:
    data = "{train: {tokens: %s}, validation: 0, sequence_length: 4}"
    path = write(tmp_path / "a.bin", stream_of(TEXTS))
    first = prepared(data % "a.bin")
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(path, tmp_path / "elsewhere" / "b.bin"))
    again = prepared(data % "elsewhere/b.bin")
    assert again.reused and again.fingerprint == first.fingerprint
    ids = stream_of(TEXTS)
    ids[3] += 1
    write(moved, ids)
    os.utime(moved, (1_600_000_001, 1_600_000_001))
    changed = prepared(data % "elsewhere/b.bin")
    assert not changed.reused and changed.fingerprint != first.fingerprint
    assert streams(changed.train) == [ids]
    assert not prepared(data % "elsewhere/b.bin, dtype: uint16, limit: 1").reused


def test_the_same_bytes_as_a_bin_and_as_a_npy_are_not_the_same_data(prepared: Prepare, tmp_path: Path) -> None:
    # The bytes of a .npy's header are no tokens of a tokenizer with 65,536 entries or more alone.
    train_bpe(["a"], tmp_path / "tok", vocab_size=258, pattern="gpt4")
    content = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"filler {index}": index for index in range(258, 65_536)}
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(content))
    ids = list(range(40, 80))
    shutil.copyfile(write(tmp_path / "a.npy", ids), tmp_path / "b.bin")
    data = "{train: {tokens: %s}, validation: 0, sequence_length: 4}"
    assert streams(prepared(data % "a.npy", tokenizer="{from: tok}").train) == [[*ids, 0]]
    found = streams(prepared(data % "b.bin", tokenizer="{from: tok}").train)[0]
    assert found == [*np.fromfile(tmp_path / "a.npy", dtype="<u2").tolist(), 0]


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def make_faulty(folder: Path) -> None:
    write(folder / "good.bin", stream_of(TEXTS))
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "six.bin").write_bytes(b"abcdef")
    (folder / "empty.bin").write_bytes(b"")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "tokens.txt").write_text("1 2 3")
    np.save(folder / "none.npy", np.empty(0, dtype=np.uint16))
    np.save(folder / "float.npy", np.ones(3))
    np.save(folder / "square.npy", np.ones((2, 2), dtype=np.uint16))
    np.save(folder / "bool.npy", np.ones(3, dtype=bool))
    np.save(folder / "objects.npy", np.array([Bomb(folder / "exploded")], dtype=object), allow_pickle=True)
    (folder / "pickle.npy").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    np.savez(folder / "zip", ids=np.ones(3, dtype=np.uint16))
    (folder / "zip.npz").rename(folder / "zip.npy")
    np.save(folder / "short.npy", np.ones(300, dtype=np.uint16))
    (folder / "short.npy").write_bytes((folder / "short.npy").read_bytes()[:-10])
    (folder / "header.npy").write_bytes((folder / "none.npy").read_bytes().replace(b"}", b"("))
    (folder / "folder").mkdir()
    (folder / "a.bin").mkdir()
    write(folder / "high.bin", [65, EOS, 66, 258, EOS])
    write(folder / "negative.npy", [65, EOS, 66, EOS, -1, 67, EOS], "int64")


@pytest.mark.parametrize(
    ("source", "what", "where", "remedy"),
    [
        ("tokens: nothing.bin", "there is no file", "recipe.yaml", "path"),
        ("tokens: '*.tokens'", "there is no file", "recipe.yaml", "path"),
        ("tokens: tokens.txt", "no file of tokens", "recipe.yaml", ".bin"),
        ("tokens: folder", "no token shards", "recipe.yaml", "gptcli tokenize"),
        ("tokens: 'a.bi*'", "no file of tokens", "recipe.yaml", ".bin"),
        ("tokens: odd.bin", "multiple", "odd.bin", "dtype"),
        ("{tokens: six.bin, dtype: uint32}", "multiple", "six.bin", "dtype"),
        ("tokens: empty.bin", "no documents", "recipe.yaml", "text"),
        ("tokens: empty.npy", "no file of tokens", "empty.npy", ".npy"),
        ("tokens: none.npy", "no documents", "recipe.yaml", "text"),
        ("tokens: float.npy", "float64", "float.npy", ".npy"),
        ("tokens: square.npy", r"\(2, 2\)", "square.npy", ".npy"),
        ("tokens: bool.npy", "bool", "bool.npy", ".npy"),
        ("tokens: objects.npy", "no file of tokens", "objects.npy", ".npy"),
        ("tokens: pickle.npy", "no file of tokens", "pickle.npy", ".npy"),
        ("tokens: zip.npy", "no file of tokens", "zip.npy", ".npy"),
        ("tokens: short.npy", "no file of tokens", "short.npy", ".npy"),
        ("tokens: header.npy", "no file of tokens", "header.npy", ".npy"),
        ("tokens: high.bin", "token 258 is none of the tokenizer's 258", "high.bin:2", "tokenizer.from"),
        ("tokens: negative.npy", "token -1 is none", "negative.npy:3", "tokenizer.from"),
    ],
)
def test_what_holds_no_tokens_is_code_3_with_its_place_and_a_remedy(
    prepared: Prepare, tmp_path: Path, source: str, what: str, where: str, remedy: str
) -> None:
    make_faulty(tmp_path)
    source = source if source.startswith("{") else f"{{{source}}}"
    with pytest.raises(DataError, match=what) as caught:
        prepared(f"{{train: {source}, validation: 0, sequence_length: 2}}")
    assert caught.value.exit_code == 3
    assert re.search(re.escape(where) + "(:2)?$", str(caught.value.where))
    assert remedy in str(caught.value.remedy)
    assert len(caught.value.lines()) <= 8
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["nothing.bin", "folder", "empty.bin"])
def test_the_line_of_a_source_of_tokens_is_named(prepared: Prepare, tmp_path: Path, name: str) -> None:
    make_faulty(tmp_path)
    with pytest.raises(DataError) as caught:
        prepared(f"{{train: {{tokens: {name}}}, validation: 0, sequence_length: 2}}")
    assert str(caught.value.where).endswith("recipe.yaml:2")


@pytest.mark.parametrize(
    ("source", "tokenizer", "what"),
    [
        ("{tokens: good.bin}", "{train: {vocab_size: 300}}", "cannot be trained on tokens"),
        ("[{tokens: good.bin}, {path: tokens.txt}]", "{train: {vocab_size: 300}}", "cannot be trained on tokens"),
        ("{tokens: good.bin, text: body}", "{train: {algorithm: bytes}}", "text belongs to path"),
        ("{tokens: good.bin, documents: line}", "{train: {algorithm: bytes}}", "documents belongs to path"),
        ("{path: tokens.txt, dtype: uint32}", "{train: {algorithm: bytes}}", "dtype belongs to tokens"),
        ("{tokens: good.bin, dtype: uint8}", "{train: {algorithm: bytes}}", "dtype"),
        ("{tokens: good.bin, path: tokens.txt}", "{train: {algorithm: bytes}}", "exclude each other"),
    ],
)
def test_what_a_recipe_cannot_ask_of_tokens_is_code_2_with_its_line(
    prepared: Prepare, tmp_path: Path, source: str, tokenizer: str, what: str
) -> None:
    make_faulty(tmp_path)
    with pytest.raises(GptcliError) as caught:
        prepared(f"{{train: {source}, validation: 0, sequence_length: 2}}", tokenizer=tokenizer)
    assert caught.value.exit_code == 2
    text = "\n".join(caught.value.lines())
    assert what in text and "recipe.yaml:" in text


def test_shards_of_another_tokenizer_are_refused(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    made = prepared("{train: a.txt, validation: 0, sequence_length: 4}")
    train_bpe(TEXTS, tmp_path / "tok", vocab_size=258, pattern="gpt4")
    data = f"{{train: {{tokens: {made.train.folder.parent}}}, validation: 0, sequence_length: 4}}"
    with pytest.raises(DataError, match="another tokenizer") as caught:
        prepared(data, tokenizer="{from: tok}")
    assert caught.value.exit_code == 3
    assert "tokenizer: {from: ...}" in str(caught.value.remedy)
    assert "recipe.yaml" in str(caught.value.where)


@pytest.mark.parametrize("part", ["tokens", "manifest"])
def test_a_damaged_folder_of_shards_is_code_3(prepared: Prepare, tmp_path: Path, part: str) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    made = prepared("{train: a.txt, validation: 0, sequence_length: 4}")
    shutil.copytree(made.train.folder.parent, tmp_path / "copy")
    path = next((tmp_path / "copy" / "train").glob(f"*{part}*"))
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        prepared("{train: {tokens: copy}, validation: 0, sequence_length: 4}")
    assert caught.value.exit_code == 3
    assert caught.value.where == str(path)


def test_a_file_of_tokens_in_both_train_and_validation_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        write(tmp_path / name, stream_of(TEXTS))
    with pytest.raises(GptcliError, match=r"a\.bin is in both") as caught:
        prepared("{train: {tokens: '*.bin'}, validation: {tokens: a.bin}, sequence_length: 4}")
    assert caught.value.exit_code == 2
