"""Prompts with images and sounds: the texts of transformers' own `generate`, alone and together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, place_of
from gptcli.data.media.reader import reader_of
from gptcli.errors import DataError, UsageError
from gptcli.generation.chat import Chat, messages, read_saved, saved
from gptcli.generation.file_prompts import form_of
from gptcli.generation.media_prompt import (
    MediaPrompt,
    check_reads,
    media_prompt,
    placed,
    positions_by_media,
    shown_prompt,
)
from gptcli.generation.noise import sequence_key
from gptcli.generation.served_media import Sees, checked
from gptcli.generation.settings import Settings
from gptcli.generation.text import complete_batch, encode_prompt
from gptcli.generation.window import media_ids, window
from gptcli.processors import process
from tests.media import needs_media, picture, png, random_built, sound

GREEDY = Settings(max_new_tokens=8, greedy=True)
IMAGE = place_of("image")
# As models of pictures bring them: contents are texts, or parts.
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A model, its tokenizer with a template of parts, and its reader."""
    model, processor = random_built(tmp_path_factory.mktemp("llava"), "llava", template=PARTS)
    return model, processor.tokenizer, reader_of(processor)


def by_transformers(model: Any, processor: Any, text: str, media: Sequence[Medium], **how: Any) -> str:
    """The text that transformers' `generate` makes of what the processor makes of text and media."""
    reader = reader_of(processor)
    given: dict[str, Any] = {}
    if media and media[0].modality == "image":
        given = {"images": [[reader.load(medium) for medium in media]]}
    elif media:
        given = {"audio": [reader.load(medium) for medium in media], "sampling_rate": reader.rate}
    for modality, token in reader.tokens.items():
        text = text.replace(place_of(modality), token)
    inputs = process(processor, [text], return_tensors="pt", **given)
    inputs.pop("token_type_ids", None)
    size = inputs["input_ids"].shape[1]
    made = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=[0], pad_token_id=0, use_cache=True, **how
    )
    return str(processor.tokenizer.decode(made[0, size:], skip_special_tokens=True))


@needs_media
@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_audio", "voxtral", "mllama"])
def test_texts_are_those_of_transformers_alone_and_together(tmp_path: Path, kind: str) -> None:
    model, processor = random_built(tmp_path, kind)
    tokenizer, reader = processor.tokenizer, reader_of(processor)
    hears = "audio" in reader.tokens
    place = place_of("audio" if hears else "image")
    make: Any = sound if hears else picture
    given = [
        (f"{place}\na shoe", [make(1)]),
        ("two coats", []),
        (f"a {place} and {place}, a long text of a shoe and more", [make(2), make(3)]),
        (f"{place}x", [make(4)]),
    ]
    given = [(f"{tokenizer.bos_token}{text}", media) for text, media in given]  # which mllama's processor would add
    prompts = [media_prompt(reader, tokenizer, text, media) for text, media in given]
    wanted = [by_transformers(model, processor, text, media) for text, media in given]
    assert len(set(wanted)) == len(wanted), "the model sees what it is shown"
    together = complete_batch(model, tokenizer, prompts, GREEDY, reader=reader)
    assert [each[0].text for each in together] == wanted
    alone = [complete_batch(model, tokenizer, [prompt], GREEDY, reader=reader)[0][0].text for prompt in prompts]
    assert alone == wanted


@needs_media
@pytest.mark.parametrize(("kind", "make"), [("llava", picture), ("qwen2_audio", sound)])
def test_beams_of_a_prompt_with_several_media_have_them_in_their_order(tmp_path: Path, kind: str, make: Any) -> None:
    model, processor = random_built(tmp_path, kind)
    tokenizer, reader = processor.tokenizer, reader_of(processor)
    media = [make(1), make(2)]
    one = media_prompt(reader, tokenizer, f"{''.join(place_of(each.modality) for each in media)} a", media)
    beams = complete_batch(model, tokenizer, [one], replace(GREEDY, num_beams=3), reader=reader)[0][0].text
    # Beam by beam, by the scores of the model without a past: what beams are.
    assert beams == _searched(model, reader, one, beams=3, steps=8, decode=tokenizer.decode)


def _searched(model: Any, reader: Any, prompt: MediaPrompt, *, beams: int, steps: int, decode: Any) -> str:
    import torch

    media = reader.inputs([prompt.media])
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(steps):
        grown = []
        for score, tokens in found:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), **media).logits[0, -1]
            for token, value in enumerate(torch.log_softmax(logits.float(), -1).tolist()):
                grown.append((score + value, [*tokens, token]))
        grown.sort(key=lambda each: -each[0])
        ended += [(score / len(tokens), tokens[:-1]) for score, tokens in grown[:beams] if tokens[-1] == 0]
        found = [each for each in grown[: 2 * beams] if each[1][-1] != 0][:beams]
    ended += [(score / len(tokens), tokens) for score, tokens in found]
    return str(decode(max(ended)[1], skip_special_tokens=True))


@needs_media
def test_equal_ids_with_other_pictures_draw_anew_and_text_draws_as_ever(llava: tuple[Any, Any, Any]) -> None:
    model, tokenizer, reader = llava
    drawn = Settings(max_new_tokens=8, seed=1, temperature=100.0, top_k=0, top_p=1.0)  # the picture hardly counts
    prompts = [media_prompt(reader, tokenizer, f"{IMAGE} a", [picture(seed)]) for seed in (1, 2, 1)]
    assert prompts[0] == prompts[1]
    first, other, same = (each[0].text for each in complete_batch(model, tokenizer, prompts, drawn, reader=reader))
    assert first == same != other
    assert sequence_key(3, [5, 6], 2) == 15187162526446519697, "of text alone the noise is that of every version"
    assert sequence_key(3, [5, 6], 2, ["a"]) != sequence_key(3, [5, 6], 2)


@needs_media
def test_a_draft_is_refused_for_a_prompt_with_media(llava: tuple[Any, Any, Any]) -> None:
    model, tokenizer, reader = llava
    prompt = media_prompt(reader, tokenizer, f"{IMAGE} a", [picture(1)])
    with pytest.raises(UsageError, match="goes with no images and sounds"):
        complete_batch(model, tokenizer, [prompt], GREEDY, draft=2, reader=reader)


@needs_media
def test_a_picture_that_is_gone_when_it_is_needed_is_an_error_of_the_data(
    llava: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    from gptcli.data.media.reference import Media

    model, tokenizer, reader = llava
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    prompt = media_prompt(reader, tokenizer, f"{IMAGE} a", [Medium("image", Media("a.png", path))])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png does not exist"):
        complete_batch(model, tokenizer, [prompt], GREEDY, reader=reader)


def test_models_that_count_positions_in_pictures_are_known_by_their_code() -> None:
    from transformers import LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration

    assert positions_by_media(Qwen2VLForConditionalGeneration.__new__(Qwen2VLForConditionalGeneration))
    assert not positions_by_media(LlavaForConditionalGeneration.__new__(LlavaForConditionalGeneration))


@needs_media
@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("hello", "[image picture 1]\n[image picture 2]\n[audio sound 3]\nhello"),
        ("{image} or {image}?", "[audio sound 3]\n[image picture 1] or [image picture 2]?"),
        ("{audio}: {image} {image} {x}", "[audio sound 3]: [image picture 1] [image picture 2] {x}"),
    ],
)
def test_media_stand_where_the_prompt_says_else_in_front(prompt: str, wanted: str) -> None:
    assert shown_prompt(*placed(prompt, [picture(1), picture(2), sound(3)])) == wanted


def test_a_prompt_without_media_is_as_it_is_and_too_many_places_are_told() -> None:
    assert placed("an {image}", []) == ("an {image}", [])
    with pytest.raises(UsageError, match=r"has 2 places \{image\}, and the images are 1"):
        placed("{image} {image}", [Medium("image", [])])
    with pytest.raises(UsageError, match=r"has 1 place \{audio\}, and the audios are 0"):
        placed("{audio}", [Medium("image", [])])


def test_what_a_model_does_not_read_is_told_with_its_name() -> None:
    with pytest.raises(UsageError, match="runs/x is a model of text alone: it reads no images"):
        check_reads(None, "runs/x", "image")


# Chats


@needs_media
def test_a_chat_with_pictures_is_seen_as_the_template_has_its_parts(llava: tuple[Any, Any, Any]) -> None:
    _, tokenizer, reader = llava
    chat = Chat(Settings()).answered(f"{IMAGE}what?", "a coat", (picture(1),))
    seen = window(tokenizer, chat, f"{IMAGE}and <image>?", None, media=(picture(2),), reader=reader)
    one = reader.texts([picture(1)])[0]
    ids = [*seen.ids]
    assert isinstance(seen.ids, MediaPrompt) and [medium.name for medium in seen.ids.media] == [
        "picture 1",
        "picture 2",
    ]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text == f"user: {one}what?\nassistant: a coat\nuser: {one}and <image>?\nassistant: "
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == 2 * one.count("<image>"), "what a user writes of it is text"


@needs_media
def test_a_full_context_leaves_out_pictures_with_their_turns(llava: tuple[Any, Any, Any]) -> None:
    _, tokenizer, reader = llava
    chat = Chat(Settings(max_new_tokens=1))
    for seed in range(3):
        chat = chat.answered(f"{IMAGE}{seed}", "yes", (picture(seed),))
    whole = window(tokenizer, chat, "and?", None, reader=reader)
    seen = window(tokenizer, chat, "and?", len(whole.ids), reader=reader)
    assert seen.turns_left_out == 1 and isinstance(seen.ids, MediaPrompt)
    assert [medium.name for medium in seen.ids.media] == ["picture 1", "picture 2"]
    shown = messages("", chat.turns[1:], "and?")
    assert seen.ids == media_ids(tokenizer, shown, reader, [picture(1), picture(2)])


@needs_media
def test_a_base_model_sees_its_text_and_pictures(llava: tuple[Any, Any, Any]) -> None:
    import copy

    _, tokenizer, reader = llava
    base = copy.copy(tokenizer)
    base.chat_template = None
    chat = Chat(Settings()).answered(f"{IMAGE}\na", " shoe", (picture(1),))
    seen = window(base, chat, "b", None, reader=reader)
    one = reader.texts([picture(1)])[0]
    assert seen.ids == encode_prompt(base, f"{one}\na shoe\nb") and len(seen.ids.media) == 1  # type: ignore[attr-defined]


@needs_media
def test_a_saved_chat_names_its_pictures_and_comes_back(tmp_path: Path) -> None:
    from gptcli.data.media.item import media_in
    from gptcli.data.media.reference import Reach

    (tmp_path / "a.png").write_bytes(png(1))
    media = media_in("a.png", "image", Reach(tmp_path.resolve()))
    chat = Chat(Settings()).answered(f"{IMAGE}what?", "a coat", tuple(media)).answered("sure?", "yes")
    value = saved(chat, "m")
    assert value["messages"][0]["content"] == [
        {"type": "image", "path": str(tmp_path.resolve() / "a.png")},
        {"type": "text", "text": "what?"},
    ]
    value["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": "a.png"}}  # as others write it
    (tmp_path / "chat.json").write_text(json.dumps(value))
    again = read_saved(tmp_path / "chat.json", Settings())
    assert [(turn.said, turn.answer) for turn in again.turns] == [(turn.said, turn.answer) for turn in chat.turns]
    assert [medium.value.source for turn in again.turns for medium in turn.media] == [media[0].value.source]  # type: ignore[union-attr]
    value["messages"][1]["content"] = [{"type": "image", "path": "a.png"}]
    (tmp_path / "chat.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="its media are not those of what the user said"):
        read_saved(tmp_path / "chat.json", Settings())


# Files


def test_a_template_has_a_place_for_every_column_of_media() -> None:
    form = form_of(None, "{image} is {label}", {"image": ["a", "b"]})
    assert form.column == "label" and form.media == (("image", ("a", "b")),)
    assert form_of(None, "{a}?", {"image": ["a"]}).column == "a"
    with pytest.raises(UsageError, match="--image-column b has no place in the template"):
        form_of(None, "{a} is {label}", {"image": ["a", "b"]})
    with pytest.raises(UsageError, match="exclude each other"):
        form_of("text", "{label}", {})


def test_the_name_of_a_kind_stands_for_its_columns_that_are_not_named(tmp_path: Path) -> None:
    from gptcli.data.media.reference import Reach

    form = form_of(None, "{b} {image} {label}", {"image": ["a", "b"]})
    text, media = form.filled({"label": 3, "a": "1.png", "b": "2.png"}, Reach(tmp_path))
    assert text == f"{IMAGE} {IMAGE} 3" and [medium.name for medium in media] == ["2.png", "1.png"]


# The server


@needs_media
def test_the_server_gives_the_model_what_a_chat_does(llava: tuple[Any, Any, Any]) -> None:
    import base64

    model, tokenizer, reader = llava
    sees = Sees(model, tokenizer, reader, allow_urls=False)
    url = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]
    convert = checked(lambda messages, modality: [dict(each) for each in messages], reader)
    made = sees.apply_chat_template(convert(asked, None), add_generation_prompt=True)
    assert made["input_ids"][0].tolist() == media_ids(tokenizer, messages("", [], f"{IMAGE}a"), reader, [picture(1)])
    assert "pixel_values" in made
    for wrong, says in (
        ("/etc/hosts", "files of the server are not read"),
        ("http://127.0.0.1/a.png", "not fetched unless the server is started with --allow-urls"),
        ("data:image/png;base64,aGVsbG8=", "is not an image"),
    ):
        part["image_url"]["url"] = wrong
        with pytest.raises(ValueError, match=says):
            sees.apply_chat_template(convert(asked, None))
    with pytest.raises(ValueError, match="this model reads no audios"):
        convert([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}], None)
    with pytest.raises(ValueError, match="this model reads no images"):
        checked(lambda messages, modality: messages, None)(asked, None)


def test_a_fault_of_a_medium_is_no_error_of_the_program() -> None:
    from gptcli.generation.media_prompt import media_errors

    with pytest.raises(DataError, match="x is not an image") as caught, media_errors("in.jsonl:3"):
        raise MediaFault("x", "not media", "is not an image")
    assert caught.value.where == "in.jsonl:3"
