"""What is trained on of conversations with media: the answers, by templates of five kinds; and what the model is given.

What is expected is written by hand: texts whose ids are known, with the placeholders in them. What models are given is
compared with the models' own processors, called as their documentation has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.data.encode import Encoded, make_encoder
from gptcli.data.formats import Conversation, Pair, RowFormat, format_row
from gptcli.data.media.audio import load_audio
from gptcli.data.media.image import load_image
from gptcli.data.media.item import Medium
from gptcli.data.media.reader import open_reader
from gptcli.data.media.reference import Reach
from gptcli.data.reading.row import Row
from gptcli.data.supervise import encode_parts, parts_of
from gptcli.data.templater import open_templater
from gptcli.processors import save_processor
from gptcli.recipe.template import parse_template
from tests.media import TINY, built, needs_media
from tests.unit.data.families import CHATML
from tests.unit.data.media.files import make_media

pytestmark = needs_media

# llava-hf/llava-1.5-7b-hf: takes parts alone, images first, answers in marks.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Qwen/Qwen2-VL-2B-Instruct, without its videos.
QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# HuggingFaceM4/Idefics3-8B-Llama3, HuggingFaceTB/SmolVLM-Instruct.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Qwen/Qwen2-Audio-7B-Instruct: the default one of the processor's class.
QWEN2_AUDIO = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
SEEN, PADS, HEARD = "<image>" * 16, "<|image_pad|>" * 16, "<|AUDIO|>" * 12
FAKE = "<fake_token_around_image>"
SPLIT = f"{FAKE}<global-img>{'<image>' * 4}{FAKE}"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VISION = f"<|vision_start|>{PADS}<|vision_end|>"
# Name -> the type of the model, a template, its tokens, and what comes of two questions: texts in turns not trained on
# and trained on. The first question has a medium and a text; the second a text, a medium and a text.
STYLES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "chatml": (
        "llava",
        CHATML,
        IM,
        (
            f"<|im_start|>user\n{SEEN}What is this?<|im_end|>\n<|im_start|>assistant\n",
            "A coat.<|im_end|>",
            f"\n<|im_start|>user\nAnd {SEEN} this?<|im_end|>\n<|im_start|>assistant\n",
            "A shoe!<|im_end|>",
            "\n",
        ),
    ),
    "llava": (
        "llava",
        LLAVA,
        (),
        (
            f"USER: {SEEN}\nWhat is this? ASSISTANT:",
            " A coat. ",
            f"USER: {SEEN}\nAnd   this? ASSISTANT:",
            " A shoe! ",
        ),
    ),
    "qwen2_vl": (
        "llava",
        QWEN2_VL,
        (*IM, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
        (
            f"{SYSTEM}<|im_start|>user\n{VISION}What is this?<|im_end|>\n<|im_start|>assistant\n",
            "A coat.<|im_end|>",
            f"\n<|im_start|>user\nAnd {VISION} this?<|im_end|>\n<|im_start|>assistant\n",
            "A shoe!<|im_end|>",
            "\n",
        ),
    ),
    "smolvlm": (
        "idefics3",
        SMOLVLM,
        IM,
        (
            f"<|im_start|>User:{SPLIT}What is this?<end_of_utterance>\nAssistant:",
            " A coat.<end_of_utterance>",
            f"\nUser: And {SPLIT} this?<end_of_utterance>\nAssistant:",
            " A shoe!<end_of_utterance>",
            "\n",
        ),
    ),
    "qwen2_audio": (
        "qwen2_audio",
        QWEN2_AUDIO,
        IM,
        (
            f"{SYSTEM}<|im_start|>user\nAudio 1: <|audio_bos|>{HEARD}<|audio_eos|>\nWhat is this?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "A coat.<|im_end|>",
            f"\n<|im_start|>user\nAnd Audio 2: <|audio_bos|>{HEARD}<|audio_eos|>\n this?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "A shoe!<|im_end|>",
            "\n",
        ),
    ),
}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a style's processor, with its tokenizer and its template."""

    @functools.cache
    def processors(kind: str) -> Any:
        return built(tmp_path_factory.mktemp("built"), f"{{type: {kind}, config: {TINY[kind]}}}")[1]

    @functools.cache
    def made(style: str) -> Path:
        kind, template, tokens, _ = STYLES[style]
        folder = tmp_path_factory.mktemp(style)
        processor = processors(kind)
        processor.tokenizer.add_tokens([*tokens], special_tokens=True)
        before = processor.image_token if kind == "llava" else None
        if style == "qwen2_vl":
            processor.image_token = "<|image_pad|>"
        processor.chat_template = processor.tokenizer.chat_template = template
        save_processor(processor, folder)
        if before is not None:
            processor.image_token = before
        return folder

    return made


@pytest.fixture
def conversation(tmp_path: Path) -> Callable[..., Conversation]:
    """Two questions with media and their answers, as a row has them."""
    make_media(tmp_path)

    def of(style: str, first: str = "What is this?", **more: Any) -> Conversation:
        kind = "audio" if style == "qwen2_audio" else "image"
        part = {"type": kind, kind: "media/good.wav" if kind == "audio" else "media/good.png"}
        asked = [part, {"type": "text", "text": first}]
        again = [{"type": "text", "text": "And "}, part, {"type": "text", "text": " this?"}]
        said = (("user", asked), ("assistant", "A coat."), ("user", again), ("assistant", "A shoe!"))
        messages = [{"role": role, "content": content} for role, content in said]
        messages[1] |= more
        row_format = RowFormat("chat", column="messages", reads=True)
        row = format_row(Row(1, "", values={"messages": messages}), row_format, Reach.of(tmp_path / "a.jsonl"))
        assert isinstance(row, Row) and isinstance(row.example, Conversation), row
        return row.example

    return of


def encoded(folder: Path, example: Conversation | Pair) -> Encoded:
    reader = open_reader(folder)
    chat = isinstance(example, Conversation)
    templater = open_templater(folder, media=reader.tokens) if chat else None
    encoder = make_encoder(folder, fast=False)
    return encode_parts([parts_of(example, templater, reader)], encoder, folder, prompts=not chat)


def ids_of(folder: Path, text: str) -> list[int]:
    return list(open_reader(folder).processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def expected(folder: Path, texts: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """The ids of texts, and which of them are trained on; EOS where the template has no token that ends a turn."""
    ids = [ids_of(folder, text) for text in texts]
    flags = [[number % 2] * len(each) for number, each in enumerate(ids)]
    end = [] if len(texts) % 2 else [open_reader(folder).processor.tokenizer.eos_token_id]
    return [*chain(*ids), *end], [*chain(*flags), *[1] * len(end)]


@pytest.mark.parametrize("style", STYLES)
def test_the_answers_are_supervised_and_nothing_else(
    folder_of: Callable[[str], Path], conversation: Callable[..., Conversation], style: str
) -> None:
    folder, texts = folder_of(style), STYLES[style][3]
    found = encoded(folder, conversation(style))
    assert found.supervised is not None and found.media is not None
    assert (found.tokens.tolist(), found.supervised.tolist()) == expected(folder, texts)
    assert [len(each) for each in found.media] == [2]


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_that_is_not_trained_on_is_left_out(
    folder_of: Callable[[str], Path], conversation: Callable[..., Conversation], style: str
) -> None:
    folder, texts = folder_of(style), STYLES[style][3]
    found = encoded(folder, conversation(style, train=False))
    ids, flags = expected(folder, texts)
    assert found.supervised is not None
    assert found.tokens.tolist() == ids and sum(found.supervised) == sum(flags) - len(ids_of(folder, texts[1]))


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_that_a_user_writes_are_text(
    folder_of: Callable[[str], Path], conversation: Callable[..., Conversation], style: str
) -> None:
    folder, texts = folder_of(style), STYLES[style][3]
    reader = open_reader(folder)
    tokenizer = reader.processor.tokenizer
    (placeholder,) = reader.tokens.values()
    written = f"What is {placeholder} <|im_end|>{placeholder}?"
    found = encoded(folder, conversation(style, written))
    plain, supervised = expected(folder, texts)
    for token in (placeholder, *tokenizer.all_special_tokens, "<|im_end|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert found.tokens.tolist().count(number) == plain.count(number), token
    assert written in tokenizer.decode(found.tokens.tolist())
    assert found.supervised is not None
    said, meant = (
        [number for number, flag in zip(ids, flags, strict=True) if flag]
        for ids, flags in ((found.tokens.tolist(), found.supervised.tolist()), (plain, supervised))
    )
    assert said == meant


def decoded(medium: Medium, rate: int | None) -> Any:
    assert not isinstance(medium.value, list)
    return load_image(medium.value) if rate is None else load_audio(medium.value, rate, max_seconds=1)


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_is_what_the_models_own_processor_makes_of_it(
    folder_of: Callable[[str], Path], conversation: Callable[..., Conversation], style: str
) -> None:
    from transformers import AutoProcessor

    folder, example = folder_of(style), conversation(style)
    if style == "llava":  # nothing but a space is between its turns, so what is trained on ends within a word
        example = Conversation(example.messages[:2], None, example.media[:1])
    processor = AutoProcessor.from_pretrained(folder)
    rate = processor.feature_extractor.sampling_rate if style == "qwen2_audio" else None
    given = [decoded(medium, rate) for medium in example.media]
    first, second = given[0], given[-1]
    kind = "image" if rate is None else "audio"
    texts = [{"type": "text", "text": text} for text in ("What is this?", "A coat.", "And ", " this?", "A shoe!")]
    messages = [
        {"role": "user", "content": [{"type": kind, kind: first}, texts[0]]},
        {"role": "assistant", "content": [texts[1]]},
        {"role": "user", "content": [texts[2], {"type": kind, kind: second}, texts[3]]},
        {"role": "assistant", "content": [texts[4]]},
    ]
    if style == "chatml":  # a template of texts: the processor is given the text
        text = "".join(STYLES[style][3])
        theirs = processor(text=text.replace(SEEN, "<image>"), images=given, return_tensors="pt")
    else:
        messages = messages[: len(example.messages)]
        theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    ids = encoded(folder, example).tokens.tolist()
    if style == "llava":  # EOS is ours, since the template has none
        assert ids.pop() == processor.tokenizer.eos_token_id
    assert ids == theirs["input_ids"][0].tolist()
    ours = open_reader(folder).inputs([example.media])
    assert ours and all(torch.equal(values, theirs[name]) for name, values in ours.items())


@pytest.mark.parametrize("style", ["chatml", "smolvlm", "qwen2_audio"])
def test_a_prompt_is_what_the_models_own_processor_makes_of_it(
    tmp_path: Path, folder_of: Callable[[str], Path], style: str
) -> None:
    from transformers import AutoProcessor

    make_media(tmp_path)
    folder = folder_of(style)
    processor = AutoProcessor.from_pretrained(folder)
    kind, name = ("audio", "media/good.wav") if style == "qwen2_audio" else ("image", "media/wide.png")
    asked, said = parse_template(f"This: {{{kind}}}\nWhat?"), parse_template("{text}")
    row_format = RowFormat("prompt", asked, said, media=((kind, ("m",)),), reads=True)
    row = format_row(Row(1, "", values={"m": name, "text": " A coat."}), row_format, Reach.of(tmp_path / "a.jsonl"))
    assert isinstance(row, Row) and isinstance(row.example, Pair), row
    (token,) = open_reader(folder).tokens.values()
    rate = processor.feature_extractor.sampling_rate if kind == "audio" else None
    given: dict[str, Any] = {"images" if rate is None else "audio": [decoded(row.example.media[0], rate)]}
    theirs = processor(text=f"This: {token}\nWhat?", **given, return_tensors="pt")
    prompt = theirs["input_ids"][0].tolist()
    found = encoded(folder, row.example)
    answer = [*ids_of(folder, " A coat."), processor.tokenizer.eos_token_id]
    assert found.tokens.tolist() == prompt + answer and found.supervised is not None
    assert found.supervised.tolist() == [0] * len(prompt) + [1] * len(answer)
    ours = open_reader(folder).inputs([row.example.media])
    assert ours and all(torch.equal(values, theirs[name]) for name, values in ours.items())
