"""A prompt with images and sounds: its ids, in which placeholders stand for them, and the media themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, check_places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader


class MediaPrompt(list[int]):
    """The ids of a prompt, as prompts are everywhere, with `media`: what its placeholders stand for, in their order."""

    def __init__(self, ids: Iterable[int], media: Sequence[Medium]) -> None:
        super().__init__(ids)
        self.media = tuple(media)


def media_prompt(
    reader: MediaReader, tokenizer: PreTrainedTokenizerBase, text: str, media: Sequence[Medium]
) -> MediaPrompt:
    """The prompt of a text that has a place (see `data.media.item`) for each of its media.

    Raises:
        MediaFault: one cannot be used, or there are more places than media, or fewer.
        UsageError: as `encode_prompt`.
    """
    from gptcli.generation.text import encode_prompt

    if (wrong := check_places(text, media)) is not None:
        raise MediaFault("the prompt", "not media", wrong)
    return MediaPrompt(encode_prompt(tokenizer, reader.filled(text, iter(reader.texts(media)))), media)
