"""`gptcli generate --image FILE --audio FILE --video FILE`: what stands beside a prompt, and its model's reader."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from gptcli.data.media.item import Medium, Modality
    from gptcli.data.media.reader import MediaReader
    from gptcli.generation.media_prompt import MediaPrompt

_option = partial(typer.Option, rich_help_panel="Images, sounds, videos")

Image = Annotated[
    list[str] | None,
    _option("--image", metavar="FILE", help="A picture, in the place of {image} in the prompt, else before it."),
]
Audio = Annotated[list[str] | None, _option("--audio", metavar="FILE", help="A sound, for {audio}.")]
Video = Annotated[list[str] | None, _option("--video", metavar="FILE", help="A video, for {video}.")]
AllowUrls = Annotated[bool, _option("--allow-urls", help="They may be http and https addresses too.")]


def given_media(
    image: list[str] | None, audio: list[str] | None, video: list[str] | None, *, allow_urls: bool
) -> list[Medium]:
    """The media that a command names: images, sounds, videos, each in their order.

    Raises:
        DataError: a name is none of a file, or of a URL without --allow-urls.
    """
    named: dict[Modality, list[str] | None] = {"image": image, "audio": audio, "video": video}
    if not any(named.values()):
        return []
    from gptcli.data.media.item import media_in
    from gptcli.data.media.reference import Reach
    from gptcli.generation.media_prompt import media_errors

    reach = Reach(Path.cwd(), allow_outside=True, allow_urls=allow_urls, urls_by="--allow-urls is given")
    with media_errors():
        return [each for kind, names in named.items() for name in names or () for each in media_in(name, kind, reach)]


def reader_for(folder: Path, kinds: Iterable[Modality]) -> MediaReader:
    """What reads media of these kinds for a model.

    Raises:
        UsageError: the model does not read them.
        MissingError, CheckpointError: as `model_reader`.
    """
    from gptcli.generation.media_prompt import check_reads, model_reader

    reader = model_reader(folder)
    every = [check_reads(reader, folder, kind) for kind in kinds]
    return every[0]


def prompts_with(
    reader: MediaReader, tokenizer: PreTrainedTokenizerBase, prompts: list[str], media: list[Medium]
) -> list[MediaPrompt]:
    """Prompts that all of the media belong to, each.

    Raises:
        UsageError: a prompt has more places than there are media, or fewer.
        DataError: one cannot be used.
    """
    from gptcli.generation.media_prompt import fetched_once, media_errors, media_prompt, placed

    with media_errors():
        media = [fetched_once(medium) for medium in media]
        return [media_prompt(reader, tokenizer, *placed(prompt, media)) for prompt in prompts]


def check_texts(folder: Path, prompts: list[str]) -> None:
    """Refuse prompts without media that a model of media would look for some in.

    Raises:
        UsageError: a prompt has a place for one.
        DataError: it holds the token by which the model knows one.
    """
    from gptcli.errors import MissingError, UsageError
    from gptcli.generation.media_prompt import media_errors, model_reader

    try:
        reader = model_reader(folder)
    except MissingError:  # without its processor it still takes texts
        return
    if reader is None:
        return
    for prompt in prompts:
        for modality in reader.tokens:
            if f"{{{modality}}}" in prompt:
                raise UsageError(
                    f"the prompt has a place {{{modality}}}, and no {modality} is given",
                    remedy=f"Give --{modality} FILE.",
                )
        with media_errors():
            reader.filled(prompt, iter(()))
