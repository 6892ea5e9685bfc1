"""A prompt with images and sounds: its ids, in which placeholders stand for them, and the media themselves."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.fetch import fetched
from gptcli.data.media.item import MODALITIES, PLACE, Medium, Modality, check_places, hashed, place_of, shown_media
from gptcli.data.media.reference import Media, Url
from gptcli.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def placed(prompt: str, media: Sequence[Medium]) -> tuple[str, list[Medium]]:
    """A prompt as a command has it, with the places of its media, and these in their order.

    Where it says `{image}`, the next image stands, and so for `{audio}` and `{video}`. Media of a kind that it has no
    place for stand in front, with a line break behind each.

    Raises:
        UsageError: there are more places of a kind than media, or fewer.
    """
    if not media:
        return prompt, []
    front: list[Medium] = []
    waiting: dict[str, Iterator[Medium]] = {}
    for modality in MODALITIES:
        given = [medium for medium in media if medium.modality == modality]
        places = prompt.count(f"{{{modality}}}")
        if not places:
            front += given
        elif places != len(given):
            count = f"{places} place{'s' * (places > 1)}"
            raise UsageError(
                f"the prompt has {count} {{{modality}}}, and the {modality}s are {len(given)}",
                remedy=f"Give --{modality} once for each of them.",
            )
        waiting[modality] = iter(given)
    inside: list[Medium] = []

    def place(found: re.Match[str]) -> str:
        inside.append(next(waiting[found[1]]))
        return place_of(inside[-1].modality)

    text = re.sub("{(image|audio|video)}", place, prompt)
    return "".join(f"{place_of(medium.modality)}\n" for medium in front) + text, [*front, *inside]


def shown_prompt(prompt: str, media: Sequence[Medium]) -> str:
    """A text with places as people see it: `[image cat.png]` stands in each."""
    names = iter(media)
    return PLACE.sub(lambda _: f"[{shown_media([next(names)])}]", prompt)


def media_of(prompt: Sequence[int]) -> tuple[Medium, ...]:
    """The images and sounds of a prompt."""
    return prompt.media if isinstance(prompt, MediaPrompt) else ()


def fetched_once(medium: Medium) -> Medium:
    """A medium with what is behind its URL, which is then fetched no more. Raises `MediaFault` where it cannot be."""
    value = medium.value
    if isinstance(value, list) or not isinstance(value.source, Url):
        return medium
    return Medium(medium.modality, Media(value.name, fetched(value.source.address, value.name)), medium.hash)


def media_hashes(prompt: Sequence[int]) -> list[str]:
    """The hashes of the content of a prompt's media. Raises `MediaFault` where one cannot be read."""
    return [medium.hash or hashed(medium).hash for medium in media_of(prompt)]


def media_inputs(
    model: PreTrainedModel, reader: MediaReader, prompts: Sequence[Sequence[int]], ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a model takes beside the ids, [n, T], of prompts that have media, on its device and in its precision.

    Raises:
        MediaFault: one cannot be read any more.
    """
    made = reader.inputs([media_of(prompt) for prompt in prompts], ids)
    if made:
        made |= reader.beside(ids)
    return {
        name: values.to(model.device, model.dtype if values.is_floating_point() else values.dtype)
        for name, values in made.items()
    }


def positions_by_media(model: PreTrainedModel) -> bool:
    """Whether a model's code counts positions by its media (in height and width), and not by the tokens alone."""
    from transformers import GenerationMixin

    name = "_prepare_position_ids_for_generation"
    return getattr(type(model), name, None) is not getattr(GenerationMixin, name)


def model_reader(folder: Path) -> MediaReader | None:
    """The reader of a model's images and sounds, from its folder, its base's if it is an adapter, or the Hub.

    None: the model is one of text alone.

    Raises:
        MissingError, CheckpointError: as `load_config` and `load_processor`; among these, no processor is there.
    """
    from gptcli.data.media.reader import open_reader
    from gptcli.model.load import processor_home

    home = processor_home(folder)
    return None if home is None else open_reader(home)


def check_reads(reader: MediaReader | None, model: Path | str, kind: Modality) -> MediaReader:
    """The reader, if there is one and it reads media of a kind. Raises `UsageError` that names the model."""
    if reader is None:
        raise UsageError(f"{model} is a model of text alone: it reads no {kind}s")
    if kind not in reader.tokens:
        raise UsageError(f"{model} reads no {kind}s, only {' and '.join(f'{each}s' for each in reader.tokens)}")
    return reader


def size_of(reader: MediaReader, medium: Medium) -> str:
    """How large a medium is, as people see it: `28 x 28`, `1.2 s`. Raises `MediaFault` where it cannot be read."""
    loaded = reader.load(medium)
    if medium.modality == "image":
        return f"{loaded.width} x {loaded.height}"
    return f"{len(loaded)} frames" if medium.modality == "video" else f"{len(loaded) / reader.rate:.1f} s"


@contextlib.contextmanager
def media_errors(where: str | None = None, remedy: str | None = None) -> Iterator[None]:
    """Inside, what is wrong with an image or a sound is an error of the data."""
    try:
        yield
    except MediaFault as fault:
        raise DataError(str(fault), where=where, remedy=remedy) from None
