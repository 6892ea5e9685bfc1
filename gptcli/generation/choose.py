"""Which token comes next: a model's logits of several rows in, one token a row out.

The order is transformers': penalties, then temperature, top_k, top_p, min_p. Penalties look at a row's own tokens, one
row after the other, so that padding and other rows are nothing to them. With top_k all that follows works on the few
tokens that are left, which is what keeps a draw from a large vocabulary cheap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptcli.generation.noise import gumbel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from gptcli.generation.row import Row
    from gptcli.generation.settings import Settings


class Chooser:
    """Chooses tokens by settings.

    Args:
        settings: how.
        stop_ids: tokens that end a text, which `min_new_tokens` holds back.
        tokenizer: spells the bad words.
    """

    def __init__(self, settings: Settings, stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self._stop_ids = list(stop_ids)
        self._penalties = _penalties(settings, self._stop_ids, tokenizer)

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        """Push the next token to each row, and return these tokens. `logits`: [rows, vocabulary]."""
        import torch

        scores, tokens = self.scored(logits, rows)
        best = scores.argmax(-1, keepdim=True)
        chosen = best if tokens is None else tokens.gather(1, best)
        named, next_ids = self._settings.logprobs, chosen.flatten().tolist()
        if named is None:
            for row, token in zip(rows, next_ids, strict=True):
                row.push(token)
            return next_ids
        logprobs = torch.log_softmax(logits.float(), -1)
        top = logprobs.topk(min(named, logprobs.shape[-1]), -1)
        every = (logprobs.gather(1, chosen).flatten(), top.indices, top.values)
        for row, token, logprob, others, values in zip(rows, next_ids, *(one.tolist() for one in every), strict=True):
            row.push(token, (logprob, list(zip(others, values, strict=True))))
        return next_ids

    def scored(self, logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores whose largest is the next token: [rows, n], and the tokens that they belong to, None for all in order.

        Tokens that are left out cannot follow. `rows` are as they were before the token.
        """
        scores = self._penalized(logits, rows)
        if not self._settings.samples:
            return scores, None
        scores, tokens = self._likeliest(scores / self._settings.temperature)
        return scores.double() + gumbel([row.position_key for row in rows], tokens), tokens.expand_as(scores)

    def all_scores(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """The scores of the whole vocabulary, [rows, vocabulary], for `generate` to take the largest of."""
        scores, tokens = self.scored(logits, rows)
        if tokens is None:
            return scores
        return scores.new_full(logits.shape, -math.inf).scatter(1, tokens, scores)

    def _penalized(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        import torch

        held = [index for index, row in enumerate(rows) if len(row.tokens) < self._settings.min_new_tokens]
        constrained = any(row.matcher is not None for row in rows)
        scores = logits.float()
        if scores is logits and (held or self._penalties or constrained):
            scores = scores.clone()
        for penalty in self._penalties:
            for index, row in enumerate(rows):
                ids = torch.tensor([row.prompt + row.tokens], device=logits.device)
                scores[index] = penalty(ids, scores[index : index + 1])[0]
        if held:
            stops = torch.tensor(self._stop_ids, device=logits.device, dtype=torch.long)
            for index in held:
                scores[index].index_fill_(0, stops, -math.inf)
        for index, row in enumerate(rows):
            if row.matcher is not None:
                row.matcher.mask(scores[index])
        return scores

    def _likeliest(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [rows, n] that top_k, top_p and min_p leave, others at -inf, and their tokens, [rows, n] or [n]."""
        import torch

        given, vocabulary = self._settings, scores.shape[-1]
        count = min(given.top_k or vocabulary, vocabulary)
        if count < vocabulary:
            scores, tokens = scores.topk(count, -1)
        elif given.top_p < 1:
            scores, tokens = scores.sort(-1, descending=True)
        else:
            tokens = torch.arange(vocabulary, device=scores.device)
        if given.top_p < 1:
            probabilities = scores.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            scores = scores.masked_fill(before >= max(given.top_p, 1e-9), -math.inf)  # the likeliest always stays
        if given.min_p > 0:
            scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(given.min_p), -math.inf)
        return scores, tokens


def _penalties(settings: Settings, stop_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    from transformers.generation import logits_process

    made: list[Any] = []
    if settings.repetition_penalty != 1:
        made.append(logits_process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        made.append(logits_process.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if ids := _spellings(settings.bad_words, tokenizer):
        made.append(logits_process.NoBadWordsLogitsProcessor(ids, eos_token_id=stop_ids or None))
    return made


def _spellings(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each word, as the first of a text and after a space."""
    made = {
        tuple(tokenizer(form, add_special_tokens=False, verbose=False)["input_ids"])
        for word in words
        for form in (word, f" {word}")
    }
    return [list(ids) for ids in sorted(made) if ids]
