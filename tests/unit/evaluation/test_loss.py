from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from gptcli.errors import DataError, UsageError
from gptcli.evaluation import loss as loss_module
from gptcli.evaluation import windows
from gptcli.evaluation.loss import LossResult, document_loss
from tests.tiny import make_model

LENGTHS = (0, 1, 5, 16, 17, 50, 33)
WINDOW = 16
KINDS = ("llama", "gpt2", "qwen3", "gemma2")


@pytest.fixture(scope="module")
def documents() -> list[tuple[np.ndarray, int | None]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 300, size), 3 * size) for size in LENGTHS]


def naive(model: torch.nn.Module, documents: list, prefix: int, window: int, stride: int) -> tuple[float, int]:
    """One forward pass a window, one window at a time, each target by hand."""
    total, count = 0.0, 0
    for ids, _ in documents:
        whole = [prefix, *ids.tolist()]
        seen = 0
        begin = 0
        while seen < len(ids):
            inputs, targets = whole[begin : begin + window], whole[begin + 1 : begin + window + 1]
            inputs = inputs[: len(targets)]
            with torch.no_grad():
                scores = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
            for position, target in enumerate(targets):
                if begin + position >= seen:
                    total -= float(scores[position, target])
                    count += 1
            seen = begin + len(targets)
            begin += stride
    return total, count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [None, 1, 7, 16])
def test_equals_a_naive_loop_and_scores_every_token_once(kind: str, stride: int | None, documents: list) -> None:
    model = make_model(kind)
    expected, count = naive(model, documents, 0, WINDOW, stride or WINDOW)
    result = document_loss(model, documents, prefix_id=0, sequence_length=WINDOW, stride=stride)
    assert result.tokens == count == sum(LENGTHS)
    assert result.documents == len(LENGTHS)
    assert result.bytes == 3 * sum(LENGTHS)
    assert result.loss == pytest.approx(expected / count, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_does_not_depend_on_the_batch_size(kind: str, documents: list) -> None:
    model = make_model(kind)
    losses = [
        document_loss(model, documents, prefix_id=0, sequence_length=WINDOW, stride=5, batch_tokens=size).loss
        for size in (1, 40, 100, 8192)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_padding_with_the_prefix_token_is_harmless_where_the_config_calls_it_padding(documents: list) -> None:
    model = make_model("llama", pad_token_id=0)
    expected, count = naive(model, documents, 0, WINDOW, WINDOW)
    result = document_loss(model, documents, prefix_id=0, sequence_length=WINDOW)
    assert result.loss == pytest.approx(expected / count, rel=1e-5)


def test_logits_in_small_blocks_give_the_same_loss(documents: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("llama", "gemma2"):
        model = make_model(kind)
        whole = document_loss(model, documents, prefix_id=0, sequence_length=WINDOW).loss
        monkeypatch.setattr(loss_module, "LOGIT_BYTES", 4 * 300 * 3)
        assert document_loss(model, documents, prefix_id=0, sequence_length=WINDOW).loss == pytest.approx(
            whole, rel=1e-6
        )
        monkeypatch.undo()


def test_a_longer_context_by_stride_never_scores_the_first_window_twice(documents: list) -> None:
    scored = [
        (window.document, window.length, window.scored)
        for window in windows.document_windows(0, documents[5][0], 0, WINDOW, 10)
    ]
    assert [count for _, _, count in scored] == [16, 10, 10, 10, 4]
    assert sum(count for _, _, count in scored) == 50


def test_mode_of_every_module_and_random_state_are_left_alone(documents: list) -> None:
    model = make_model("gpt2", attn_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = document_loss(model, documents, prefix_id=0, sequence_length=WINDOW)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert first == document_loss(model.eval(), documents, prefix_id=0, sequence_length=WINDOW)


def test_training_goes_on_after_an_evaluation() -> None:
    model = make_model("llama").train()
    document_loss(model, [(np.arange(2, 40), None)], prefix_id=0, sequence_length=WINDOW)
    ids = torch.arange(2, 18)[None]
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_one_and_two_threads_give_one_result(use_threads: Callable[[int], None]) -> None:
    rng = np.random.default_rng(0)
    documents = [(rng.integers(2, 300, size), int(size)) for size in (1, 40, 7, 200, 16, 90)]
    found = []
    for threads in (1, 2):
        use_threads(threads)
        found.append(
            document_loss(make_model(), documents, prefix_id=0, sequence_length=WINDOW, batch_tokens=2 * WINDOW)
        )
        assert torch.get_num_threads() == threads
    assert found[0].nats == pytest.approx(found[1].nats, rel=1e-6)
    assert (found[0].tokens, found[0].bytes, found[0].documents) == (found[1].tokens, found[1].bytes, 6)


def test_an_error_in_one_of_two_threads_is_raised(use_threads: Callable[[int], None]) -> None:
    use_threads(2)
    model = make_model()
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("a batch that fails")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a batch that fails"):
        document_loss(model, [(np.full(400, 7), None)], prefix_id=0, sequence_length=WINDOW, batch_tokens=2 * WINDOW)
    assert not any(thread.name.startswith("scoring") for thread in threading.enumerate())


@pytest.mark.parametrize("threads, at_once", [(1, 0), (2, 2)])
def test_documents_are_streamed_through_a_bounded_buffer(
    monkeypatch: pytest.MonkeyPatch, use_threads: Callable[[int], None], threads: int, at_once: int
) -> None:
    use_threads(threads)
    read = 0

    def endless(count: int) -> Iterator[tuple[np.ndarray, int | None]]:
        nonlocal read
        for _ in range(count):
            read += 1
            yield np.full(WINDOW, 7), None

    monkeypatch.setattr(windows, "BUFFERED_BATCHES", 2)
    ahead = []
    result = document_loss(
        make_model(),
        endless(100),
        prefix_id=0,
        sequence_length=WINDOW,
        batch_tokens=4 * WINDOW,
        on_progress=lambda tokens: ahead.append(read - tokens // WINDOW),
    )
    assert result.tokens == 100 * WINDOW
    assert result.bytes is None and result.bits_per_byte is None
    assert max(ahead) <= 8 + 4 * at_once  # two buffered batches, and those that are worked on


def test_tokens_of_another_tokenizer_are_an_error_that_names_the_document() -> None:
    with pytest.raises(DataError, match=r"token 300 in document 2, but the model knows 300 tokens"):
        document_loss(make_model(), [(np.array([5]), 1), (np.array([5, 300]), 2)], prefix_id=0, sequence_length=WINDOW)


@pytest.mark.parametrize(("window", "stride"), [(0, None), (8, 0), (8, 9), (8, -1)])
def test_windows_that_make_no_sense_are_refused(window: int, stride: int | None) -> None:
    with pytest.raises(UsageError):
        document_loss(make_model(), [(np.array([5]), 1)], prefix_id=0, sequence_length=window, stride=stride)


def test_figures_follow_from_the_sums() -> None:
    result = LossResult(nats=20.0, tokens=10, bytes=40, documents=2)
    assert result.loss == 2.0
    assert result.perplexity == math.exp(2.0)
    assert result.bits_per_byte == pytest.approx(20 / math.log(2) / 40)
    assert LossResult(nats=1e6, tokens=1, bytes=1, documents=1).perplexity == math.inf
    assert math.isnan(LossResult(nats=0.0, tokens=0, bytes=0, documents=0).loss)


def test_a_model_that_gives_nan_gives_a_loss_that_says_so() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert math.isnan(document_loss(model, [(np.array([5, 6]), 2)], prefix_id=0, sequence_length=WINDOW).loss)
