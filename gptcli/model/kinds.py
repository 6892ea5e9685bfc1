"""Which of transformers' kinds a model is of: text alone, text with images and sounds, or one that is refused.

transformers' own mappings say so; no family is named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def is_multimodal(model_type: str) -> bool:
    """Whether a `model_type` is a language model that reads images, sounds or videos too, and has a processor."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    return model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and model_type in PROCESSOR_MAPPING_NAMES


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' auto class that makes and loads the language model of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if is_multimodal(config.model_type) else AutoModelForCausalLM


def why_not_a_decoder(config: PreTrainedConfig) -> str | None:
    """Why a model of images or sounds cannot be used: it is an encoder-decoder; None for all others."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    kind = config.model_type
    divided = any(getattr(part, "is_encoder_decoder", False) is True for part in (config, *parts_of(config).values()))
    if divided and (is_multimodal(kind) or kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
        return (
            f"{kind} is an encoder-decoder: an encoder reads the whole input and a decoder answers, "
            "where a causal model continues one sequence of tokens"
        )
    return None


def parts_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The configurations inside a configuration, by the names of their fields: text_config, vision_config, ..."""
    from transformers import PreTrainedConfig

    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in inner.items() if isinstance(part, PreTrainedConfig)}


def text_part(config: PreTrainedConfig) -> str | None:
    """The field that holds the configuration of the text model; None where the configuration itself is that."""
    text = config.get_text_config(decoder=True)
    return next((name for name, part in parts_of(config).items() if part is text), None)
