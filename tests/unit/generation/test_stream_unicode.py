"""What is streamed, joined, is the decoded whole: 10,000 random Unicode strings by every kind of decoder."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gptcli.data.tokenizer import load_fast
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.generation.stream import TextStream
from gptcli.generation.text import _decode
from tests.conftest import shared_data
from tests.tiny import byte_tokenizer, fallback_tokenizer, wrapped

STRINGS = 10_000
TEXTS = [
    "Hello world, don't say it 's over.",
    "世界，你好！春江潮水连海平，海上明月共潮生。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇳🇫🇷 1️⃣ 🧑🏿‍🚀",
    "שלום עולם \u200fمرحبا\u200e بالعالم \u202eabc\u202c",
    "ไทย हिन्दी 한국어 각 é é ẹ̀́ Z̴̛",
    "x\ufffdy \ufffd\ufffd",
    "▁ĠĊ ▁▁ ## <0x41> </w>",
    " \t\n  \r\n\x00\x1b\x7f\x85",
]
Decode = Callable[[list[int]], str]


def several_scripts() -> Tokenizer:
    """Byte-level BPE with entries that end in the middle of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 20, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    assert any(tokenizer.decode([token]).endswith("\ufffd") for token in range(256, tokenizer.get_vocab_size()))
    return tokenizer


def unigram(*, byte_fallback: bool) -> Tokenizer:
    """As T5's and Llama's: a space is a part of the word behind it, and the first one of a text is none."""
    fallback = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)] if byte_fallback else []
    letters = [(letter, -3.0) for letter in "helowrdctasnm,.世界é"]
    words = [("▁", -2.0), ("▁▁", -2.5), ("▁he", -2.0), ("llo", -2.0)]
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), *fallback, *letters, *words], unk_id=0, byte_fallback=byte_fallback)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    space = decoders.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), space]) if byte_fallback else space
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's: a space before each entry without ##, and none before a point."""
    letters = sorted({letter for text in TEXTS for letter in text if letter.strip()})
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "hello", "##ing", "do", "n't", "'s"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def word_ends() -> Tokenizer:
    """As the first GPT's: a word's last entry has a mark, which is a space only before another word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    return load_fast(import_tokenizer(str(shared_data("gpt2_tokenizer"))))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "bytes, several scripts": several_scripts,
    "byte fallback": fallback_tokenizer,
    "unigram with byte fallback": functools.partial(unigram, byte_fallback=True),
    "unigram": functools.partial(unigram, byte_fallback=False),
    "word pieces": word_piece,
    "ends of words": word_ends,
    "GPT-2": gpt2,
}


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Texts of 1 to 6 parts: of all planes, of controls and marks, and of what is hard in the scripts above."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 6)):
            begin, kind = draw.randrange(1 << 16), draw.random()
            if kind < 0.5:
                text = draw.choice(TEXTS)
                parts.append(text[begin % len(text) :][: draw.randint(1, 6)])
            else:
                first, last = ((0, 0x250), (0x250, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))[int(kind * 8) - 4]
                parts.append(chr(draw.randint(first, last)))
        yield "".join(parts)


def streamed(decode: Decode, prompt: list[int], ids: list[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(decode, prompt, stop)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == stream.text
    return pieces


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the stop string that is whole first, character by character."""
    for end in range(len(text) + 1):
        whole = [len(one) for one in stop if text[:end].endswith(one)]
        if whole:
            return text[: end - max(whole)]
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_10_000_random_unicode_strings_stream_to_the_decoded_whole(kind: str) -> None:
    tokenizer = KINDS[kind]()
    compared = pieces_shown = 0
    prompts = random_texts(1, STRINGS)
    for number, (prompt, text) in enumerate(zip(prompts, random_texts(0, STRINGS), strict=True)):
        before = tokenizer.encode(prompt, add_special_tokens=False).ids if number % 2 else []
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        begun, whole = tokenizer.decode(before), tokenizer.decode(before + ids)
        assert whole.startswith(begun)
        pieces = streamed(tokenizer.decode, before, ids)
        assert "".join(pieces) == whole[len(begun) :], (prompt, text)
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces), (prompt, text)
        compared += bool(ids)
        pieces_shown += sum(map(bool, pieces[:-1]))
    assert compared > 0.9 * STRINGS and pieces_shown > 2 * STRINGS, "streamed, not held to the end"


@pytest.mark.parametrize("kind", ["bytes, several scripts", "byte fallback", "word pieces"])
def test_stop_strings_cut_at_the_first_that_is_whole_wherever_pieces_end(kind: str) -> None:
    tokenizer = KINDS[kind]()
    draw = random.Random(2)
    cuts = 0
    for text in random_texts(3, 2_000):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.decode(ids)
        stop = []
        for _ in range(draw.randint(1, 3) if whole else 0):  # of the text, of which all but the end may be left out
            begin = draw.randrange(len(whole))
            stop.append(whole[begin : begin + draw.randint(1, 5)] + draw.choice(["", "", "x"]))
        pieces = streamed(tokenizer.decode, [], ids, stop)
        assert "".join(pieces) == cut(whole, stop), (text, stop)
        cuts += cut(whole, stop) != whole
    assert 500 < cuts < 2_000


def test_what_transformers_decodes_streams_to_its_whole() -> None:
    for raw in (byte_tokenizer(), fallback_tokenizer(), word_piece()):
        tokenizer = wrapped(raw)
        tokenizer.clean_up_tokenization_spaces = True  # which would change what has been shown
        for text in random_texts(4, 200):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert "".join(streamed(lambda ids: _decode(tokenizer, ids), [], ids)) == _decode(tokenizer, ids)  # noqa: B023


def test_chinese_poems_stream_character_by_character() -> None:
    poems = shared_data("chinese_poetry").joinpath("valid.txt").read_text(encoding="utf-8")[:20_000]
    tokenizer = gpt2()
    ids = tokenizer.encode(poems, add_special_tokens=False).ids
    pieces = streamed(tokenizer.decode, [], ids)
    assert "".join(pieces) == poems
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 0.8 * len(poems), "no character waits for the next one"


@pytest.mark.parametrize("joined", ["👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "각", "🇨🇳"])
def test_what_is_seen_as_one_character_comes_in_whole_characters_and_waits_for_no_other(joined: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(joined, add_special_tokens=False).ids
    stream = TextStream(tokenizer.decode)
    assert [piece for token in ids if (piece := stream.push(token))] == list(joined)
    assert stream.finish() == ""


def test_bytes_that_are_no_text_are_shown_soon_and_as_the_whole() -> None:
    tokenizer = several_scripts()
    parts = [token for token in range(tokenizer.get_vocab_size()) if "\ufffd" in tokenizer.decode([token])]
    inner = [token for token in parts if not tokenizer.decode([token]).strip("\ufffd")]
    draw = random.Random(5)
    for _ in range(2_000):
        ids = [draw.choice(inner if draw.random() < 0.9 else parts) for _ in range(draw.randint(1, 60))]
        pieces = streamed(tokenizer.decode, [], ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        silent = "".join("x" if piece else " " for piece in pieces).split("x")
        assert max(map(len, silent)) <= 24


def test_a_character_that_was_shown_stays_when_a_byte_behind_it_is_none() -> None:
    tokenizer = fallback_tokenizer()
    ids = tokenizer.encode("世", add_special_tokens=False).ids
    broken = [*ids, tokenizer.token_to_id("<0xFF>")]
    assert tokenizer.decode(broken).strip().strip("\ufffd") == "", "the decoder takes it back"
    assert "".join(streamed(tokenizer.decode, [], broken)) == "世\ufffd"


def test_work_a_token_does_not_grow_where_no_text_comes() -> None:
    tokenizer = byte_tokenizer()
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(tokenizer.decode(ids))

    for token in (0, tokenizer.token_to_id("ÿ")):  # a special token, and a byte that UTF-8 does not have
        decoded = 0
        streamed(decode, [], [token] * 5_000)
        assert decoded < 200 * 5_000
