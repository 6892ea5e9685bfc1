"""The likelihood of labels against a plain loop of transformers, one prompt and label at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptcli.errors import UsageError
from gptcli.evaluation.classify import calibrated, label_ids, log_likelihoods, normalized, shared_passes
from tests.tiny import make_model, shared_tokenizer

PROMPTS = [[0], [5, 6, 7], [9] * 30, [11, 12, 13, 14]]


def plain(model: torch.nn.Module, prompt: list[int], label: list[int]) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, *label]])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(prompt) - 1 + index, token]) for index, token in enumerate(label))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_likelihoods_are_those_of_a_plain_loop(kind: str) -> None:
    model = make_model(kind)
    labels = [[20], [20, 21], [20, 21, 22, 23, 24], [30, 31]]
    found = log_likelihoods(model, PROMPTS, labels, pad_id=1)
    expected = [[plain(model, prompt, label) for label in labels] for prompt in PROMPTS]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_labels_whose_inputs_begin_alike_share_a_pass() -> None:
    assert shared_passes([[5], [6], [7]]) == [((), [0, 1, 2])]
    labels = [[20], [20, 21], [20, 21, 22], [30, 31], [30, 32]]
    assert shared_passes(labels) == [((20, 21), [2, 1, 0]), ((30,), [3, 4])]


def test_many_rows_and_small_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 300, (1 + i % 23,), generator=draw).tolist() for i in range(60)]
    labels = [[20], [21], [20, 21], [30, 31, 32]]
    whole = log_likelihoods(model, prompts, labels, pad_id=1)
    monkeypatch.setattr("gptcli.evaluation.loss.CPU_BATCH_TOKENS", 40)
    monkeypatch.setattr("gptcli.evaluation.loss.LOGIT_BYTES", 4 * 300 * 3)
    np.testing.assert_allclose(log_likelihoods(model, prompts, labels, pad_id=1), whole, rtol=1e-5)
    np.testing.assert_allclose(whole[7], [plain(model, prompts[7], label) for label in labels], rtol=1e-5)


def test_a_mean_is_a_tokens() -> None:
    scores = np.array([[-4.0, -6.0]])
    assert normalized(scores, [[1], [1, 2, 3]]).tolist() == [[-4.0, -2.0]]


def test_calibration_divides_by_what_the_model_prefers_anyway() -> None:
    scores = np.log(np.array([[0.6, 0.3]]))
    empty = np.log(np.array([[0.09, 0.01], [0.7, 0.3]]))
    mean = (np.array([0.9, 0.1]) + np.array([0.7, 0.3])) / 2
    np.testing.assert_allclose(np.exp(calibrated(scores, empty)), [np.array([2 / 3, 1 / 3]) / mean])
    assert calibrated(scores, empty).argmax() == 1


def test_labels_that_begin_one_another_end_with_the_text() -> None:
    tokenizer = shared_tokenizer()
    ids, ended = label_ids(tokenizer, ["no", "no way"], by="likelihood")
    assert ended and [each[-1] for each in ids] == [0, 0] and ids[1][: len(ids[0]) - 1] == ids[0][:-1]
    apart, ended = label_ids(tokenizer, ["no", "no way"], by="normalized")
    assert not ended and [[*each, 0] for each in apart] == ids
    assert label_ids(tokenizer, ["no", "yes"], by="likelihood")[1] is False


def test_with_the_end_of_text_the_longer_label_can_win() -> None:
    model, tokenizer = make_model(), shared_tokenizer()
    ids, _ = label_ids(tokenizer, ["no", "no way"], by="likelihood")
    found = log_likelihoods(model, PROMPTS, ids, pad_id=1)
    np.testing.assert_allclose(found, [[plain(model, prompt, each) for each in ids] for prompt in PROMPTS], rtol=1e-5)


def test_labels_of_the_same_tokens_or_of_none_are_refused() -> None:
    tokenizer = shared_tokenizer()
    with pytest.raises(UsageError, match="same tokens"):
        label_ids(tokenizer, ["yes", "yes"], by="likelihood")
    with pytest.raises(UsageError, match="no tokens"):
        label_ids(tokenizer, ["", "yes"], by="likelihood")
