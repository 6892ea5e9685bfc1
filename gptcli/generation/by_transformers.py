"""Rows decoded by transformers' own `generate`: beams, drafts, and models whose past is more than keys and values.

Tokens are chosen as everywhere else: the scores that `generate` takes the largest of are ours, noise included. So a
text that a draft model speeds up is the text without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

from gptcli.generation.choose import Chooser
from gptcli.generation.media_prompt import media_inputs

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader
    from gptcli.generation.row import Row
    from gptcli.generation.settings import Settings


def decode_by_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: Settings,
    *,
    draft: PreTrainedModel | int | None = None,
    reader: MediaReader | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> None:
    """Make the tokens of all rows of one prompt.

    Args:
        model: any causal language model.
        tokenizer: the model's.
        rows: of one prompt.
        settings: how; with beams the rows get the best ones, the best first.
        draft: a smaller model of the same vocabulary that proposes tokens, or how many tokens to look up in the prompt.
        reader: of the prompt's images and sounds, where it has some; not with a draft.
        on_tokens: gets the number of tokens that were made.
    """
    chooser = Chooser(settings, sorted(rows[0].stop_ids), tokenizer)
    if settings.num_beams > 1:
        _beams(model, tokenizer, rows, settings, chooser, reader)
    elif draft is not None:  # which transformers does for a single sequence
        for row in rows:
            _with_draft(model, tokenizer, row, chooser, draft)
    else:
        _step_by_step(model, tokenizer, rows, chooser, reader)
    if on_tokens is not None:
        on_tokens(sum(len(row.tokens) for row in rows))


def _step_by_step(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    chooser: Chooser,
    reader: MediaReader | None,
) -> None:
    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor(chooser(scores, rows), device=scores.device)
        return torch.full_like(scores, -math.inf).scatter(1, chosen.unsqueeze(1), 0.0)

    def watch(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.tensor([row.done for row in rows], device=input_ids.device)

    _generate(model, tokenizer, rows[0], process, watch, rows=len(rows), reader=reader)


def _with_draft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    chooser: Chooser,
    draft: PreTrainedModel | int,
) -> None:
    start = len(row.prompt)

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return chooser.all_scores(scores, [_at(row, input_ids[0, start:].tolist())])

    def watch(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        for token in input_ids[0, start + len(row.tokens) :].tolist():  # several at once
            row.push(token)
        return torch.tensor([row.done], device=input_ids.device)

    if isinstance(draft, int):
        _generate(model, tokenizer, row, process, watch, prompt_lookup_num_tokens=draft)
    else:
        _generate(model, tokenizer, row, process, watch, assistant_model=draft)


def _beams(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: Settings,
    chooser: Chooser,
    reader: MediaReader | None,
) -> None:
    first, start = rows[0], len(rows[0].prompt)

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return chooser.all_scores(scores, [_at(first, tokens) for tokens in input_ids[:, start:].tolist()])

    options: dict[str, Any] = {"num_beams": settings.num_beams, "num_return_sequences": len(rows)}
    found = _generate(model, tokenizer, first, process, None, reader=reader, **options)
    for row, tokens in zip(rows, found[:, start:].tolist(), strict=True):
        for token in tokens:
            row.push(token)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    process: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    watch: Callable[..., torch.Tensor] | None,
    *,
    rows: int = 1,
    reader: MediaReader | None = None,
    assistant_model: PreTrainedModel | None = None,
    **options: Any,
) -> torch.Tensor:
    """transformers' `generate` of `rows` sequences of a row's prompt: ids [sequences, prompt and text]."""
    from transformers import GenerationConfig, StoppingCriteriaList
    from transformers.generation.logits_process import LogitsProcessorList

    pad, stop_ids = tokenizer.pad_token_id, sorted(row.stop_ids)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=row.most,
        do_sample=False,
        use_cache=True,
        eos_token_id=stop_ids or None,
        pad_token_id=pad if pad is not None else (stop_ids[0] if stop_ids else 0),
        **options,
    )
    ids = torch.tensor([row.prompt] * rows, device=model.device)
    more: dict[str, Any] = {} if assistant_model is None else {"assistant_model": assistant_model}

    def media(count: int) -> dict[str, torch.Tensor]:
        return {} if reader is None else media_inputs(model, reader, [row.prompt] * count, ids[:1].repeat(count, 1))

    with _alone(model, config), _multiplied(model, media):
        made: torch.Tensor = model.generate(  # type: ignore[operator]
            inputs=ids,
            generation_config=config,
            logits_processor=LogitsProcessorList([process]),
            stopping_criteria=None if watch is None else StoppingCriteriaList([watch]),
            **{"attention_mask": torch.ones_like(ids), **media(rows)},
            **more,
        )
    return made


@contextmanager
def _multiplied(model: Any, media: Callable[[int], dict[str, torch.Tensor]]) -> Iterator[None]:
    """Inside, a prompt that `generate` makes several beams of has the media of as many prompts.

    It repeats each entry of their first dimension, which may be that of sounds, not of prompts: two sounds would become
    the first one twice for the first beam. What it has encoded already, it multiplies by prompts itself, and a model
    that does this by its own code is left to it.
    """
    from transformers import GenerationMixin

    name = "_expand_inputs_for_generation"
    expand = getattr(model, name, None)
    if expand is None or getattr(type(model), name) is not getattr(GenerationMixin, name):
        yield
        return

    def expanded(expand_size: int = 1, **given: Any) -> Any:
        if expand_size == 1 or given.get("mm_encoder_outputs") or not (each := media(expand_size)):
            return expand(expand_size=expand_size, **given)
        ids, more = expand(expand_size=expand_size, **{key: given[key] for key in given if key not in each})
        return ids, more | each

    setattr(model, name, expanded)
    try:
        yield
    finally:
        delattr(model, name)


def _at(row: Row, tokens: list[int]) -> Row:
    """A row as it is after these tokens, for choosing alone."""
    if len(tokens) == len(row.tokens):
        return row
    other = copy(row)
    other.tokens = tokens
    return other


@contextmanager
def _alone(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Generate by `config` alone: transformers fills what it leaves open from generation_config.json of the model, and
    that may ask for any other way to generate, some of them by code of the Hub.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
