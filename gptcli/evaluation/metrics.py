"""Metrics of texts and labels: pure functions, each the reference library's own number where there is such a library.

Shares lie between 0 and 1; BLEU and chrF between 0 and 100, as sacrebleu prints them. The libraries come with the extra
`eval` and are imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from statistics import fmean
from typing import Any

from gptcli.errors import not_installed

References = Sequence[Sequence[str]]  # those of each row, at least one
OF_LABELS = ("accuracy", "precision", "recall", "f1")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
REPEATED_WORDS = 4
# What is imported, and what is installed.
PACKAGES = {
    "accuracy": ("sklearn", "scikit-learn"),
    "precision": ("sklearn", "scikit-learn"),
    "recall": ("sklearn", "scikit-learn"),
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
    "rouge": ("rouge_score", "rouge-score"),
    "wer": ("jiwer", "jiwer"),
    "cer": ("jiwer", "jiwer"),
}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_FINAL = re.compile(r"####\s*(\S+)")
_NUMBER = re.compile(r"(?<![0-9])-?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def require_packages(metrics: Iterable[str], *, labels: bool = False) -> None:
    """Raise `MissingError` for the first metric whose package is not installed; `labels`: f1 is that of labels."""
    for metric in metrics:
        module, package = PACKAGES.get("accuracy" if labels and metric == "f1" else metric, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise not_installed(f"the metric {metric}", package, "eval")


def _library(metric: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise not_installed(f"the metric {metric}", PACKAGES[metric][1], "eval") from None


def of_labels(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Every number of a classification, by scikit-learn.

    A label that is never predicted (or never right) has a precision (recall) of 0, and counts in the macro means.

    Returns:
        accuracy; precision, recall and f1, each `_macro` and `_micro`; confusion_matrix: {labels, counts}, where row i
        of the counts holds what was predicted where label i was right.
    """
    sklearn = _library("accuracy", "sklearn.metrics")
    names = list(labels)
    found: dict[str, Any] = {"accuracy": float(sklearn.accuracy_score(references, predictions))}
    for average in ("macro", "micro"):
        scores = sklearn.precision_recall_fscore_support(
            references, predictions, labels=names, average=average, zero_division=0
        )
        for name, score in zip(OF_LABELS[1:], scores, strict=False):
            found[f"{name}_{average}"] = float(score)
    counts = sklearn.confusion_matrix(references, predictions, labels=names).tolist()
    return found | {"confusion_matrix": {"labels": names, "counts": counts}}


def bleu(predictions: Sequence[str], references: References) -> dict[str, Any]:
    """BLEU of the whole by sacrebleu's defaults, with its signature; rows may have different numbers of references."""
    return _by_sacrebleu("bleu", "BLEU", predictions, references)


def chrf(predictions: Sequence[str], references: References) -> dict[str, Any]:
    """chrF of the whole by sacrebleu's defaults, with its signature; rows may have different numbers of references."""
    return _by_sacrebleu("chrf", "CHRF", predictions, references)


def _by_sacrebleu(name: str, kind: str, predictions: Sequence[str], references: References) -> dict[str, Any]:
    metric = getattr(_library(name, "sacrebleu.metrics"), kind)()
    most = max(len(each) for each in references)
    streams = [[each[index] if index < len(each) else None for each in references] for index in range(most)]
    score = metric.corpus_score(list(predictions), streams)
    return {name: float(score.score), f"{name}_signature": metric.get_signature().format()}


def rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """Mean F of ROUGE-1, -2, -L and -Lsum by rouge-score without stemming; of several references the best one's."""
    scorer = _library("rouge", "rouge_score.rouge_scorer").RougeScorer(list(ROUGE))
    scores = [scorer.score_multi(list(each), text) for text, each in zip(predictions, references, strict=True)]
    return {name: fmean(score[name].fmeasure for score in scores) for name in ROUGE}


def word_error_rate(predictions: Sequence[str], references: References) -> float:
    """Edits of words over the words of the references, by jiwer; of several references the nearest. Unbounded above."""
    jiwer = _library("wer", "jiwer")
    return float(jiwer.wer(_nearest(jiwer.wer, predictions, references), list(predictions)))


def character_error_rate(predictions: Sequence[str], references: References) -> float:
    """Edits of characters over the characters of the references, by jiwer; of several references the nearest."""
    jiwer = _library("cer", "jiwer")
    return float(jiwer.cer(_nearest(jiwer.cer, predictions, references), list(predictions)))


def _nearest(rate: Callable[..., float], predictions: Sequence[str], references: References) -> list[str]:
    return [
        each[0] if len(each) == 1 else min(each, key=lambda one, text=text: rate(one, text))  # type: ignore[misc]
        for text, each in zip(predictions, references, strict=True)
    ]


def normalized(text: str) -> str:
    """A text as SQuAD's script compares it (Rajpurkar et al. 2016): no case, punctuation, English articles or gaps."""
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction is one of the references once both are `normalized`, else 0."""
    return float(normalized(prediction) in _answers(references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 of the words that prediction and reference share, with the best of the references.

    Where one of the two has no words ("no answer"), it is 1 if the other has none either, else 0 (SQuAD 2.0).
    """
    return max(_shared_words(normalized(prediction).split(), each.split()) for each in _answers(references))


def _answers(references: Sequence[str]) -> list[str]:
    """The references as they are compared: those of which something is left, else the empty one, "no answer"."""
    return [text for text in map(normalized, references) if text] or [""]


def _shared_words(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def number_in(text: str) -> Decimal | None:
    """The answer that a text gives as GSM8K has it: the number after the first `####`, else the last number in it."""
    final = _FINAL.search(text)
    found = list(_NUMBER.finditer(text if final is None else final[1]))
    if not found:
        return None
    match = found[-1 if final is None else 0]
    return Decimal(match[1].replace(",", "")) * (-1 if match[0].startswith("-") else 1)


def numeric_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the number in the prediction is that in one of the references (`number_in`: 1,000 is 1000.0), else 0."""
    ours = number_in(prediction)
    return float(ours is not None and ours in [number_in(reference) for reference in references])


def distinct(texts: Sequence[str], n: int) -> float:
    """Different runs of n words over all runs of n words of the texts (Li et al. 2016); 0 where there is none."""
    runs = [run for text in texts for run in _runs(text, n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def repetition(text: str) -> float:
    """The share of a text's runs of 4 words that were in it before (Welleck et al. 2020, seq-rep-4); 0 without one."""
    runs = _runs(text, REPEATED_WORDS)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def quality(texts: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
    """What texts are like by themselves: distinct_1 to _3, mean `repetition`, and the share that ended by itself."""
    found = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    return found | {"repetition": fmean(map(repetition, texts)), "ended": fmean(ended)}


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[begin:] for begin in range(n)), strict=False))
