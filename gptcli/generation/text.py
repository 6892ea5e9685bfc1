"""Completions of one prompt, by transformers' `generate`: what `gptcli generate` prints and training samples are.

The prompt is encoded as training documents were: BOS in front only where the tokenizer's own post-processor puts it.
Random numbers come from a state of their own, so that sampling in the middle of training changes nothing there, and a
prompt's completions depend on its seed and settings alone, not on the prompts before it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from gptcli.errors import UsageError
from gptcli.generation.stream import TextStream
from gptcli.model.load import context_length, evaluating, quiet

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.recipe.schema import Generate


# In the longest tokens of published vocabularies, which are 128 spaces.
MOST_CHARACTERS = 200


@dataclass(frozen=True)
class Settings:
    """How to generate; the defaults are the recipe schema's. Without a seed every call draws anew."""

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    greedy: bool = False

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; a temperature of 0 means greedy."""
        return not self.greedy and self.temperature > 0

    def check(self) -> None:
        """Raise `UsageError` for values that make no sense."""
        wrong = [
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1"),
            (self.min_new_tokens < 0, f"min_new_tokens is {self.min_new_tokens}; it must be at least 0"),
            (
                self.min_new_tokens > self.max_new_tokens,
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})",
            ),
            (not 0 <= self.temperature < float("inf"), f"temperature is {self.temperature}; it must be at least 0"),
            (not 0 <= self.top_p <= 1, f"top_p is {self.top_p}; it must lie between 0 and 1"),
            (self.top_k < 0, f"top_k is {self.top_k}; it must be at least 0 (0: all tokens)"),
            (
                not 0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0",
            ),
            (
                self.num_return_sequences < 1,
                f"num_return_sequences is {self.num_return_sequences}; it must be at least 1",
            ),
            (any(not stop for stop in self.stop), "a stop text is empty"),
            (self.seed is not None and not 0 <= self.seed < 2**63, f"seed is {self.seed}; it must be at least 0"),
        ]
        for is_wrong, what in wrong:
            if is_wrong:
                raise UsageError(what)
        if self.num_return_sequences > 1 and not self.samples:
            raise UsageError(
                f"greedy gives the same text every time, so there are no {self.num_return_sequences} different ones",
                remedy="Leave out --num-return-sequences, or sample (no --greedy, a temperature above 0).",
            )


@dataclass(frozen=True)
class Completion:
    """A text that follows a prompt; `tokens` counts its tokens without a closing EOS."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


def settings(given: Generate, chosen: Mapping[str, Any], *, seed: int | None = None, greedy: bool = False) -> Settings:
    """The settings of a recipe's `generate` section, with what is not None in `chosen` before it.

    Without a seed one is drawn, so that what was seen can be had again.
    """
    section = {
        field.name: getattr(given, field.name) for field in fields(Settings) if field.name not in ("seed", "greedy")
    }
    section |= {key: value for key, value in chosen.items() if value is not None}
    section["stop"] = tuple(section["stop"])
    return Settings(**section, seed=secrets.randbelow(2**31) if seed is None else seed, greedy=greedy)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    settings: Settings,
    *,
    on_text: Callable[[str], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Complete a prompt `settings.num_return_sequences` times.

    `on_text` gets the text of a single completion piece by piece, as soon as it is certain; with several, nothing.
    The mode of the model and the random state are left as they were.

    Raises:
        UsageError: the settings make no sense, or the prompt leaves no room in the model's context.
    """
    import torch
    from transformers import StoppingCriteriaList

    settings.check()
    context = context_length(model)
    if context is not None and len(prompt) > MOST_CHARACTERS * context:  # encoding it takes 150 bytes a character
        raise UsageError(
            f"the prompt has {len(prompt):,} characters, which no tokens fit into the model's context of {context}",
            remedy="Shorten it, or use a model with a longer context.",
        )
    prompt_ids = encode_prompt(tokenizer, prompt)
    max_new_tokens = room(model, len(prompt_ids), settings.max_new_tokens)
    if max_new_tokens < settings.max_new_tokens and on_warning is not None:
        on_warning(
            f"at most {max_new_tokens} new tokens: the prompt has {len(prompt_ids)} "
            f"and the model's context is {context_length(model)}"
        )
    stops = stop_ids(model, tokenizer)
    rows = [
        _Row(TextStream(lambda ids: _decode(tokenizer, ids), prompt_ids, settings.stop), stops)
        for _ in range(settings.num_return_sequences)
    ]
    show = on_text if on_text is not None and len(rows) == 1 else _ignore

    def watch(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        del scores, kwargs
        for row, token in zip(rows, input_ids[:, -1].tolist(), strict=True):
            if piece := row.push(token):
                show(piece)
        return torch.tensor([row.done for row in rows], device=input_ids.device)

    inputs = torch.tensor([prompt_ids], device=model.device)
    with quiet(), evaluating(model), torch.no_grad(), _own_random_state(model.device, settings.seed):
        config = _config(settings, max_new_tokens, stops, tokenizer)
        with _alone(model, config):
            model.generate(  # type: ignore[operator]
                inputs=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
    for row in rows:
        if piece := row.stream.finish():
            show(piece)
    return [row.completion() for row in rows]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a prompt: BOS only where the tokenizer adds it to a text; of an empty prompt BOS, else EOS.

    Raises:
        UsageError: the prompt is empty and the tokenizer has neither BOS nor EOS to begin with, or it is not Unicode.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("the prompt is not valid UTF-8") from None
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] if prompt else []
    bos = tokenizer.bos_token_id
    if bos is not None and adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [int(bos), *ids]
    if ids:
        return ids
    first = bos if bos is not None else tokenizer.eos_token_id
    if first is None:
        raise UsageError(
            "the prompt is empty and the tokenizer has no BOS or EOS to begin with", remedy="Give a prompt."
        )
    return [int(first)]


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


class _Row:
    """One completion while it grows."""

    def __init__(self, stream: TextStream, stop_ids: list[int]) -> None:
        self.stream = stream
        self.tokens = 0
        self.done = False
        self._stop_ids = frozenset(stop_ids)

    def push(self, token: int) -> str:
        if self.done:
            return ""
        if token in self._stop_ids:
            self.done = True
            return ""
        self.tokens += 1
        piece = self.stream.push(token)
        self.done = self.stream.stopped
        return piece

    def completion(self) -> Completion:
        stopped = self.done or self.stream.stopped
        return Completion(self.stream.text, self.tokens, "stop" if stopped else "length")


def _ignore(text: str) -> None:
    del text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's EOS, and those that the model's own generation settings name."""
    config = model.generation_config
    named = getattr(config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({token for token in ids if isinstance(token, int) and 0 <= token < 2**31})


def _config(
    settings: Settings, max_new_tokens: int, stop_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(settings.min_new_tokens, max_new_tokens),
        do_sample=settings.samples,
        temperature=settings.temperature if settings.samples else 1.0,
        top_p=settings.top_p if settings.samples else 1.0,
        top_k=settings.top_k if settings.samples else 0,
        repetition_penalty=settings.repetition_penalty,
        num_return_sequences=settings.num_return_sequences,
        num_beams=1,
        use_cache=True,
        eos_token_id=stop_ids or None,
        pad_token_id=pad if pad is not None else (stop_ids[0] if stop_ids else 0),
    )


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


@contextmanager
def _own_random_state(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draw from a state seeded by `seed` (fresh when None); the state outside is saved and restored."""
    import torch

    accelerated = device.type != "cpu"
    devices = [device.index or 0] if accelerated else []
    with torch.random.fork_rng(devices, device_type=device.type if accelerated else "cuda"):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        yield
