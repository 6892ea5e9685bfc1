"""Every metric against its reference library, called directly on the same strings."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import statistics
from decimal import Decimal

import pytest

from gptcli.errors import MissingError
from gptcli.evaluation import metrics
from tests.conftest import shared_data

TEXT = "the cat sat on a mat and dogs did not sit there at all 12 3.5 ; , ."


def sentences(seed: int, count: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(TEXT.split(), k=draw.randint(1, 12))) for _ in range(count)]


PREDICTIONS = ["", *sentences(1), "Ünïcode 世界 🙂", "the cat"]
REFERENCES = [["the cat"], *([each] for each in sentences(2)), ["Ünicode 世界 🙂"], ["the cat"]]
SEVERAL = [[*each, *sentences(index, index % 3)] for index, each in enumerate(REFERENCES)]


def test_classification_is_sklearns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
    draw = random.Random(0)
    labels = ["no", "not sure", "yes", "never there"]
    right = draw.choices(labels[:3], k=200)
    answered = draw.choices(labels, k=200)
    found = metrics.of_labels(answered, right, labels)
    assert found["accuracy"] == sklearn.accuracy_score(right, answered)
    for average in ("macro", "micro"):
        for name in ("precision", "recall", "f1"):
            score = getattr(sklearn, f"{name}_score")
            expected = score(right, answered, labels=labels, average=average, zero_division=0)
            assert found[f"{name}_{average}"] == expected, (name, average)
    matrix = sklearn.confusion_matrix(right, answered, labels=labels)
    assert found["confusion_matrix"] == {"labels": labels, "counts": matrix.tolist()}


def test_one_class_only_has_numbers_and_no_warning() -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    found = metrics.of_labels(["yes"] * 3, ["yes"] * 3, ["yes", "no"])
    assert (found["accuracy"], found["f1_macro"], found["f1_micro"]) == (1.0, 0.5, 1.0)
    assert found["confusion_matrix"]["counts"] == [[3, 0], [0, 0]]


def test_bleu_and_chrf_are_sacrebleus_with_its_signature() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    one = [[each[0] for each in REFERENCES]]
    assert metrics.bleu(PREDICTIONS, REFERENCES)["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, one).score
    assert metrics.chrf(PREDICTIONS, REFERENCES)["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, one).score
    assert metrics.bleu(PREDICTIONS, REFERENCES)["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert metrics.chrf(PREDICTIONS, REFERENCES)["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")


def test_rows_may_have_different_numbers_of_references() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    streams = [[each[i] if i < len(each) else None for each in SEVERAL] for i in range(3)]
    found = metrics.bleu(PREDICTIONS, SEVERAL)
    assert found["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert found["bleu_signature"].startswith("nrefs:var|")
    assert metrics.chrf(PREDICTIONS, SEVERAL)["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, streams).score


def test_rouge_is_rouge_scores_mean_f_with_the_best_reference() -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra eval is not installed")
    scorer = rouge.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    found = metrics.rouge(PREDICTIONS, SEVERAL)
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in each)
            for text, each in zip(PREDICTIONS, SEVERAL, strict=True)
        ]
        assert found[name] == pytest.approx(statistics.fmean(best), rel=1e-12)


def test_error_rates_are_jiwers() -> None:
    jiwer = pytest.importorskip("jiwer", reason="the extra eval is not installed")
    one = [each[0] for each in REFERENCES]
    assert metrics.word_error_rate(PREDICTIONS, REFERENCES) == jiwer.wer(one, PREDICTIONS)
    assert metrics.character_error_rate(PREDICTIONS, REFERENCES) == jiwer.cer(one, PREDICTIONS)
    assert metrics.word_error_rate(["a b", ""], [["x y", "a c"], ["d"]]) == jiwer.wer(["a c", "d"], ["a b", ""])


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Cat!", ["a cat"], 1, 1),
        ("the black cat", ["cat"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("a dog", ["cat", "dog"], 1, 1),
        ("", ["cat"], 0, 0),
        ("cat", [""], 0, 0),
        ("", [""], 1, 1),
        ("the", ["a"], 1, 1),  # nothing is left of both
        ("", ["", "cat"], 0, 0),  # there is an answer
        ("U.S.A.", ["usa"], 1, 1),
        ("theatre", ["atre"], 0, 0),
    ],
)
def test_exact_match_and_f1_are_squads(prediction: str, references: list[str], exact: float, f1: float) -> None:
    assert metrics.exact_match(prediction, references) == exact
    assert metrics.token_f1(prediction, references) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16 - 3 = <<16-3=13>>13\n#### 1,234", "1234"),
        ("#### -7 and then\nQuestion: 2\n#### 8", "-7"),
        ("so it costs $1,000.50.", "1000.5"),
        ("the answer is -5", "-5"),
        ("5-3", "3"),
        ("in all 3.", "3"),
        ("half: .5", "0.5"),
        ("#### $18", "18"),
        ("1,2 and 3,45", "45"),
    ],
)
def test_the_number_of_an_answer(text: str, number: str) -> None:
    assert metrics.number_in(text) == Decimal(number)


def test_texts_without_a_number_match_nothing() -> None:
    assert metrics.number_in("none") is metrics.number_in("") is metrics.number_in("#### none 5") is None
    assert metrics.numeric_match("none", ["5"]) == 0
    assert metrics.numeric_match("it is 5.0 in all", ["7", "#### 5"]) == 1


def test_answers_of_gsm8k_are_read_as_its_own_script_does() -> None:
    official = re.compile(r"#### (\-?[0-9\.\,]+)")  # of openai/grade-school-math, dataset.py
    for line in shared_data("gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)["answer"]
        match = official.search(answer)
        assert match is not None
        assert metrics.number_in(answer) == Decimal(match[1].strip().replace(",", ""))
        assert metrics.numeric_match(answer, [answer]) == 1


def test_distinct_runs_and_repetition_are_counted_over_words() -> None:
    assert metrics.distinct(["a b a b", "a c"], 1) == 3 / 6
    assert metrics.distinct(["a b a b", "a c"], 2) == 3 / 4
    assert metrics.distinct(["", "a"], 2) == 0
    assert metrics.repetition("a b c d a b c d") == 1 - 4 / 5
    assert metrics.repetition("a b c") == metrics.repetition("") == 0
    found = metrics.quality(["a b", ""], [True, False])
    assert (found["ended"], found["distinct_1"], found["repetition"]) == (0.5, 1.0, 0.0)


def test_empty_predictions_have_scores() -> None:
    for package in ("sacrebleu", "rouge_score", "jiwer"):
        pytest.importorskip(package, reason="the extra eval is not installed")
    none, right = ["", ""], [["a b"], ["c"]]
    assert metrics.bleu(none, right)["bleu"] == metrics.chrf(none, right)["chrf"] == 0
    assert metrics.rouge(none, right)["rougeL"] == 0
    assert metrics.word_error_rate(none, right) == metrics.character_error_rate(none, right) == 1


def test_a_missing_package_is_code_7_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for metric, labels in (("bleu", False), ("accuracy", True), ("f1", True), ("wer", False), ("rouge", False)):
        with pytest.raises(MissingError) as caught:
            metrics.require_packages([metric], labels=labels)
        assert caught.value.exit_code == 7 and caught.value.remedy == "pip install 'gptcli[eval]'"
    metrics.require_packages(["f1", "exact_match", "numeric_match", "quality", "perplexity"])
