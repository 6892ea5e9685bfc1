"""The next token against transformers' logits processors and against the probabilities that it should have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.generation import logits_process

from gptcli.generation.choose import Chooser
from gptcli.generation.noise import gumbel, position_key, sequence_key
from gptcli.generation.row import Row
from gptcli.generation.settings import Settings
from tests.tiny import shared_tokenizer


def rows(count: int, seed: int = 0) -> list[Row]:
    return [Row([1], 10, sequence_key(seed, [1], index), lambda ids: "", frozenset()) for index in range(count)]


def allowed(logits: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    """Which tokens transformers' processors leave, [rows, vocabulary]."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = logits / how.get("temperature", 1.0)
    if how.get("top_k"):
        scores = logits_process.TopKLogitsWarper(how["top_k"])(ids, scores)
    if how.get("top_p", 1.0) < 1:
        scores = logits_process.TopPLogitsWarper(how["top_p"])(ids, scores)
    if how.get("min_p"):
        scores = logits_process.MinPLogitsWarper(how["min_p"])(ids, scores)
    return scores.isfinite()


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.8, "temperature": 1.7},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.6},
        {"top_p": 0.0},
        {},
    ],
    ids=str,
)
def test_the_tokens_that_can_follow_are_those_of_transformers(how: dict[str, Any]) -> None:
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 3
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **how}
    chooser = Chooser(Settings(**given), [], shared_tokenizer())
    assert torch.equal(chooser.all_scores(logits, rows(50)).isfinite(), allowed(logits, how))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf]).log_softmax(-1)
    draws = 20_000
    chooser = Chooser(Settings(temperature=1.0, top_k=0, top_p=1.0), [], shared_tokenizer())
    counts = torch.bincount(torch.tensor(chooser(logits.repeat(draws, 1), rows(draws))), minlength=5)
    expected = logits.exp() * draws
    chi = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert counts[4] == 0
    assert chi < 16.3  # passed by one of a thousand fair draws


def test_noise_is_gumbel_and_that_of_a_token_wherever_it_stands() -> None:
    keys = [position_key(sequence_key(1, [5, 6], 0), position) for position in range(40)]
    noise = gumbel(keys, torch.arange(5000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    some = torch.tensor([[4999, 3, 17]]).expand(40, 3)
    assert torch.equal(gumbel(keys, some), noise[:, [4999, 3, 17]])
    # Neighbours in position and in token have nothing to do with each other.
    assert abs(torch.corrcoef(noise[:2])[0, 1].item()) < 0.05
    assert abs(torch.corrcoef(torch.stack([noise[0, 1:], noise[0, :-1]]))[0, 1].item()) < 0.05


def test_noise_differs_by_seed_prompt_sequence_and_position() -> None:
    keys = {
        position_key(sequence_key(seed, prompt, index), position)
        for seed in (0, 1, 2**40)
        for prompt in ([1], [1, 2], [2, 1], [])
        for index in range(3)
        for position in range(50)
    }
    assert len(keys) == 3 * 4 * 3 * 50
