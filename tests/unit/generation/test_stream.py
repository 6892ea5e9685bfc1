from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gptcli.generation.stream import TextStream
from tests.tiny import byte_tokenizer, fallback_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer(), "byte fallback": fallback_tokenizer()}
SCRIPTS = [
    "hello world",
    " 世界，你好！",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽",
    "שלום עולם مرحبا بالعالم",
    "ไทย हिन्दी 한국어 é é",
    "tail \ufffd in the middle \ufffd",
]


def streamed(tokenizer: Tokenizer, prompt: str, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    whole = tokenizer.encode(prompt + text, add_special_tokens=False).ids
    ids = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else None
    if ids is None:
        prompt_ids, ids = [], whole
    stream = TextStream(tokenizer.decode, prompt_ids, stop)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", SCRIPTS)
def test_no_piece_breaks_a_character_and_all_join_to_the_text(name: str, text: str) -> None:
    pieces, stream = streamed(TOKENIZERS[name], "", text)
    assert "".join(pieces) == stream.text
    assert stream.text == TOKENIZERS[name].decode(TOKENIZERS[name].encode(text, add_special_tokens=False).ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 1, "streamed, not held to the end"


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_unicode_string_streams_to_itself(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces, stream = streamed(tokenizer, "", text)
    assert "".join(pieces) == stream.text == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(2, 257), max_size=60))
def test_any_bytes_stream_to_what_the_whole_decodes_to(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    stream = TextStream(tokenizer.decode)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(3, 270), max_size=40))
def test_invalid_runs_of_fallback_bytes_never_lose_what_was_shown(ids: list[int]) -> None:
    stream = TextStream(TOKENIZERS["byte fallback"].decode)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == stream.text


def test_the_space_before_the_first_word_is_kept_when_a_prompt_came_before() -> None:
    _, stream = streamed(TOKENIZERS["byte fallback"], "hello", " world")
    assert stream.text == " world"


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    pieces, stream = streamed(TOKENIZERS["bytes"], "", "the cat END of it", stop=("END", "never"))
    assert stream.stopped
    assert "".join(pieces) == stream.text == "the cat "


def test_the_beginning_of_a_stop_string_is_shown_once_it_turns_out_to_be_none() -> None:
    pieces, stream = streamed(TOKENIZERS["bytes"], "", "the EN", stop=("END",))
    assert not stream.stopped
    assert "".join(pieces) == "the EN"
    assert pieces[-1] == "EN"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    _, stream = streamed(TOKENIZERS["bytes"], "", "a bb c", stop=("c", "bb", "b c"))
    assert stream.text == "a "


def test_nothing_follows_a_stop() -> None:
    stream = TextStream(TOKENIZERS["bytes"].decode, stop=("a",))
    a = TOKENIZERS["bytes"].encode("a", add_special_tokens=False).ids[0]
    assert stream.push(a) == "" and stream.stopped
    assert stream.push(a) == "" and stream.finish() == ""
