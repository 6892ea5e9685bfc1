from __future__ import annotations

import numpy as np
import pytest

from gptcli.evaluation import intervals
from gptcli.evaluation.intervals import LEAST_DOCUMENTS, ratio


def documents(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of documents whose lengths are very unequal and whose loss depends on them."""
    tokens = np.maximum(1, np.exp(rng.normal(5, 0.7, count))).round()
    loss = 3 - 0.1 * np.log(tokens / 150) + 0.4 * rng.normal(size=count) + 0.5 * rng.normal(size=count) / tokens**0.5
    return loss * tokens, tokens


@pytest.fixture(scope="module")
def truth() -> float:
    nats, tokens = documents(np.random.default_rng(9), 1_000_000)
    return float(nats.sum() / tokens.sum())


@pytest.mark.parametrize("count", [50, 300])
def test_intervals_hold_the_truth_in_93_to_97_of_100_cases(truth: float, count: int) -> None:
    rng = np.random.default_rng(3)
    found = [ratio(*documents(rng, count), draws=300, seed=case) for case in range(1000)]
    covered = np.mean([each is not None and each.low <= truth <= each.high for each in found])
    assert 0.93 <= covered <= 0.97


def test_groups_of_many_documents_give_the_interval_of_the_documents(
    truth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats, tokens = documents(np.random.default_rng(1), 20_000)
    order = np.argsort(nats / tokens)  # the worst for groups that are not drawn at random
    grouped = ratio(nats[order], tokens[order])
    monkeypatch.setattr(intervals, "GROUPS", 20_000)
    single = ratio(nats, tokens, draws=400)
    assert grouped is not None and single is not None
    assert grouped.value == pytest.approx(single.value, rel=1e-12)
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.15)


def test_p_values_of_no_difference_are_uniform() -> None:
    rng = np.random.default_rng(4)
    found = []
    for case in range(600):
        tokens = np.exp(rng.normal(4, 0.7, 60)).round() + 1
        each = ratio(rng.normal(size=60) * tokens, tokens, draws=300, seed=case)
        assert each is not None
        found.append(each.p)
    assert 0.03 <= np.mean(np.array(found) < 0.05) <= 0.075
    assert 0.4 <= np.mean(np.array(found) < 0.5) <= 0.6


def test_one_seed_gives_one_interval_and_a_difference_is_sure_where_every_document_has_it() -> None:
    nats, tokens = documents(np.random.default_rng(1), 100)
    assert ratio(nats, tokens, seed=7) == ratio(nats, tokens, seed=7) != ratio(nats, tokens, seed=8)
    sure = ratio(-nats, tokens)
    assert sure is not None and sure.p < 0.001 and sure.share == 1
    assert sure.low < sure.value < sure.high < 0


def test_documents_that_are_alike_have_an_interval_of_one_point() -> None:
    found = ratio(np.full(20, 3.3), np.full(20, 3))
    assert found is not None and found.low == pytest.approx(1.1) == found.high and found.p < 0.001
    none = ratio(np.zeros(20), np.full(20, 3))
    assert none is not None and (none.value, none.low, none.high, none.p) == (0, 0, 0, 1)
    one = ratio(np.array([9.0] + [1.0] * 11), np.ones(12))
    assert one is not None and np.isfinite([one.low, one.high]).all() and one.low < one.value < one.high


@pytest.mark.parametrize(
    ("over", "under"),
    [
        (np.ones(LEAST_DOCUMENTS - 1), np.ones(LEAST_DOCUMENTS - 1)),
        (np.full(20, np.nan), np.ones(20)),
        (np.zeros(20), np.zeros(20)),
        (np.empty(0), np.empty(0)),
    ],
)
def test_where_nothing_can_be_said_there_is_no_interval(over: np.ndarray, under: np.ndarray) -> None:
    assert ratio(over, under) is None


def test_draws_of_documents_without_a_token_are_no_error() -> None:
    found = ratio(np.array([5.0, 4.0] + [0.0] * 18), np.array([2, 2] + [0] * 18))
    assert found is not None and np.isfinite([found.low, found.high]).all()
