from __future__ import annotations

import math
from array import array

import numpy as np
import pytest

from gptcli.errors import UsageError
from gptcli.evaluation.compare import compare
from gptcli.evaluation.loss import document_loss
from gptcli.evaluation.scores import Scores, Sizes, keep, kept
from gptcli.files import cache_root
from tests.tiny import make_model


def scores(nats: np.ndarray, tokens: np.ndarray, size: np.ndarray | None = None) -> Scores:
    size = 4 * tokens if size is None else size
    return Scores(
        nats.astype(np.float64),
        tokens.astype(np.uint32),
        size.astype(np.uint64),
        size.astype(np.uint32),
        (("a", len(nats) - 2), ("b", 2)),
    )


@pytest.fixture
def baseline() -> Scores:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, 80)
    return scores(tokens * rng.normal(3, 0.3, 80), tokens)


def test_the_sums_of_each_document_are_those_of_the_document_alone() -> None:
    rng = np.random.default_rng(0)
    model = make_model()
    documents = [(rng.integers(2, 300, size), int(size)) for size in (0, 1, 40, 7, 200, 16)]
    nats = array("d")
    whole = document_loss(model, documents, prefix_id=0, sequence_length=16, stride=5, per_document=nats)
    alone = [document_loss(model, [one], prefix_id=0, sequence_length=16, stride=5).nats for one in documents]
    assert list(nats) == pytest.approx(alone, rel=1e-6)
    assert math.fsum(nats) == pytest.approx(whole.nats, rel=1e-12)


def test_texts_that_were_read_beyond_the_limit_do_not_count() -> None:
    sizes = Sizes()
    for name, characters in (("a", [3, 4]), ("b", [5, 6, 7]), ("c", [8])):
        sizes.begin(name)
        for count in characters:
            sizes.add_text(count)
    list(sizes.count(iter([(np.arange(2), 9), (np.arange(0), 8), (np.arange(1), 7)])))
    found = sizes.scores(array("d", [1.0, 0.0, 2.0]))
    assert found.sources == (("a", 2), ("b", 1))
    assert (found.result.tokens, found.result.bytes, found.total_characters) == (3, 24, 12)
    assert found.result.loss == 1.0 and found.bits_per_character == pytest.approx(3 / math.log(2) / 12)
    assert [(name, part.result.tokens) for name, part in found.by_source()] == [("a", 2), ("b", 1)]
    sizes.add_text(None)
    assert sizes.scores(array("d", [1.0, 0.0, 2.0])).bits_per_character is None


def test_what_is_kept_is_found_again_in_24_bytes_a_document(baseline: Scores) -> None:
    keep("key", baseline, {"model": "runs/ä\ud800"})
    again = kept("key")
    assert again is not None and again.sources == baseline.sources
    for part in ("nats", "tokens", "bytes", "characters"):
        assert np.array_equal(getattr(again, part), getattr(baseline, part))
    rows = [part.itemsize for part in (again.nats, again.tokens, again.bytes, again.characters) if part is not None]
    assert sum(rows) == 24


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"PK" + data[:50], None])
def test_a_file_that_is_damaged_or_absent_is_as_if_nothing_was_kept(baseline: Scores, damage: object) -> None:
    assert kept("none") is None
    keep("bad", baseline, {})
    path = cache_root() / "evaluations" / "bad.npz"
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else b"\x93NUMPY not an archive")
    assert kept("bad") is None


def test_a_model_beside_itself_is_no_difference(baseline: Scores) -> None:
    found = compare(baseline, baseline)
    assert (found.by, found.difference, found.verdict) == ("loss", 0, "no difference")
    assert found.found is not None and found.found.p == 1


def test_a_difference_that_batches_make_is_none_however_sure(baseline: Scores) -> None:
    found = compare(scores(baseline.nats * (1 + 5e-6), baseline.tokens), baseline)
    assert found.verdict == "no difference" and found.found is not None and found.found.p < 0.01


def test_better_and_worse_and_a_difference_that_could_be_chance(baseline: Scores) -> None:
    rng = np.random.default_rng(5)
    lower = scores(baseline.nats - baseline.tokens * rng.normal(0.05, 0.02, 80), baseline.tokens)
    better, worse = compare(lower, baseline), compare(baseline, lower)
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert better.difference == pytest.approx(lower.result.loss - baseline.result.loss)
    assert better.found is not None and better.found.p < 0.01 and better.found.high < 0
    chance = compare(scores(baseline.nats + baseline.tokens * rng.normal(0, 0.1, 80), baseline.tokens), baseline)
    assert chance.verdict == "no difference" and chance.found is not None and chance.found.p > 0.05


def test_other_tokens_of_the_same_text_are_compared_by_bits_per_byte(baseline: Scores) -> None:
    other = scores(baseline.nats * 0.9, baseline.tokens // 2, 4 * baseline.tokens)
    found = compare(other, baseline)
    assert found.by == "bits_per_byte" and found.verdict == "better"
    assert other.result.bits_per_byte is not None and baseline.result.bits_per_byte is not None
    assert found.difference == pytest.approx(other.result.bits_per_byte - baseline.result.bits_per_byte)


def test_what_cannot_be_compared_is_said(baseline: Scores) -> None:
    broken = scores(np.where(np.arange(80) == 3, np.nan, baseline.nats), baseline.tokens)
    assert compare(broken, baseline).verdict == "not finite" and broken.not_finite().tolist() == [3]
    assert compare(broken, baseline).as_dict()["difference"] is None
    few = scores(np.array([3.0, 4.0, 5.0]), np.array([1, 1, 1]))
    assert compare(scores(few.nats - 1, few.tokens), few).verdict == "too few documents"
    with pytest.raises(UsageError, match="same documents"):
        compare(few, baseline)
