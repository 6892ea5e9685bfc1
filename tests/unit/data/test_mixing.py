"""The sequence of sources: within one of its share in every prefix, periodic, the same however it is asked for."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptcli.data import mixing
from gptcli.data.mixing import Mixture, Proportions
from gptcli.data.report import report_lines, with_rows
from gptcli.errors import DataError

EVEN = st.lists(st.integers(1, 40), min_size=2, max_size=8)
SKEWED = st.lists(st.sampled_from([1, 2, 3, 97, 1000, 10**6 + 3, 10**12, 10**25]), min_size=2, max_size=8)
EQUAL = st.tuples(st.integers(1, 9), st.integers(2, 8)).map(lambda pair: [pair[0]] * pair[1])


def sources_of(mixture: Mixture, count: int) -> NDArray[np.int64]:
    return mixture.locate(np.arange(count, dtype=np.int64))[0]


def plain_schedule(parts: Sequence[int]) -> list[int]:
    """One period, by looking at every job at every slot."""
    period = sum(parts)
    jobs = []
    for source, part in enumerate(parts):
        for job in range(part):
            release, ends = Fraction(job * period, part), Fraction((job + 1) * period, part)
            jobs.append((-(-ends.numerator // ends.denominator), source, release.numerator // release.denominator))
    chosen = []
    for slot in range(period):
        job = min(each for each in jobs if each[2] <= slot)
        assert slot < job[0]
        jobs.remove(job)
        chosen.append(job[1])
    return chosen


@settings(max_examples=150, deadline=None, derandomize=True)
@given(parts=EVEN | SKEWED | EQUAL, block=st.sampled_from([5, 64, 1000]))
def test_every_prefix_has_each_sources_share_to_within_one(parts: list[int], block: int) -> None:
    with patch.object(mixing, "BLOCK", block):
        sources, before = Mixture(parts).locate(np.arange(700, dtype=np.int64))
    had = [0] * len(parts)
    for row, source in enumerate(sources.tolist()):
        assert before[row] == had[source]
        had[source] += 1
        assert all(
            abs(count - Fraction((row + 1) * part, sum(parts))) < 1 for count, part in zip(had, parts, strict=True)
        )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(parts=EVEN | EQUAL, block=st.sampled_from([3, 50, 65536]))
def test_the_schedule_equals_a_plain_simulation_and_comes_round(parts: list[int], block: int) -> None:
    period = sum(parts)
    with patch.object(mixing, "BLOCK", block):
        sources, before = Mixture(parts).locate(np.arange(3 * period, dtype=np.int64))
    assert sources.tolist() == plain_schedule(parts) * 3
    for source, part in enumerate(parts):
        assert before[sources == source].tolist() == list(range(3 * part))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=EVEN | SKEWED,
    rows=st.lists(st.integers(0, 900), max_size=40),
    first=st.integers(0, 900),
    block=st.sampled_from([8, 100]),
)
def test_a_row_is_the_same_in_whatever_order_rows_are_asked_for(
    parts: list[int], rows: list[int], first: int, block: int
) -> None:
    with patch.object(mixing, "BLOCK", block):
        whole = Mixture(parts).locate(np.arange(901, dtype=np.int64))
        mixture = Mixture(parts)
        mixture.locate(np.array([first], dtype=np.int64))
        part = pickle.loads(pickle.dumps(mixture)).locate(np.array(rows, dtype=np.int64))
    assert np.array_equal(part[0], whole[0][rows]) and np.array_equal(part[1], whole[1][rows])


def test_far_rows_cost_no_more_than_a_period() -> None:
    mixture = Mixture([7, 3])
    sources, before = mixture.locate(np.array([10**15, 10**15 + 9], dtype=np.int64))
    assert sources.tolist() == sources_of(mixture, 10)[[0, 9]].tolist()
    assert before.sum() in (2 * 7 * 10**14 + 6, 10**15 + 2, 2 * 3 * 10**14 + 2)
    assert sum(len(block) for block in mixture._blocks) == 10


def test_the_schedule_of_seven_to_three_never_changes() -> None:
    assert sources_of(Mixture([7, 3]), 10).tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert sources_of(Mixture([1, 1, 1]), 6).tolist() == [0, 1, 2, 0, 1, 2]


def test_one_source_and_a_source_of_nothing() -> None:
    rows = np.array([0, 5, 10**17], dtype=np.int64)
    for parts, source in (([1], 0), ([0, 1, 0], 1)):
        sources, before = Mixture(parts).locate(rows)
        assert sources.tolist() == [source] * 3 and before.tolist() == rows.tolist()


def test_many_sources_need_two_bytes_a_row() -> None:
    assert sources_of(Mixture([1] * 300), 301).tolist() == [*range(300), 0]


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.7, 0.3], (7, 3)),
        ([1.0, 2.0, 3.0], (1, 2, 3)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        ([70.0, 30.0], (7, 3)),
        ([1e-3, 1.5], (1, 1500)),
        ([1e-300, 1.0], (1, 10**300)),
        ([5.0, 5.0], (1, 1)),
        (None, (2, 3)),
    ],
)
def test_proportions_are_the_exact_ratio_of_the_weights_as_written(
    weights: list[float] | None, parts: tuple[int, ...]
) -> None:
    assert Proportions.of([4, 6, 5][: len(parts)], weights).parts == parts


def test_shares_and_epochs() -> None:
    mixed = Proportions.of([10, 100], [0.7, 0.3])
    assert mixed.shares == [0.7, 0.3]
    assert mixed.epochs(110) == pytest.approx([7.7, 0.33])
    assert Proportions.of([10, 0, 30]).epochs(80) == [2.0, 0.0, 2.0]


def test_the_report_says_each_sources_share_and_epochs() -> None:
    stored = {
        "train": {
            **numbers(131 + 1281),
            "sources": [{"name": "a.txt", **numbers(131)}, {"name": "b", **numbers(1281)}],
        },
        "validation": None,
        "dropped": {},
        "duplicates": 0,
    }
    weighted = with_rows(stored, 10, [0.7, 0.3])
    assert [(source["weight"], source["epochs"]) for source in weighted["train"]["sources"]] == [
        (0.7, round(0.7 * 141 / 13, 4)),
        (0.3, round(0.3 * 141 / 128, 4)),
    ]
    assert (weighted["rows"], weighted["rows_by_source"], weighted["unused_tail_tokens"]) == (141, [13, 128], 0)
    assert any("70% of the rows, 7.59 epochs" in line for line in report_lines(weighted))
    plain = with_rows(stored, 10)
    assert [source["epochs"] for source in plain["train"]["sources"]] == [1.0, 1.0]
    assert sum(source["weight"] for source in plain["train"]["sources"]) == pytest.approx(1)
    assert "weight" not in str(stored)
    with pytest.raises(DataError, match=r"a\.txt has a weight but not one row"):
        with_rows(stored, 500, [1.0, 1.0])


def numbers(tokens: int) -> dict[str, Any]:
    counts = {"documents": 1, "bytes": tokens, "tokens": tokens, "bytes_per_token": 1.0, "document_tokens": {}}
    return {**counts, "with_nul": 0, "specials_in_text": 0, "longest": [], "strangest": []}
