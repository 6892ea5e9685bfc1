from __future__ import annotations

from array import array
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.evaluation.curves import BINS, Calibration, Collecting, Curves, calibration, keep_curves, kept_curves
from gptcli.evaluation.loss import document_loss
from gptcli.files import cache_root
from tests.tiny import make_model

WINDOW = 16
LENGTHS = (3, 0, 40, 1, 16, 90, 33)
HELD = 100


@pytest.fixture(scope="module")
def documents() -> list[tuple[np.ndarray, int | None]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 300, size), size) for size in LENGTHS]


def collect(model: Any, documents: list, *, stride: int | None = None, batch_tokens: int = 8192) -> tuple[Curves, Any]:
    watch, nats = Collecting(HELD), array("d")
    result = document_loss(
        model,
        watch.reading(iter(documents)),
        prefix_id=0,
        sequence_length=WINDOW,
        stride=stride,
        batch_tokens=batch_tokens,
        per_document=nats,
        watch=watch,
    )
    return watch.curves(), (result, nats)


def plain(model: Any, documents: list, stride: int) -> list[tuple[int, int, int, float, int, float]]:
    """Of each token, in order: document, token, context, nats, likeliest token and its probability; by transformers."""
    found = []
    for number, (ids, _) in enumerate(documents):
        whole, seen, begin = [0, *ids.tolist()], 0, 0
        while seen < len(ids):
            end = min(begin + WINDOW, len(ids))
            with torch.no_grad():
                rows = model(torch.tensor([whole[begin:end]])).logits[0].double().softmax(-1)
            for target in range(seen, end):
                row = rows[target - begin]
                nats, best = -float(row[ids[target]].log()), int(row.argmax())
                found.append((number, int(ids[target]), target - begin + 1, nats, best, float(row[best])))
            seen, begin = end, begin + stride
    return found


@pytest.mark.parametrize("stride", [WINDOW, 5])
@pytest.mark.parametrize("batch_tokens", [1, 50, 8192])
def test_positions_calibration_and_surprise_are_those_of_a_plain_loop(
    documents: list, stride: int, batch_tokens: int
) -> None:
    model = make_model("gemma2" if batch_tokens == 50 else "llama")
    expected = plain(model, documents, stride)
    curves, (result, _) = collect(model, documents, stride=stride, batch_tokens=batch_tokens)
    assert sum(count for _, _, count, _ in curves.positions()) == result.tokens == len(expected)
    ends = {(1, 1), (2, 2), (3, 3), (4, 5), (6, 7), (8, 11), (12, 15), (16, 16)}
    assert {(begin, end) for begin, end, _, _ in curves.positions()} == ends
    for begin, end, count, loss in curves.positions():
        nats = [each[3] for each in expected if begin <= each[2] <= end]
        assert count == len(nats) and loss == pytest.approx(np.mean(nats), rel=1e-4)
    gaps = []
    for low, high, count, sure, right in curves.calibration.rows():
        here = [each for each in expected if low < each[5] <= high]
        assert count == len(here) and sure == pytest.approx(np.mean([each[5] for each in here]), rel=1e-4)
        assert right == pytest.approx(np.mean([each[1] == each[4] for each in here]))
        gaps.append(count * abs(sure - right))
    assert curves.calibration.error == pytest.approx(sum(gaps) / len(expected), rel=1e-6)
    text = curves.text
    assert list(zip(text.documents, text.ids, text.best, strict=True)) == [
        (each[0], each[1], each[4]) for each in expected[:HELD]
    ]
    assert text.nats.tolist() == pytest.approx([each[3] for each in expected[:HELD]], rel=1e-4, abs=1e-5)
    assert text.confidence.tolist() == pytest.approx([each[5] for each in expected[:HELD]], rel=1e-4)


def test_the_loss_is_that_without_a_watch(documents: list) -> None:
    nats = array("d")
    result = document_loss(make_model(), documents, prefix_id=0, sequence_length=WINDOW, per_document=nats)
    _, (watched, losses) = collect(make_model(), documents)
    assert (watched.tokens, watched.bytes, watched.documents) == (result.tokens, result.bytes, result.documents)
    assert watched.nats == pytest.approx(result.nats, rel=1e-12) and list(losses) == pytest.approx(
        list(nats), rel=1e-12
    )


def test_a_probability_at_the_end_of_a_bin_is_in_the_lower_one_as_guo_has_it() -> None:
    sure = np.array([0.1, 0.1001, 0.2, 0.95, 1.0, np.nan], dtype=np.float32)
    found = calibration(sure, np.array([True, False, True, True, True, True]))
    assert found.counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2] and found.right.tolist()[:2] == [1, 1]
    assert found.error == pytest.approx((0.9 + abs(1 - 0.3001) + abs(2 - 1.95)) / 5, rel=1e-5)
    none = Calibration(np.zeros(BINS, dtype=np.int64), np.zeros(BINS), np.zeros(BINS, dtype=np.int64))
    assert none.error is None and none.rows() == [] and none.as_dict()["bins"] == []


def test_tokens_without_a_finite_loss_are_left_out_of_the_bins_and_shown_in_the_text(documents: list) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(documents[2][0][5])] = float("nan")
    curves, (result, _) = collect(model, documents)
    left_out = result.tokens - sum(count for _, _, count, _ in curves.positions())
    assert 0 < left_out < result.tokens and np.isfinite([loss for *_, loss in curves.positions()]).all()
    assert np.isnan(curves.text.nats).any() and np.isfinite(curves.calibration.probability).all()


def test_what_was_collected_is_kept_and_a_damaged_file_is_none(documents: list) -> None:
    curves, _ = collect(make_model(), documents)
    keep_curves("some", curves)
    again = kept_curves("some")
    assert again is not None and again.as_dict() == curves.as_dict()
    for each in fields(curves.text):
        assert np.array_equal(getattr(again.text, each.name), getattr(curves.text, each.name))
    path = cache_root() / "evaluations" / "some-curves.npz"
    path.write_bytes(path.read_bytes()[:-40])
    assert kept_curves("some") is None and kept_curves("none") is None
