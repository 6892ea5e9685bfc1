"""Completions of prompts: what `gptcli generate` prints, what a file job writes, and what training samples are.

A prompt is encoded as training documents were: BOS in front only where the tokenizer's own post-processor puts it.
Nothing here touches the random state of the process, so that sampling in the middle of training changes nothing there,
and a prompt's completions depend on its seed and settings alone, not on the prompts before it or beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gptcli.data.tokenizer import Specials, prompt_beginning
from gptcli.errors import UsageError
from gptcli.generation.media_prompt import MediaPrompt, media_errors, media_hashes, media_of, positions_by_media
from gptcli.generation.noise import sequence_key
from gptcli.generation.row import Completion, Row
from gptcli.generation.settings import Settings
from gptcli.model.load import context_length, evaluating
from gptcli.reporting import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader
    from gptcli.generation.constrain import Constraint
    from gptcli.generation.decode import Budget

# In the longest tokens of published vocabularies, which are 128 spaces.
MOST_CHARACTERS = 200


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    settings: Settings,
    *,
    on_text: Callable[[str], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    draft: PreTrainedModel | int | None = None,
    constraint: Constraint | None = None,
    reader: MediaReader | None = None,
) -> list[Completion]:
    """Complete a prompt `settings.num_return_sequences` times.

    Args:
        model: left in the mode in which it was.
        tokenizer: the model's.
        prompt: a text, or its ids, a `MediaPrompt` among them.
        settings: how.
        on_text: gets the text of a single completion piece by piece, as soon as it is certain; with several, nothing.
        on_warning: gets a line when the context leaves less room than was wanted.
        draft: a smaller model that proposes tokens, or how many to look up in the prompt; the text stays the same.
        constraint: what the text must be.
        reader: of the prompt's images and sounds, where it has some.

    Raises:
        UsageError: the settings make no sense, or the prompt leaves no room in the model's context.
        DataError: an image or a sound cannot be read any more.
    """
    ids = prompt_ids(model, tokenizer, prompt)
    most = room(model, len(ids), settings.max_new_tokens)
    if most < settings.max_new_tokens and on_warning is not None:
        on_warning(
            f"at most {most} new tokens: the prompt has {len(ids)} and the model's context is {context_length(model)}"
        )
    beside: dict[str, Any] = {"draft": draft, "constraint": constraint, "reader": reader}
    return complete_batch(model, tokenizer, [ids], settings, on_text=on_text, **beside)[0]


def complete_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: Settings,
    *,
    budget: Budget | None = None,
    on_text: Callable[[str], None] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    draft: PreTrainedModel | int | None = None,
    constraint: Constraint | None = None,
    reader: MediaReader | None = None,
) -> list[list[Completion]]:
    """Complete many prompts, given by their ids; the completions of each, in their order. More in `complete`.

    Prompts that follow each other are decoded together as far as `budget` allows, so those of similar lengths should;
    `on_tokens` gets the number of new tokens from time to time.
    """
    import torch

    from gptcli.generation.choose import Chooser
    from gptcli.generation.decode import decodable, decode, media_pad_well, pads_well

    settings.check()
    seeing = any(media_of(ids) for ids in prompts)
    _check_together(settings, draft=draft is not None, constrained=constraint is not None, seeing=seeing)
    if not seeing:
        reader = None
    elif reader is None:
        raise ValueError("a prompt has media, and nothing reads them")
    stops = stop_ids(model, tokenizer)
    several = settings.num_return_sequences * len(prompts) > 1

    def row(ids: list[int], index: int) -> Row:
        return Row(
            ids,
            room(model, len(ids), settings.max_new_tokens),
            sequence_key(settings.seed, ids, index, media_hashes(ids)),
            lambda tokens: _decode(tokenizer, tokens),
            frozenset(stops),
            settings.stop if constraint is None else (),  # which could cut it before it is whole
            None if several else on_text,
            None if constraint is None else constraint.start(),
            settings.logprobs,
        )

    with media_errors(), quiet(), evaluating(model), torch.no_grad():
        groups = [[row(ids, index) for index in range(settings.num_return_sequences)] for ids in prompts]
        by_transformers = settings.num_beams > 1 or draft is not None or not decodable(model)
        if by_transformers or (reader is not None and (reader.crossed or positions_by_media(model))):
            from gptcli.generation.by_transformers import decode_by_transformers

            for rows in groups:
                decode_by_transformers(
                    model, tokenizer, rows, settings, draft=draft, reader=reader, on_tokens=on_tokens
                )
        else:
            choose = Chooser(settings, stops, tokenizer)
            every = [one for rows in groups for one in rows]
            alike = len({len(ids) for ids in prompts}) == 1
            together = alike or pads_well(model, vocabulary=len(tokenizer))
            if together and reader is not None and len(prompts) > 1:
                together = media_pad_well(model, reader, prompts)
            for rows in [every] if together else groups:
                decode(model, rows, choose, budget, reader=reader, on_tokens=on_tokens)
    return [[one.finish() for one in rows] for rows in groups]


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a prompt that may fit into the model's context; errors as `encode_prompt` and `complete`."""
    if not isinstance(prompt, str):
        return prompt if isinstance(prompt, MediaPrompt) else list(prompt)
    check_characters(prompt, context_length(model))
    return encode_prompt(tokenizer, prompt)


def check_characters(prompt: str, context: int | None) -> None:
    """Raise `UsageError` for a text that no tokens fit into the context: encoding it takes 150 bytes a character."""
    if context is not None and len(prompt) > MOST_CHARACTERS * context:
        raise UsageError(
            f"the prompt has {len(prompt):,} characters, which no tokens fit into the model's context of {context}",
            remedy="Shorten it, or use a model with a longer context.",
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a prompt: BOS only where the tokenizer adds it to a text; of an empty prompt BOS, else EOS.

    Raises:
        UsageError: the prompt is empty and the tokenizer has neither BOS nor EOS to begin with, or it is not Unicode.
    """
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each of several prompts, see `encode_prompt`; many at once are encoded on all cores."""
    try:
        "".join(prompts).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("the prompt is not valid UTF-8") from None
    bos, eos, pad = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    specials = Specials(bos, eos, pad, bos is not None and adds_bos(tokenizer))
    full = [prompt for prompt in prompts if prompt]
    encoded = iter(tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"] if full else [])
    result: list[list[int]] = []
    for prompt in prompts:
        ids: list[int] = next(encoded) if prompt else []
        begin = prompt_beginning(ids[0] if ids else None, specials)
        ids = ids if begin is None else [int(begin), *ids]
        if not ids:
            raise UsageError(
                "the prompt is empty and the tokenizer has no BOS or EOS to begin with", remedy="Give a prompt."
            )
        result.append(ids)
    return result


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own post-processor puts BOS in front of a text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def room(model: PreTrainedModel, prompt_tokens: int, wanted: int) -> int:
    """How many of the wanted tokens fit into the model's context after the prompt.

    Raises:
        UsageError: not even one does.
    """
    context = context_length(model)
    if context is None:
        return wanted
    if prompt_tokens + 1 > context:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, and with one new token that is more than the model's "
            f"context of {context}",
            remedy=f"Shorten the prompt to at most {context - 1} tokens, or use a model with a longer context.",
        )
    return min(wanted, context - prompt_tokens)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's EOS, and those that the model's own generation settings name."""
    config = model.generation_config
    named = getattr(config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({token for token in ids if isinstance(token, int) and 0 <= token < 2**31})


def _check_together(settings: Settings, *, draft: bool, constrained: bool, seeing: bool) -> None:
    if draft and seeing:
        raise UsageError(
            "a draft or prompt lookup goes with no images and sounds, which nothing but the model itself is given",
            remedy="Leave out --draft and --prompt-lookup.",
        )
    if draft and (settings.num_beams > 1 or settings.logprobs is not None or constrained):
        raise UsageError(
            "a draft or prompt lookup goes with neither num_beams, nor logprobs, nor constrained output",
            remedy="Leave one of them out.",
        )
    if constrained and settings.num_beams > 1:
        raise UsageError("constrained output does not go with num_beams", remedy="Leave one of them out.")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
