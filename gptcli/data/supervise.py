"""Examples -> tokens, and which of them are to be predicted: a completion and its EOS, or the assistant's turns.

A prompt and what follows it are tokenized apart, as `generate` will see them, so no token is on both sides. A text in
which a tokenizer would put something at the beginning (as sentencepiece's do) is encoded behind what stands before it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gptcli.data.encode import Encoded, Encoder, utf8_size
from gptcli.data.formats import Conversation, Pair
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, check_places, hashed
from gptcli.data.media.reader import MediaReader, find_reader
from gptcli.data.templater import Rendered, Templater, open_templater
from gptcli.data.tokenizer import load_fast, prompt_beginning
from gptcli.data.turns import supervised

UNSUPERVISED = "no supervised token"
_LINE = "\n"
# What transformers puts around what is meant as text (`mark_control_tokens`).
AS_TEXT = re.compile("[\U000f0000\U000f0001]")
_PROBES = ("ab", " ab", "Ab cd", "1", "é", "(", "字")


@dataclass(frozen=True)
class Parts:
    """The texts that an example is tokenized in, in order; those at odd places are to be predicted.

    `ended`: EOS has to be put at the end, and predicted. `media`: what the placeholders in the texts stand for; None
    where the model reads none. `placeholders`: the bytes of the texts that are these.
    """

    texts: tuple[str, ...]
    ended: bool
    media: tuple[Medium, ...] | None = None
    placeholders: int = 0

    @property
    def is_supervised(self) -> bool:
        """Whether anything is to be predicted."""
        return any(self.texts[1::2])


def parts_of(example: Pair | Conversation, templater: Templater | None, reader: MediaReader | None = None) -> Parts:
    """The parts of an example; `reader`: of its media.

    Raises:
        TemplateFault: the template refuses the conversation.
        MediaFault: an image or a sound cannot be used.
    """
    if isinstance(example, Pair):
        parts = Parts((example.prompt, example.completion), True)
    else:
        assert templater is not None
        rendered = supervised(templater, example.messages, example.tools)
        last = example.messages[-1]
        untrained = last["role"] != "assistant" or not last.get("train", True)
        # A template without a token that ends a turn: a model learns to end from the tokenizer's.
        texts = tuple(map(templater.placed, _cut(rendered, templater)))
        parts = Parts(texts, templater.ending.token is None and not untrained)
    return parts if reader is None else _with_media(parts, example.media, reader)


def _with_media(parts: Parts, media: Sequence[Medium], reader: MediaReader) -> Parts:
    """The parts with what the model's processor has for media in their places."""
    if (wrong := check_places("".join(parts.texts), media)) is not None:
        raise MediaFault("the row", "not media", wrong)
    hashes = [hashed(medium).hash for medium in media]
    read = reader.read(media)
    texts = (text for text, _ in read)
    filled = tuple(reader.filled(text, texts) for text in parts.texts)
    known = (replace(medium, hash=found) for (_, medium), found in zip(read, hashes, strict=True))
    return Parts(filled, parts.ended, tuple(known), sum(utf8_size(text) for text, _ in read))


def _cut(rendered: Rendered, templater: Templater) -> tuple[str, ...]:
    text, at, parts = rendered.text, 0, []
    for begin, end in rendered.spans:
        if templater.eats_space(text, end):  # it stays with its token, which is all that is left of it
            end += len(text[end:]) - len(text[end:].lstrip())
        begin = max(begin, at)
        parts += [text[at:begin], text[begin:end]]
        at = end
    return (*parts, text[at:])


def encode_parts(examples: Sequence[Parts], encoder: Encoder, folder: Path, *, prompts: bool) -> Encoded:
    """The tokens of examples. `prompts`: with what `generate` puts before a prompt, and the completion as it is."""
    texts = [text for example in examples for text in example.texts]
    ids = _plain(texts, encoder) if prompts or continues(folder) else _behind(examples, encoder, folder)
    if not prompts:
        ids = _marked(ids, texts, encoder, folder)
    eos = np.array([encoder.specials.eos], dtype=encoder.dtype)
    arrays: list[NDArray[Any]] = []
    flags: list[int] = []
    lengths: list[int] = []
    at = 0
    for example in examples:
        found = ids[at : at + len(example.texts)]
        at += len(example.texts)
        if prompts:
            first = int(found[0][0]) if len(found[0]) else None
            begin = prompt_beginning(first, encoder.specials)
            if begin is not None:
                found = [np.concatenate([np.array([begin], dtype=encoder.dtype), found[0]]), *found[1:]]
        if example.ended:
            found = [*found, eos]
        marks = [index % 2 for index in range(len(example.texts))] + [1] * example.ended
        arrays += found
        flags += marks
        lengths.append(sum(map(len, found)))
    sizes = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
    none: NDArray[Any] = np.empty(0, dtype=encoder.dtype)
    return Encoded(
        np.concatenate([none, *arrays], dtype=encoder.dtype, casting="unsafe"),
        np.array(lengths, dtype=np.int64),
        np.array([sum(map(_size, example.texts)) - example.placeholders for example in examples], dtype=np.int64),
        np.repeat(np.array(flags, dtype=np.uint8), sizes),
        None if any(example.media is None for example in examples) else [example.media or () for example in examples],
    )


def _size(text: str) -> int:
    return utf8_size(text if text.isascii() else AS_TEXT.sub("", text))


def _marked(ids: list[NDArray[Any]], texts: Sequence[str], encoder: Encoder, folder: Path) -> list[NDArray[Any]]:
    """The ids, those of texts anew in which marks of a template are meant as text (see `Templater.as_text`)."""
    from transformers.utils.chat_template_utils import encode_marked_chat

    return [
        np.array(encode_marked_chat(templater_of(folder).tokenizer, text), dtype=encoder.dtype)
        if AS_TEXT.search(text)
        else each
        for each, text in zip(ids, texts, strict=True)
    ]


def _plain(texts: Sequence[str], encoder: Encoder) -> list[NDArray[Any]]:
    """The ids of each text, encoded alone; long ones in pieces."""
    cut = [encoder.cuts(text) for text in texts]
    found = encoder.pieces([piece for pieces in cut for piece in pieces])
    if len(found) == len(texts):
        return found
    each = iter(found)
    return [np.concatenate([next(each) for _ in pieces]) for pieces in cut]


def _behind(examples: Sequence[Parts], encoder: Encoder, folder: Path) -> list[NDArray[Any]]:
    """The ids of each part as it stands behind the part before it."""
    tokenizer, texts, before = load(folder), [], []
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.content.isspace()]
    for example in examples:
        behind = ""
        for text in example.texts:
            lead = next((token for token in added if behind.endswith(token)), _LINE) if behind and text else ""
            before.append(lead)
            texts.append(lead + text)
            behind = text or behind
    leads = {lead: _ids(tokenizer, lead) for lead in set(before)}
    found = _plain(texts, encoder)
    result = []
    for ids, lead, text in zip(found, before, texts, strict=True):
        count = len(leads[lead])
        if ids[:count].tolist() == leads[lead]:
            result.append(ids[count:])
        else:
            result.append(np.array(_ids(tokenizer, text[len(lead) :]), dtype=encoder.dtype))
    return result


@functools.lru_cache(maxsize=1)
def continues(folder: Path) -> bool:
    """Whether a tokenizer gives a text behind another the ids that it has alone: it puts nothing at a beginning."""
    tokenizer = load(folder)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.rstrip]
    for lead in (_LINE, *added[:1]):
        ids = _ids(tokenizer, lead)
        if any(_ids(tokenizer, lead + text) != ids + _ids(tokenizer, text) for text in _PROBES):
            return False
    return True


@functools.lru_cache(maxsize=1)
def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, read once a process."""
    return load_fast(folder)


@functools.lru_cache(maxsize=1)
def templater_of(folder: Path, where: str | None = None) -> Templater:
    """The chat template of a folder, opened once a process; `where` is for the error that there is none."""
    reader = find_reader(folder)
    return open_templater(folder, where=where, media=None if reader is None else reader.tokens)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
