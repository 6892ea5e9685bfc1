"""What a model carries with it in generation_config.json, so that whoever loads it generates as its recipe does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.item import Modality

# Of a recipe's `generate`: those that transformers has under the same names.
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
OTHERS = ("repetition_penalty", "no_repeat_ngram_size", "num_beams", "max_new_tokens")


def carry(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    written: Mapping[str, Any] | None,
    media: Mapping[Modality, str] | None = None,
) -> None:
    """Give a model that is to be saved its end tokens, those of a chat's turns too, and its recipe's sampling.

    Args:
        model: the model.
        tokenizer: its tokenizer, whose chat template says how a turn ends.
        written: the keys of the recipe's `generate` that are written in it; None: it has no such section.
        media: as for `stop_at_end_of_turn`.
    """
    stop_at_end_of_turn(model, tokenizer, media)
    if not written:
        return
    config: Any = model.generation_config
    drawn = written.get("temperature") != 0 and written.get("num_beams", 1) == 1
    for name in (*SAMPLING, *OTHERS) if drawn else OTHERS:
        if written.get(name) is not None:
            setattr(config, name, written[name])
    config.do_sample = drawn
    config._from_model_config = False  # else transformers may make it anew from config.json


def stop_at_end_of_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, media: Mapping[Modality, str] | None = None
) -> None:
    """Let the token with which the chat template ends an answer end the model's too, beside its own.

    `media`: the placeholders of a model that reads some.
    """
    from gptcli.data.templater import end_of_turn

    if tokens := end_of_turn(tokenizer, media):
        own: Any = model.generation_config.eos_token_id
        named = own if isinstance(own, list) else [] if own is None else [own]
        model.generation_config.eos_token_id = [*named, *(token for token in tokens if token not in named)]
