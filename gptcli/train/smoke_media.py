"""Pictures and sounds that `--smoke` makes for rows that hold some, and the tiny model that reads them.

The files are really written and really read: what is cut is their size (28 x 28 pixels, a quarter of a second).
"""

from __future__ import annotations

import functools
import importlib.util
import random
import shutil
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import not_installed
from gptcli.recipe.presets import MEDIA_PRESETS

if TYPE_CHECKING:
    from gptcli.data.media.item import Modality
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.template import Template
    from gptcli.reporting import Reporter

SIDE, FRAMES = 28, 2
RATE, SECONDS = 16_000, 0.25
SMALL = 5_000_000


def media_columns(loaded: LoadedRecipe, template: Template, folder: Path, seed: int) -> dict[str, Any]:
    """The values of a row's columns of media, as many in each as the template has places for: files in `folder`."""
    data = loaded.recipe.data
    used = [column for _, column in template.pieces if column is not None]
    row: dict[str, Any] = {}
    for modality, columns in () if data is None else data.media:
        unnamed = [column for column in columns if column not in used]
        for column in columns:
            count = used.count(column) or 1
            if column in unnamed[:1]:  # of the places of the kind, those that the other columns leave
                count = max(1, used.count(modality) - len(unnamed) + 1)
            made = [medium_file(modality, folder, f"{column}-{seed}-{number}") for number in range(count)]
            row[column] = made[0] if count == 1 else made
    return row


def medium_file(modality: Modality, folder: Path, name: str) -> Any:
    """What a column holds for a picture or a sound (of a video: its frames) that is written into `folder`.

    Raises:
        MissingError: Pillow is not installed.
    """
    if modality == "video":
        return [[medium_file("image", folder, f"{name}-{frame}") for frame in range(FRAMES)]]
    path = folder / "media" / f"{name.replace('/', '_')}.{'png' if modality == 'image' else 'wav'}"
    path.parent.mkdir(exist_ok=True)
    (_write_picture if modality == "image" else _write_sound)(path, random.Random(name))
    return str(path.relative_to(folder))


def _write_picture(path: Path, draw: random.Random) -> None:
    if importlib.util.find_spec("PIL") is None:
        raise not_installed("reading images", "pillow", "multimodal")
    from PIL import Image

    Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE * SIDE)).save(path)


def _write_sound(path: Path, draw: random.Random) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(draw.randbytes(2 * int(RATE * SECONDS)))


def media_parts(modalities: Sequence[Modality], folder: Path, seed: int) -> list[dict[str, Any]]:
    """The parts of a message that bring one medium of each kind with them."""
    parts: list[dict[str, Any]] = []
    for modality in modalities:
        value = medium_file(modality, folder, f"{modality}-{seed}")
        parts.append({"type": modality, modality: value[0] if modality == "video" else value})
    return parts


@functools.cache
def read_by(model_type: str) -> tuple[Modality, ...]:
    """The kinds of media that the processor of a type reads; none for a model of text alone.

    Raises:
        MissingError: a package is not installed that the processor needs (torchvision, where it reads videos).
    """
    from transformers import AutoConfig

    from gptcli.data.media.item import MODALITIES
    from gptcli.model.kinds import is_multimodal
    from gptcli.model.processor import media_tokens

    if not is_multimodal(model_type):
        return ()
    tokens = media_tokens(AutoConfig.for_model(model_type))
    return tuple(modality for modality in MODALITIES if modality in tokens)


def tiny_media(model_type: str) -> dict[str, Any]:
    """The section `model` of a small one of a type that sees or hears."""
    from transformers import AutoConfig

    from gptcli.model.composite import media_preset

    return {"type": model_type, "preset": media_preset(AutoConfig.for_model(model_type)) or next(iter(MEDIA_PRESETS))}


def is_small(loaded: LoadedRecipe, vocabulary: int) -> bool:
    """Whether a recipe's own model that sees or hears is small enough for a toy."""
    from gptcli.model.build import TokenIds, build_config, count_parameters

    config, _ = build_config(loaded, TokenIds(vocabulary, 0, 0, 0))
    return count_parameters(config).total <= SMALL


def save_with_processor(toy: LoadedRecipe, folder: Path, reporter: Reporter) -> Path:
    """A Hugging Face folder of the toy's model, with random weights, its tokenizer and its processor."""
    from gptcli.data.tokenize import prepare
    from gptcli.model.build import build_model
    from gptcli.model.media import media_model
    from gptcli.reporting import quiet
    from gptcli.train.assemble import model_config

    prepared = prepare(toy, reporter, media=media_model(toy))
    config, _ = model_config(toy, prepared, reporter)
    shutil.copytree(prepared.tokenizer, folder)
    with quiet():
        build_model(toy, config, seed=toy.recipe.seed, attention=None).save_pretrained(folder)
    return folder
