"""`tokenizer.train`: which texts it sees, and that nothing else decides the result; `tokenizer.from`: done once."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.data import pieces, tokenizer_import, tokenizer_training
from gptcli.data.shards import Shards
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import END_OF_TEXT, PAD, load_fast, train_bpe
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import GptcliError
from tests.conftest import shared_data

Prepare = Callable[..., Prepared]
Saw = Callable[[], list[str]]
BPE = "{train: {vocab_size: 280}}"
WORDS = ["model", "token", "shard", "recipe", "step", "loss", "row", "été", "中文", "batch", "tokens", "steps"]


def sentences(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=8)) + f" {number}." for number in range(count)]


def lines_file(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def tokenizer_bytes(result: Prepared) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in result.tokenizer.iterdir()}


def decoded(shards: Shards | None, tokenizer: Path) -> list[str]:
    assert shards is not None
    loaded = load_fast(tokenizer)
    return [loaded.decode(ids.tolist(), skip_special_tokens=False) for ids, _ in shards.evaluation_documents()]


@pytest.fixture
def saw(monkeypatch: pytest.MonkeyPatch) -> Saw:
    """The texts that the last training was given."""
    seen: list[str] = []

    def spy(texts: Iterable[str], folder: Path, **options: Any) -> int:
        seen[:] = list(texts)
        return train_bpe(seen, folder, **options)

    monkeypatch.setattr(tokenizer_training, "train_bpe", spy)
    return lambda: list(seen)


def test_special_tokens_are_single_ones_within_the_size_and_known_to_transformers(
    prepared: Prepare, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    lines_file(tmp_path / "a.txt", [*sentences(50), "a <tool> in a text [/tool]"])
    chosen = "{train: {vocab_size: 275, special_tokens: ['<tool>', '[/tool]', '中']}}"
    result = prepared("{train: a.txt, documents: line, validation: 0, sequence_length: 4}", tokenizer=chosen)
    fast, auto = load_fast(result.tokenizer), transformers.AutoTokenizer.from_pretrained(str(result.tokenizer))
    assert fast.get_vocab_size() == len(auto) == result.train.vocab_size == 275
    assert [fast.id_to_token(number) for number in range(5)] == [END_OF_TEXT, PAD, "<tool>", "[/tool]", "中"]
    assert set(auto.all_special_tokens) == {END_OF_TEXT, PAD, "<tool>", "[/tool]", "中"}
    listed = json.loads((result.tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert listed["additional_special_tokens"] == ["<tool>", "[/tool]", "中"]
    for text in ("x<tool>y", "<tool><tool>", "[/tool]中文"):
        ids = fast.encode(text).ids
        assert ids == auto(text)["input_ids"]
        assert Counter(ids)[2] == text.count("<tool>") and fast.decode(ids, skip_special_tokens=False) == text
    assert "a <tool> in a text [/tool]" in decoded(result.train, result.tokenizer)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("{vocab_size: 260, special_tokens: ['<a>', '<b>', '<c>']}", "at least 261: 256 bytes and 5 specials"),
        ("{vocab_size: 257}", "at least 258: 256 bytes and 2 specials"),
        ("{algorithm: bytes, special_tokens: ['<a>']}", "no further special_tokens"),
        ("{algorithm: bytes, vocab_size: 300}", "always has vocab_size 258"),
    ],
)
def test_a_size_that_cannot_hold_what_is_asked_is_code_2_with_the_number_needed(
    prepared: Prepare, tmp_path: Path, spec: str, what: str
) -> None:
    lines_file(tmp_path / "a.txt", sentences(50))
    with pytest.raises(GptcliError) as caught:
        prepared("{train: a.txt, validation: 0, sequence_length: 4}", tokenizer=f"{{train: {spec}}}")
    assert caught.value.exit_code == 2
    text = "\n".join(caught.value.lines())
    assert what in text and "recipe.yaml:1" in text


def test_the_tokenizer_is_the_same_whatever_order_files_pieces_and_processes_the_texts_come_in(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sentences(300)
    other = random.Random(1).sample(texts, len(texts))
    lines_file(tmp_path / "one" / "a.txt", texts)
    for number in range(3):
        lines_file(tmp_path / "three" / f"{number}.txt", other[number::3])
    data = "{train: %s, documents: line, validation: %s, sequence_length: 8}"
    for validation in ("10%", "0"):
        first = prepared(data % ("one", validation), tokenizer=BPE)
        second = prepared(data % ("three", validation), tokenizer=BPE)
        assert not second.reused
        assert tokenizer_bytes(first) == tokenizer_bytes(second)
    expected, stream = tokenizer_bytes(second), second.train.streams[0].read(0, second.train.tokens)
    # All of it again in 1 KB pieces, in this process and in two others.
    monkeypatch.setattr(pieces, "SMALLEST", 1_000)
    cache = Path(os.environ["GPTCLI_CACHE"])
    made = {}
    for processes in (1, 2):
        shutil.rmtree(cache / "data")
        shutil.rmtree(cache / "tokenizers")
        again = prepared(data % ("three", "0"), f"tokenize.processes={processes}", tokenizer=BPE)
        assert not again.reused and tokenizer_bytes(again) == expected
        assert np.array_equal(again.train.streams[0].read(0, again.train.tokens), stream)
        made[processes] = {path.name: path.read_bytes() for path in again.train.folder.iterdir()}
    assert len(made[1]) > 30 and made[1] == made[2]


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_the_sample_is_bounded_and_its_choice_does_not_depend_on_order(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saw: Saw, deduplicate: str
) -> None:
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 4_000)
    texts = sentences(400)
    lines_file(tmp_path / "a.txt", texts)
    lines_file(tmp_path / "b.txt", texts[::-1])
    data = "{train: %s, documents: line, validation: 10%%, sequence_length: 8, deduplicate: %s}"
    result = prepared(data % ("a.txt", deduplicate), tokenizer=BPE)
    first = saw()
    # The held-out documents are counted when the buckets are chosen, and then not taken.
    assert 2_500 < sum(len(text.encode()) for text in first) <= 4_000
    assert set(first) < set(decoded(result.train, result.tokenizer))
    again = prepared(data % ("b.txt", deduplicate), tokenizer=BPE)
    assert saw() == first[::-1]
    assert tokenizer_bytes(again) == tokenizer_bytes(result)
    # Texts are chosen by what they are: a larger sample holds a smaller one.
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 8_000)
    prepared(data % ("a.txt", deduplicate), tokenizer=BPE)
    assert set(first) < set(saw())


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["word " * 2_000], ["word " * 200]),
        (["é" * 900 + "x"], ["é" * 500]),
        (["line " * 20] * 40, ["line " * 20] * 10),
        (["line " * 30] * 40, ["line " * 30] * 6 + ["line " * 20]),
    ],
    ids=["one long text", "two-byte characters", "one text many times", "the last one cut"],
)
def test_what_one_bucket_holds_beyond_the_bound_is_cut(
    prepared: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saw: Saw,
    texts: list[str],
    expected: list[str],
) -> None:
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 1_000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared("{train: a.jsonl, validation: 0, sequence_length: 4}", tokenizer="{train: {vocab_size: 258}}")
    assert saw() == expected


def test_only_what_a_share_leaves_for_training_is_seen(prepared: Prepare, tmp_path: Path, saw: Saw) -> None:
    lines_file(tmp_path / "a.txt", sentences(200))
    data = "{train: a.txt, documents: line, validation: 30%, sequence_length: 8}"
    result = prepared(data, tokenizer=BPE)
    assert saw() == decoded(result.train, result.tokenizer)
    held_out = decoded(result.validation, result.tokenizer)
    assert 30 < len(held_out) < 90 and not set(held_out) & set(saw())


def test_only_what_a_tail_leaves_for_training_is_seen(prepared: Prepare, tmp_path: Path, saw: Saw) -> None:
    texts = ["x", *sentences(60)]
    lines_file(tmp_path / "a.txt", texts)
    data = "{train: a.txt, documents: line, validation: {tail: 25%}, sequence_length: 8}"
    result = prepared(data, tokenizer=BPE)
    assert saw() == [text[: int(len(text) * 0.75)] for text in texts[1:]]
    assert decoded(result.validation, result.tokenizer) == [text[int(len(text) * 0.75) :] for text in texts]


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_validation_sources_are_not_seen(prepared: Prepare, tmp_path: Path, saw: Saw, deduplicate: str) -> None:
    texts = sentences(60)
    lines_file(tmp_path / "a.txt", [*texts, "in both"])
    lines_file(tmp_path / "v.txt", ["held out", "in both"])
    data = "{train: a.txt, documents: line, validation: v.txt, sequence_length: 8, deduplicate: %s}"
    prepared(data % deduplicate, tokenizer=BPE)
    assert saw() == (texts if deduplicate == "exact" else [*texts, "in both"])


def test_a_limit_bounds_what_is_seen(prepared: Prepare, tmp_path: Path, saw: Saw) -> None:
    texts = sentences(60)
    lines_file(tmp_path / "a.txt", texts)
    prepared("{train: {path: a.txt, limit: 25, documents: line}, validation: 0, sequence_length: 8}", tokenizer=BPE)
    assert saw() == texts[:25]


def test_a_text_that_is_there_a_thousand_times_counts_once_when_repetitions_are_left_out(
    prepared: Prepare, tmp_path: Path, saw: Saw
) -> None:
    texts = sentences(100)
    lines_file(tmp_path / "a.txt", [*texts, *["zzqq zzqq zzqq"] * 1_000])
    lines_file(tmp_path / "b.txt", [*texts, "zzqq zzqq zzqq"])
    data = "{train: %s, documents: line, validation: 0, sequence_length: 8, deduplicate: %s}"
    often = prepared(data % ("a.txt", "none"), tokenizer=BPE)
    assert Counter(saw())["zzqq zzqq zzqq"] == 1_000
    once = prepared(data % ("a.txt", "exact"), tokenizer=BPE)
    assert saw() == [*texts, "zzqq zzqq zzqq"]
    assert once.report["dropped"] == {"duplicate": 999}
    plain = prepared(data % ("b.txt", "none"), tokenizer=BPE)
    assert tokenizer_bytes(once) == tokenizer_bytes(plain) != tokenizer_bytes(often)


def test_the_same_tokenizer_is_not_imported_twice_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Path] = []
    normalise = tokenizer_import._normalise
    monkeypatch.setattr(
        tokenizer_import, "_normalise", lambda folder, *rest: (done.append(folder), normalise(folder, *rest))[1]
    )
    train_bpe(["a text"], tmp_path / "a", vocab_size=258, pattern="gpt4")
    first = import_tokenizer(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert {import_tokenizer(str(tmp_path / name)) for name in ("a", "moved", "a/tokenizer.json")} == {first}
    assert len(done) == 1
    for name, text in (
        ("chat_template.jinja", "new"),
        ("chat_template.jinja", "newer"),
        ("special_tokens_map.json", "{}"),
    ):
        before = len(done)
        (tmp_path / "a" / name).write_text(text)
        import_tokenizer(str(tmp_path / "a"))
        import_tokenizer(str(tmp_path / "a"))
        assert len(done) == before + 1
    shutil.rmtree(first)
    assert import_tokenizer(str(tmp_path / "moved")) == first and first.is_dir()
    (tmp_path / "moved" / "README.md").write_text("no part of a tokenizer")
    before = len(done)
    assert import_tokenizer(str(tmp_path / "moved")) == first and len(done) == before


def test_slow_files_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = slow_files(tmp_path)
    done: list[Path] = []
    build = tokenizer_import._gpt2
    monkeypatch.setattr(tokenizer_import, "_gpt2", lambda folder: (done.append(folder), build(folder))[1])
    assert import_tokenizer(str(source)) == import_tokenizer(str(source))
    assert len(done) == 1
    merges = source / "merges.txt"
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    import_tokenizer(str(source))
    assert len(done) == 2


def slow_files(tmp_path: Path) -> Path:
    """GPT-2's files under the names that transformers knows."""
    original = shared_data("gpt2_tokenizer")
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for name, usual in zip(("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), strict=True):
        shutil.copyfile(original / name, folder / usual)
    return folder


def test_gpt2_from_its_slow_files_is_that_of_transformers_on_hostile_texts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = slow_files(tmp_path)
    theirs = transformers.GPT2Tokenizer(str(source / "vocab.json"), str(source / "merges.txt"))
    ours = load_fast(import_tokenizer(str(source)))
    chance = random.Random(3)
    alphabet = " \n\t\r'sStTlLdDmMvVeErR012.,;!?<|>aéÉ中文🙂\u200b\u00a0\u0301\ufeff\0\u2028İßﬀ"
    texts = [
        "",
        " ",
        "\n\n  \n x",
        "it's IT'S 'S ''s '  s",
        END_OF_TEXT,
        f"a{END_OF_TEXT}{END_OF_TEXT} b <|endoftext |>",
        "<|endoftext",
        "e\u0301 é ﬀ ½ ² Ⅷ ٣",
        "👩‍👩‍👧 🇩🇪",
        "\ud7ff\ue000\U0010ffff",
        "a" * 3_000,
        " " * 500 + "x",
        *("".join(chance.choices(alphabet, k=60)) for _ in range(400)),
    ]
    assert [ours.encode(text).ids for text in texts] == [theirs(text)["input_ids"] for text in texts]
    assert all(ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text for text in texts)
