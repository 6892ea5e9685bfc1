"""Perplexity of WikiText-2's test file: that of a plain loop of transformers, however the work is divided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.evaluation.corpus import from_files
from gptcli.evaluation.evaluate import Options, evaluate
from gptcli.evaluation.loss import document_loss
from gptcli.reporting import Silent
from tests.conftest import shared_data
from tests.tiny import make_model, save_model, shared_tokenizer

WINDOW = 64
KINDS = ("llama", "gpt2", "gpt_neox")
PIECE = 12_000  # characters; the whole file has 1.3 million
SIZES = [PIECE, pytest.param(None, marks=pytest.mark.slow_fault)]


@pytest.fixture
def text(request: pytest.FixtureRequest) -> str:
    whole = shared_data("wikitext-2/test.txt").read_text(encoding="utf-8")
    size: int | None = request.param
    return whole[:size]


def make(kind: str) -> Any:
    return make_model(kind, vocab_size=300, context=WINDOW)


def plain_loop(model: Any, text: str, stride: int) -> tuple[float, int]:
    """The perplexity of a text and its tokens, by windows that all begin after the prefix (token 0)."""
    ids = torch.tensor([0, *shared_tokenizer()(text, add_special_tokens=False)["input_ids"]])
    nats, end = 0.0, 0
    windows: dict[tuple[int, int], list[int]] = {}  # of a length, with so many scored: where they begin
    for begin in range(0, len(ids) - 1, stride):
        stop = min(begin + WINDOW, len(ids) - 1)
        windows.setdefault((stop - begin, stop - end), []).append(begin)
        end = stop
        if stop == len(ids) - 1:
            break
    for (length, scored), begins in windows.items():
        for several in torch.tensor(begins).split(128):
            inputs = torch.stack([ids[begin : begin + length + 1] for begin in several.tolist()])
            with torch.no_grad():
                logits = model(input_ids=inputs[:, :-1]).logits[:, -scored:]
            targets = inputs[:, -scored:]
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).double(), targets.flatten(), reduction="sum"
            ).item()
    return math.exp(nats / (len(ids) - 1)), len(ids) - 1


@pytest.mark.parametrize("text", SIZES, indirect=True)
@pytest.mark.parametrize("stride", [WINDOW, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_a_plain_loop(text: str, kind: str, stride: int, tmp_path: Path) -> None:
    expected, tokens = plain_loop(make(kind), text, stride)
    folder = save_model(tmp_path / "model", kind, vocab_size=300, context=WINDOW)
    (tmp_path / "test.txt").write_text(text, encoding="utf-8")
    found = evaluate(folder, from_files([str(tmp_path / "test.txt")]), Options(WINDOW, stride), Silent()).result
    assert found.tokens == tokens and found.bytes == len(text.encode())
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", SIZES, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_depend_on_batches_or_parts_or_order(text: str, kind: str) -> None:
    lines = [line for line in text.splitlines() if line.strip()]
    every = shared_tokenizer()(lines, add_special_tokens=False)["input_ids"]
    documents = [(np.array(ids), None) for ids in every]
    model = make(kind)

    def loss(documents: list[Any], **how: Any) -> Any:
        return document_loss(model, documents, prefix_id=0, sequence_length=WINDOW, **how)

    expected = loss(documents)
    assert loss(documents, batch_tokens=3 * WINDOW).perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert loss(documents[::-1]).perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    parts = [loss(documents, part=(i, 3)) for i in range(3)]
    assert sum(part.tokens for part in parts) == expected.tokens
    assert math.exp(sum(part.nats for part in parts) / expected.tokens) == pytest.approx(expected.perplexity, rel=1e-5)
