"""Classification by likelihood: a row's label is the one whose tokens the model finds likeliest after the prompt.

Prompt and label are tokenized apart, as `generate` would see them. One pass a row and label, in batches of like length;
logits are kept for the tokens of labels alone. Memory: a number a row and label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptcli.errors import DataError, UsageError
from gptcli.evaluation.loss import Window, score_windows, scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
) -> NDArray[np.float64]:
    """Summed natural log-probabilities of the tokens of each label after each prompt, [prompts, labels].

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

    def windows() -> Iterator[Window]:
        for row, prompt in enumerate(prompts):
            for column, label in enumerate(labels):
                ids = np.array([*prompt, *label], dtype=np.int64)
                yield Window(row * len(labels) + column, ids, len(label))

    found = np.zeros((len(prompts), len(labels)))
    done = 0
    with scoring(model):
        for batch, nats in score_windows(model, windows(), pad_id=pad_id):
            for window, value in zip(batch, nats, strict=True):
                found[divmod(window.document, len(labels))] = -value
            done += len(batch)
            if on_scored is not None:
                on_scored(done // len(labels))
    return found


def normalized(scores: NDArray[np.float64], labels: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Mean log-probabilities a token of the label (Brown et al. 2020)."""
    means: NDArray[np.float64] = scores / np.array([len(label) for label in labels])
    return means


def calibrated(scores: NDArray[np.float64], content_free: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities over those after prompts without content [prompts, labels], as Zhao et al. 2021 divide them.

    Probabilities are taken over the labels alone, and the mean of the content-free ones is what is divided by.
    """
    mean = np.exp(_over_labels(content_free)).mean(axis=0)
    with np.errstate(divide="ignore"):
        ratios: NDArray[np.float64] = _over_labels(scores) - np.log(mean)
    return ratios


def _over_labels(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
