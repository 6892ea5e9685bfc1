"""The configuration of a model that sees or hears: a text model, towers for images and sounds, and what joins them.

Each part is a configuration of its own and is sized as a text model is (`fields`); a recipe reaches into one by its
name: `config: {text_config: {num_hidden_layers: 2}, vision_config: {patch_size: 4}}`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError
from gptcli.model.fields import (
    bad_config,
    check_fields,
    get,
    model_defaults,
    proportional,
    quietly,
    standard_names,
    text_fields,
)
from gptcli.model.kinds import parts_of, text_part
from gptcli.recipe.presets import MEDIA_PRESETS, PRESETS, MediaPreset, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from gptcli.model.build import TokenIds
    from gptcli.recipe.load import LoadedRecipe

_TOKEN_FIELD = re.compile(r"([a-z]\w*)_token_(?:id|index)")
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEXT_TOKENS = ("bos", "eos", "pad", "decoder_start", "sep", "cls", "unk", "mask", "forced_bos", "forced_eos")


def composite_config(loaded: LoadedRecipe, base: PreTrainedConfig, ids: TokenIds) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration of a type that sees or hears at the recipe's sizes, and a line for each changed default.

    Args:
        loaded: the recipe.
        base: the default configuration of `model.type`.
        ids: with `media`, the ids of the tokens that stand for images and sounds.

    Raises:
        RecipeError: a field that a part does not have, a preset of another kind, values that do not fit.
    """
    model = loaded.recipe.model
    assert model is not None and loaded.recipe.data is not None
    given = dict(model.config or {})
    kind, parts, text = base.model_type, parts_of(base), text_part(base)
    check_fields(loaded, kind, base, given)
    media = MEDIA_PRESETS.get(model.preset or "")
    fields: dict[str, Any] = {}
    notes: list[str] = []
    sized = False
    for name, part in parts.items():
        own = given.pop(name, None) or {}
        place = f"model.config.{name}"
        part_base = _part_base(loaded, part, own, place)
        check_fields(loaded, f"the {name} of {kind} ({part_base.model_type})", part_base, own, place)
        own = standard_names(part_base, {key: value for key, value in own.items() if key != "model_type"})
        shape = _shape(model.preset, media, is_text=name == text)
        if media is not None and name != text and _has(part_base, next(iter(media.sizes))):
            own = {key: value for key, value in media.sizes.items() if _has(part_base, key)} | own
            sized = True
        own = _shaped(part_base, shape) | own
        rest = text_fields(part_base, ids, loaded.recipe.data.sequence_length) if name == text else {}
        rest |= _token_fields(part_base, ids.media) | proportional(part_base, own)
        changes, said = model_defaults(part_base, own)
        notes += [f"{name}: {line}" for line in said]
        fields[name] = _made(loaded, part_base, _kept(base, name, part, part_base) | rest | changes | own)
    if media is not None and not sized:
        raise RecipeError(
            f"model.preset: {model.preset} sets {', '.join(media.sizes)}, and no part of {kind} has these",
            where=loaded.where("model.preset"),
            remedy="vision-1m is for types that see (llava, idefics3), "
            "audio-1m for those that hear (qwen2_audio, voxtral).",
        )
    given = standard_names(base, given)
    whole = _token_fields(base, ids.media)
    if text is None:
        given = _shaped(base, _shape(model.preset, media, is_text=True)) | given
        whole |= text_fields(base, ids, loaded.recipe.data.sequence_length) | proportional(base, given)
    else:  # some types repeat the ids of the text's ends, and theirs are those of a large vocabulary
        ends = text_fields(base, ids, loaded.recipe.data.sequence_length)
        whole |= {key: value for key, value in ends.items() if key in _ENDS and _has(base, key)}
    if media is not None:
        whole |= {key: value for key, value in media.model.items() if _has(base, key)}
    return _made(loaded, base, whole | fields | given), notes


def media_preset(base: PreTrainedConfig) -> str | None:
    """The preset that is for a type, by the fields of its tower; None: none is."""
    text = text_part(base)
    towers = [part for name, part in parts_of(base).items() if name != text]
    fitting = (
        name for name, preset in MEDIA_PRESETS.items() if any(_has(each, next(iter(preset.sizes))) for each in towers)
    )
    return next(fitting, None)


def token_fields(config: PreTrainedConfig) -> dict[str, str]:
    """The fields of a configuration that hold the id of a token for media, with what it stands for.

    {"image_token_index": "image"} for llava.
    """
    found = {field: match[1] for field in config.to_dict() if (match := _TOKEN_FIELD.fullmatch(field))}
    return {field: meaning for field, meaning in found.items() if meaning not in _TEXT_TOKENS}


def _token_fields(base: PreTrainedConfig, media: Mapping[str, int]) -> dict[str, int]:
    return {field: media[meaning] for field, meaning in token_fields(base).items() if meaning in media}


def _shape(preset: str | None, media: MediaPreset | None, *, is_text: bool) -> Shape | None:
    if media is not None:
        return media.text if is_text else media.tower
    return None if preset is None else PRESETS[preset]


def _shaped(base: PreTrainedConfig, shape: Shape | None) -> dict[str, Any]:
    """Depth, width and heads for a part that has all three; others (a codebook, a resampler) keep their sizes."""
    if shape is None:
        return {}
    sizes = vars(shape)
    return dict(sizes) if all(_has(base, field) for field in sizes) else {}


def _has(base: PreTrainedConfig, field: str) -> bool:
    return get(base, field) is not None


def _part_base(loaded: LoadedRecipe, part: PreTrainedConfig, own: Any, place: str) -> PreTrainedConfig:
    """The default configuration of a part: of the type's own kind, or of the `model_type` that the recipe names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(own, dict):
        raise RecipeError(f"{place}: expected fields of a {type(part).__name__}", where=loaded.where(place))
    kind = own.get("model_type", part.model_type)
    if kind == part.model_type:
        return part
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        raise RecipeError(
            f"{place}.model_type: {kind} is unknown to transformers",
            where=loaded.where(f"{place}.model_type"),
            remedy=f"Did you mean {near[0]}?" if near else None,
        )
    return quietly(CONFIG_MAPPING[kind])


def _kept(base: PreTrainedConfig, name: str, part: PreTrainedConfig, part_base: PreTrainedConfig) -> dict[str, Any]:
    """What a type sets of a part of its own kind beside that part's defaults."""
    specification = getattr(base, "sub_configs_defaults", {}).get(name)
    if part_base is not part or specification is None:
        return {}
    return standard_names(part_base, dict(specification.init_kwargs))


def _made(loaded: LoadedRecipe, base: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    try:
        return quietly(type(base), **fields)
    except Exception as error:
        raise bad_config(loaded, error) from error
