"""Classification by likelihood: a row's label is the one whose tokens the model finds likeliest after the prompt.

Prompt and label are tokenized apart, as `generate` would see them. Labels whose inputs begin alike share a pass: those
of one token, however many, cost one pass a row. Batches are of like length, and of logits a block is there at a time.
Memory: a number a row and label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptcli.errors import DataError, UsageError
from gptcli.evaluation.loss import Forward, each_batch, scoring
from gptcli.evaluation.windows import Window, padded
from gptcli.generation.media_prompt import media_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader

# Prompts without content, by which Zhao et al. 2021 ("Calibrate Before Use") measure what a model prefers anyway.
CONTENT_FREE = ("N/A", "[MASK]", "")


def label_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, by: str) -> tuple[list[list[int]], bool]:
    """The tokens of each label, and whether the end of text was added to all of them.

    Where one label's tokens begin another's, the longer one could never be the likelier, so by `likelihood` the end of
    text after the label is part of it. A token's mean likelihood and the calibrated one need no such thing.

    Raises:
        UsageError: a label has no tokens, two have the same, or one begins another and the tokenizer has no EOS.
    """
    ids: list[list[int]] = [tokenizer(label, add_special_tokens=False, verbose=False)["input_ids"] for label in labels]
    for index, one in enumerate(ids):
        if not one:
            raise UsageError(f"the label {labels[index]!r} has no tokens in the model's tokenizer")
        if one in ids[:index]:
            raise UsageError(
                f"the labels {labels[ids.index(one)]!r} and {labels[index]!r} are the same tokens to this model",
                remedy="Give them other words.",
            )
    begins = next(((a, b) for a in ids for b in ids if a is not b and b[: len(a)] == a), None)
    if by != "likelihood" or begins is None:
        return ids, False
    end = tokenizer.eos_token_id
    if end is None:
        short, long = (labels[ids.index(each)] for each in begins)
        raise UsageError(
            f"the label {short!r} begins {long!r}, and this tokenizer has no end of text to tell them apart",
            remedy="Give them other words, or use eval.label_scores: normalized.",
        )
    return [[*one, int(end)] for one in ids], True


def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int,
    on_scored: Callable[[int], None] | None = None,
    part: tuple[int, int] = (0, 1),
    reader: MediaReader | None = None,
) -> NDArray[np.float64]:
    """Summed natural log-probabilities of the tokens of each label after each prompt, [prompts, labels].

    `part` = (i, n): every n-th batch from the i-th (from 0) is scored, as many on each of n processes; NaN elsewhere.
    `reader`: of the media of prompts that have some.

    Raises:
        DataError: a token is outside the model's vocabulary.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = max((max(ids) for ids in (*prompts, *labels)), default=0)
    if isinstance(known, int) and largest >= known:
        raise DataError(
            f"token {largest}, but the model knows {known} tokens",
            remedy="The tokenizer beside the model is not the one that it was trained with.",
        )

    passes = shared_passes(labels)

    longest = max(len(inputs) for inputs, _ in passes)

    def windows() -> Iterator[Window]:
        for row, prompt in enumerate(prompts):
            media = media_of(prompt)
            for number, (inputs, _) in enumerate(passes):
                # All passes of a row with media are of one length, so that they stand in one batch, which decodes once.
                rest = longest - len(inputs) if media else 0
                # What follows the last input is not one token but that of several labels: the 0 is not looked at.
                ids = np.array([*prompt, *inputs, *[pad_id] * rest, 0])
                wanted = np.zeros(len(ids) - 1, dtype=np.bool_)
                wanted[len(prompt) - 1 : len(prompt) + len(inputs)] = True
                yield Window(row * len(passes) + number, ids, len(inputs) + 1, wanted, media=media)

    def score(forward: Forward, batch: list[Window], device: torch.device, pad_id: int) -> list[NDArray[np.float64]]:
        return _score_labels(forward, batch, device, pad_id, labels, passes)

    found = np.full((len(prompts), len(labels)), np.nan)
    done = 0
    with scoring(model):
        for batch, sums in each_batch(model, windows(), score, pad_id=pad_id, part=part, reader=reader):
            for window, values in zip(batch, sums, strict=True):
                row, number = divmod(window.document, len(passes))
                found[row, passes[number][1]] = values
            done += len(batch)
            if on_scored is not None:
                on_scored(done // len(passes))
    return found


def shared_passes(labels: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """The inputs after the prompt of as few passes as suffice, each with the numbers of the labels that it is for.

    The last token of a label is no input. A label goes with the first pass whose inputs its own inputs begin.
    """
    passes: list[tuple[tuple[int, ...], list[int]]] = []
    for number in sorted(range(len(labels)), key=lambda number: -len(labels[number])):
        inputs = tuple(labels[number][:-1])
        shared = next((of for longer, of in passes if longer[: len(inputs)] == inputs), None)
        if shared is None:
            passes.append((inputs, [number]))
        else:
            shared.append(number)
    return passes


def _score_labels(
    forward: Forward,
    batch: list[Window],
    device: torch.device,
    pad_id: int,
    labels: Sequence[Sequence[int]],
    passes: list[tuple[tuple[int, ...], list[int]]],
) -> list[NDArray[np.float64]]:
    """The summed log-probabilities of the labels of each window's pass."""
    import torch

    inputs, _, mask = padded(batch, pad_id)
    # Of each token of each label: the scored position, counted over the batch, the token, and whose sum it is in.
    positions: list[int] = []
    tokens: list[int] = []
    sums: list[int] = []
    begin = count = 0
    for window in batch:
        for number in passes[window.document % len(passes)][1]:
            positions += range(begin, begin + len(labels[number]))
            tokens += labels[number]
            sums += [count] * len(labels[number])
            count += 1
        begin += window.scored
    order = np.argsort(positions, kind="stable")
    at, ids, into = (torch.from_numpy(np.array(each, dtype=np.int64)[order]) for each in (positions, tokens, sums))
    found, done = [], 0
    with torch.no_grad():  # which belongs to a thread
        for block in forward(inputs.to(device), mask.to(device)):
            logits = block.float()
            first, last = np.searchsorted(at.numpy(), (done, done + len(logits)))
            rows = (at[first:last] - done).to(device)
            chosen = logits[rows, ids[first:last].to(device)] - logits.logsumexp(-1)[rows]
            found.append(chosen.cpu().double())
            done += len(logits)
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, into, torch.cat(found)).numpy()
    ends = np.cumsum([len(passes[window.document % len(passes)][1]) for window in batch])
    return np.split(totals, ends[:-1])


def normalized(scores: NDArray[np.float64], labels: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Mean log-probabilities a token of the label (Brown et al. 2020)."""
    means: NDArray[np.float64] = scores / np.array([len(label) for label in labels])
    return means


def calibrated(scores: NDArray[np.float64], content_free: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities over those after prompts without content [prompts, labels], as Zhao et al. 2021 divide them.

    Probabilities are taken over the labels alone, and the mean of the content-free ones is what is divided by.
    """
    mean = np.exp(over_labels(content_free)).mean(axis=0)
    with np.errstate(divide="ignore"):
        ratios: NDArray[np.float64] = over_labels(scores) - np.log(mean)
    return ratios


def over_labels(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities over the labels alone, which sum to 1 in each row."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
