"""How to generate: the recipe's `generate` section and the command's options, checked once."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptcli.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How to generate, by the names of transformers' GenerationConfig; the defaults are the recipe schema's.

    With `num_beams` above 1 nothing is drawn: the likeliest text that beams find is taken. `logprobs` is how many of
    the likeliest tokens are named at each place, beside the one that was taken; None names nothing.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    seed: int = 0
    greedy: bool = False
    logprobs: int | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; a temperature of 0 means greedy."""
        return not self.greedy and self.temperature > 0 and self.num_beams == 1

    @property
    def how(self) -> str:
        """How tokens are chosen, in two words."""
        if self.num_beams > 1:
            return f"{self.num_beams} beams"
        return f"seed {self.seed}" if self.samples else "greedy"

    def check(self) -> None:
        """Raise `UsageError` for values that make no sense."""
        for wrong, what in (*self._ranges(), *self._pairs()):
            if wrong:
                raise UsageError(what)
        if self.num_return_sequences > 1 and not self.samples and self.num_beams == 1:
            raise UsageError(
                f"greedy gives the same text every time, so there are no {self.num_return_sequences} different ones",
                remedy="Leave out --num-return-sequences, or sample (no --greedy, a temperature above 0).",
            )

    def _ranges(self) -> list[tuple[bool, str]]:
        infinite = float("inf")
        return [
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1"),
            (self.min_new_tokens < 0, f"min_new_tokens is {self.min_new_tokens}; it must be at least 0"),
            (not 0 <= self.temperature < infinite, f"temperature is {self.temperature}; it must be at least 0"),
            (not 0 <= self.top_p <= 1, f"top_p is {self.top_p}; it must lie between 0 and 1"),
            (self.top_k < 0, f"top_k is {self.top_k}; it must be at least 0 (0: all tokens)"),
            (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must lie between 0 and 1"),
            (
                not 0 < self.repetition_penalty < infinite,
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0",
            ),
            (
                self.no_repeat_ngram_size < 0,
                f"no_repeat_ngram_size is {self.no_repeat_ngram_size}; it must be at least 0",
            ),
            (self.num_beams < 1, f"num_beams is {self.num_beams}; it must be at least 1"),
            (
                self.num_return_sequences < 1,
                f"num_return_sequences is {self.num_return_sequences}; it must be at least 1",
            ),
            (any(not stop for stop in self.stop), "a stop text is empty"),
            (any(not word.strip() for word in self.bad_words), "a bad word is empty"),
            (not 0 <= self.seed < 2**63, f"seed is {self.seed}; it must be at least 0 and below 2^63"),
            (
                self.logprobs is not None and not 0 <= self.logprobs <= 100,
                f"logprobs is {self.logprobs}; it must lie between 0 and 100",
            ),
        ]

    def _pairs(self) -> list[tuple[bool, str]]:
        return [
            (
                self.min_new_tokens > self.max_new_tokens,
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})",
            ),
            (
                self.num_return_sequences > self.num_beams > 1,
                f"num_return_sequences ({self.num_return_sequences}) is more than num_beams ({self.num_beams})",
            ),
            (self.num_beams > 1 and self.logprobs is not None, "logprobs are not given with num_beams"),
        ]


def settings(
    given: Mapping[str, Any], chosen: Mapping[str, Any], *, seed: int | None = None, greedy: bool = False
) -> Settings:
    """The settings of a recipe's `generate` section, by keys, with what is not None in `chosen` before it.

    Without a seed one is drawn, so that what was seen can be had again.
    """
    section = {field.name: given[field.name] for field in fields(Settings) if field.name in given}
    section |= {key: value for key, value in chosen.items() if value is not None}
    section |= {key: tuple(section[key]) for key in ("stop", "bad_words") if key in section}
    return Settings(**section, seed=secrets.randbelow(2**31) if seed is None else seed, greedy=greedy)
