"""A model's processor from nothing: tokenizer, picture and sound readers of the sizes that its configuration has.

Classes come from transformers' mappings, the names of placeholder tokens from the processor itself, sizes from the
fields that configuration and reader share. What no field says (how many tokens a picture becomes) is counted on the
model, and at the end a picture or a sound goes through both: a processor that does not fit its model is refused here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import MissingError, RecipeError, first_line, not_installed
from gptcli.model.composite import token_fields
from gptcli.model.kinds import parts_of
from gptcli.model.load import evaluating, load_tokenizer
from gptcli.processors import fit, process
from gptcli.reporting import quiet

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# The packages of the extra `multimodal` that each part of a processor needs.
_NEEDS = {
    "image_processor": {"PIL": "pillow"},
    "video_processor": {"PIL": "pillow"},
    "feature_extractor": {"soundfile": "soundfile", "soxr": "soxr"},
    "audio_processor": {"soundfile": "soundfile", "soxr": "soxr"},
}
# Sides of a picture, in the mappings that image processors have sizes in.
_SIDES = ("height", "width", "shortest_edge", "longest_edge")
# Fields that an image processor and a configuration share, under the names of both.
_CUTS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "max_image_tiles": "max_num_tiles",
}
# Arguments of processors that say how many tokens a picture becomes, or how many more than its patches.
_COUNTS = ("num_additional_image_tokens", "image_seq_len", "image_seq_length", "num_image_tokens")
_MARKS = re.compile(r"(\w+)_token|(\w+_tag)")
_TEXT_MARKS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
# Mel frames that a whisper-like encoder makes one position of: the stride of its second convolution
# (transformers/models/whisper/modeling_whisper.py).
_FRAMES = 2
_SECONDS = 0.5


def media_tokens(config: PreTrainedConfig) -> dict[str, str]:
    """The special tokens that a model's processor and configuration need, by what they mean.

    {"image": "<image>"} for llava. Where a configuration asks for an id and its processor has no text for it, the token
    is named by the field: `vision_start_token_id` is `<|vision_start|>`.

    Raises:
        MissingError: a package is not installed that the processor needs.
        RecipeError: this processor works with no tokenizer but its own.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # Knows no word, which is enough to ask a processor for its tokens.
    plain = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), unk_token="?", pad_token="?"
    )
    found: dict[str, str] = {}
    for name, text in vars(_assemble(config, plain)).items():
        match = _MARKS.fullmatch(name)
        if match and isinstance(text, str) and match[1] not in _TEXT_MARKS:
            found[match[1] or match[2]] = text
    for meaning in _meanings(config):
        found.setdefault(meaning, f"<|{meaning}|>")
    return found


def media_ids(tokens: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of `media_tokens` in a tokenizer, for `TokenIds`. Raises `RecipeError` for one that it lacks."""
    vocabulary = tokenizer.get_vocab()
    if absent := [text for text in tokens.values() if text not in vocabulary]:
        raise RecipeError(
            f"the tokenizer has no {', '.join(absent)}, which stand for images and sounds",
            remedy="Train one with the model (tokenizer: {train: {...}}), or take the model's own.",
        )
    return {meaning: int(vocabulary[text]) for meaning, text in tokens.items()}


def build_processor(config: PreTrainedConfig, tokenizer: Path, model: PreTrainedModel) -> ProcessorMixin:
    """The processor of a model with the tokenizer of a folder, checked on a picture and a sound.

    Args:
        config: the model's configuration, with the ids of the media tokens.
        tokenizer: a folder that AutoTokenizer loads and that has the `media_tokens`.
        model: of that configuration; what it holds does not matter.

    Raises:
        MissingError: a package is not installed that the processor needs.
        RecipeError: processor and model do not fit: with their reason.
    """
    loaded = load_tokenizer(tokenizer)
    processor = _assemble(config, loaded)
    try:
        fit(processor, config)
    except Exception as error:  # whatever its tower raises for sizes that do not go together
        raise _unfit(config, first_line(error)) from error
    image = getattr(processor, "image_token", None)
    if image is not None and hasattr(processor, "image_processor"):
        inputs = _processed(config, processor, [image], images=[_picture(config)])
        wanted, made = _features(model, inputs), int((inputs["input_ids"] == processor.image_token_id).sum())
        argument = next((name for name in _COUNTS if name in _arguments(type(processor))), None)
        if argument is not None and wanted is not None and wanted != made:
            before = getattr(processor, argument)
            processor = _assemble(config, loaded, **{argument: before + wanted - made})
    check_processor(processor, model)
    return processor  # type: ignore[no-any-return]


def check_processor(processor: ProcessorMixin, model: PreTrainedModel) -> None:
    """Put a picture and a sound, as far as a processor knows them, through it and its model.

    Raises:
        RecipeError: it does not take them with a text, or makes another number of tokens than the model has features.
    """
    import torch

    for modality, read in (("image", "image_processor"), ("audio", "feature_extractor")):
        token = getattr(processor, f"{modality}_token", None)
        if token is None or not hasattr(processor, read):
            continue
        if modality == "image":
            given: dict[str, Any] = {"images": [_picture(model.config)]}
        else:
            rate = int(processor.feature_extractor.sampling_rate)
            given = {"audio": [_sound(rate)], "sampling_rate": rate}
        inputs = _processed(model.config, processor, [token], **given)
        try:
            with torch.no_grad(), evaluating(model), quiet():
                model(**inputs.to(model.device))
        except Exception as error:  # each type says in its own way that tokens and features are not as many
            raise _unfit(model.config, first_line(error)) from error


def _assemble(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **counts: int) -> Any:
    """The processor that transformers has for a configuration, of readers with its sizes."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = PROCESSOR_MAPPING[type(config)]
    arguments = _arguments(kind)
    given: dict[str, Any] = {
        name: value for name in arguments if (value := _field(config, name)) is not None and name != "chat_template"
    }
    if "chat_template" in arguments:
        given["chat_template"] = tokenizer.chat_template
    try:
        with quiet():
            parts = {name: _part(config, name, tokenizer) for name in kind.get_attributes()}  # type: ignore[attr-defined]
            return kind(**(given | parts | counts))  # type: ignore[operator]
    except (MissingError, RecipeError):
        raise
    except Exception as error:  # each processor has its own way of not working with another's tokenizer
        raise _unfit(config, first_line(error)) from error


def _part(config: PreTrainedConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    if name == "tokenizer":
        return tokenizer
    _check_packages(config, name)
    if name == "image_processor":
        made = _class(config, IMAGE_PROCESSOR_MAPPING_NAMES, "pil")
        return made(**_picture_sizes(config, made))
    if name == "video_processor":
        made = _class(config, VIDEO_PROCESSOR_MAPPING_NAMES, "torchvision")
        return made(**_picture_sizes(config, made))
    if name in ("feature_extractor", "audio_processor"):
        made = _class(config, FEATURE_EXTRACTOR_MAPPING_NAMES)
        return made(**_sound_sizes(config, made))
    raise _unfit(config, f"its processor has a {name}")


def _class(config: PreTrainedConfig, names: Mapping[str, Any], backend: str | None = None) -> Any:
    """The class that a mapping names for a configuration, else for a part of it."""
    import transformers

    for part in (config, *parts_of(config).values()):
        name = names.get(part.model_type)
        if isinstance(name, Mapping):
            name = name.get(backend) or next(iter(name.values()))
        if name is not None:
            return getattr(transformers, name)
    raise _unfit(config, "transformers names no reader for it")


def _check_packages(config: PreTrainedConfig, part: str) -> None:
    import importlib.util

    for module, package in _NEEDS.get(part, {}).items():
        if importlib.util.find_spec(module) is None:
            raise not_installed(f"the {part.replace('_', ' ')} of {config.model_type}", package, "multimodal")
    if part == "video_processor" and importlib.util.find_spec("torchvision") is None:
        # In no extra of ours: one of another build than torch (CPU, CUDA) keeps transformers from being imported.
        raise MissingError(
            f"{config.model_type} reads videos too, for which transformers needs torchvision, which is not installed",
            remedy="Install it from where torch came from (pytorch.org names the command), in the build of that torch.",
        )


def _picture_sizes(config: PreTrainedConfig, made: Any) -> dict[str, Any]:
    """Arguments of an image processor by which its pictures are what the configuration's tower takes."""
    sizes: dict[str, Any] = {}
    for own, theirs in _CUTS.items():
        default, value = getattr(made, own, None), side_of(_field(config, theirs))
        if default is not None and value is not None:
            sizes[own] = dict.fromkeys(default, value) if isinstance(default, Mapping) else value
    side = side_of(_field(config, "image_size"))
    patch = getattr(made, "patch_size", None)
    for name in ("size", "crop_size", "max_image_size"):
        default = getattr(made, name, None)
        if not isinstance(default, Mapping):
            continue
        if side is not None:
            sizes[name] = {key: side if key in _SIDES else value for key, value in default.items()}
        elif isinstance(patch, int) and "patch_size" in sizes:
            # A tower of any size: the bounds are areas in pixels, which stay as many patches.
            sizes[name] = {key: value * sizes["patch_size"] ** 2 // patch**2 for key, value in default.items()}
    return sizes


def _sound_sizes(config: PreTrainedConfig, made: Any) -> dict[str, Any]:
    """Arguments of a feature extractor by which its frames are what the configuration's tower takes."""
    arguments = _arguments(made)
    sizes: dict[str, Any] = {}
    if "feature_size" in arguments and (bins := _field(config, "num_mel_bins")):
        sizes["feature_size"] = bins
    positions = _field(config, "max_source_positions")
    if positions and {"chunk_length", "hop_length", "sampling_rate"} <= arguments.keys():
        samples = positions * _FRAMES * arguments["hop_length"].default
        seconds, rest = divmod(samples, arguments["sampling_rate"].default)
        if rest or not seconds:
            step = arguments["sampling_rate"].default // (_FRAMES * arguments["hop_length"].default)
            raise RecipeError(
                f"max_source_positions: {positions} is no whole number of seconds, which sounds are padded to",
                remedy=f"Take a multiple of {step}: that many positions are a second.",
            )
        sizes["chunk_length"] = seconds
    return sizes


def _field(config: PreTrainedConfig, name: str) -> Any:
    """The value of a field of a configuration, else of a part of it other than the text's."""
    text = config.get_text_config(decoder=True)
    parts = [part for part in parts_of(config).values() if part is not text]
    values = (getattr(part, name, None) for part in (config, *parts))
    return next((value for value in values if value is not None), None)


def side_of(value: Any) -> int | None:
    """A side as one number: towers have squares as a number or as both sides."""
    if isinstance(value, list | tuple) and value and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) else None


def _arguments(made: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(made.__init__).parameters)


def _meanings(config: PreTrainedConfig) -> set[str]:
    return {meaning for part in (config, *parts_of(config).values()) for meaning in token_fields(part).values()}


def _processed(config: PreTrainedConfig, processor: Any, text: list[str], **given: Any) -> Any:
    try:
        return process(processor, text, return_tensors="pt", **given)
    except Exception as error:  # as above
        raise _unfit(config, first_line(error)) from error


def _features(model: Any, inputs: Any) -> int | None:
    """How many embeddings the model makes of a picture; None for one that does not have them among its tokens."""
    import torch

    find = getattr(model, "get_image_features", None)
    if find is None:
        return None
    texts = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    try:
        with torch.no_grad(), evaluating(model), quiet():
            found = find(**{name: value for name, value in inputs.items() if name not in texts})
    except Exception:  # `check_processor` tells what is wrong with what the model is given
        return None
    found = getattr(found, "pooler_output", found)
    tensors = list(found) if isinstance(found, list | tuple) else [found]
    width = model.config.get_text_config().hidden_size
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)) // width  # type: ignore[no-any-return]


def _picture(config: PreTrainedConfig) -> Image:
    """A picture that is nowhere even: some models leave out what is black as padding."""
    import numpy as np
    from PIL.Image import fromarray

    side = side_of(_field(config, "image_size")) or 56
    ramp = np.linspace(0, 255, side, dtype=np.float64)
    return fromarray(np.stack([np.add.outer(ramp, ramp) / 2] * 3, axis=-1).astype(np.uint8))


def _sound(rate: int) -> np.ndarray:
    """Half a second of a tone."""
    import numpy as np

    return np.sin(np.arange(int(rate * _SECONDS)) * 0.05).astype(np.float32)  # type: ignore[no-any-return]


def _unfit(config: PreTrainedConfig, reason: str) -> RecipeError:
    return RecipeError(
        f"model.type: {config.model_type} cannot be built from nothing with a tokenizer of one's own: {reason[:300]}",
        remedy="Take one that is known to work: llava, idefics3, qwen2_audio, voxtral, or mllama with the sizes of the "
        "recipe multimodal/caption-cross.",
    )
