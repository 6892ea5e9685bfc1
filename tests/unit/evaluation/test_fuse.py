"""The mean of several models, beside one that is computed from whole logits."""

from __future__ import annotations

import json
from array import array
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcli.errors import UsageError
from gptcli.evaluation import fuse
from gptcli.evaluation.corpus import from_recipe
from gptcli.evaluation.curves import Collecting
from gptcli.evaluation.evaluate import Evaluation, Options, evaluate
from gptcli.evaluation.fuse import MeanOfTokens, fuse_losses, mean_over_labels
from gptcli.evaluation.loss import document_loss
from gptcli.evaluation.scores import Sizes
from gptcli.evaluation.windows import Document
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.tiny import make_model, save_model

LENGTHS = (0, 1, 5, 16, 17, 50, 33, 0)
WINDOW = 16
WAYS = (("llama", None), ("gpt2", 5), ("qwen3", 16))


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 300, size), 3 * size) for size in LENGTHS]


def probabilities(model: torch.nn.Module, ids: list[int], stride: int) -> list[float]:
    """Of each token of a document, one window at a time, from the softmax of all logits."""
    whole, found, begin = [0, *ids], [], 0
    while len(found) < len(ids):
        inputs = torch.tensor([whole[begin : begin + WINDOW]])
        with torch.no_grad():
            every = model(inputs).logits[0].double().softmax(-1)
        targets = whole[begin + 1 : begin + WINDOW + 1]
        found += [float(every[at, targets[at]]) for at in range(len(found) - begin, len(targets))]
        begin += stride
    return found


@pytest.mark.parametrize("in_memory", [64, 1 << 20])
def test_a_token_has_the_mean_of_the_models_probabilities_whatever_their_windows(
    documents: list[Document], in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "IN_MEMORY", in_memory)
    expected, plain = [], []
    with closing(MeanOfTokens(len(WAYS))) as mean:
        for kind, stride in WAYS:
            model, sizes, nats = make_model(kind), Sizes(), array("d")
            inner = Collecting() if stride else None  # what is seen of a page's pictures changes nothing
            read = sizes.count(iter(documents))
            document_loss(
                model,
                read if inner is None else inner.reading(read),
                prefix_id=0,
                sequence_length=WINDOW,
                stride=stride,
                batch_tokens=40,
                per_document=nats,
                watch=mean.watch(sizes, inner),
            )
            expected.append([probabilities(model, ids.tolist(), stride or WINDOW) for ids, _ in documents])
            plain.append(list(nats))
        found = mean.nats(len(documents))
    for own, each in zip(plain, expected, strict=True):
        assert own == pytest.approx([-np.log(part).sum() for part in each], rel=1e-5)
    by_hand = [-np.log(np.mean(each, axis=0)).sum() for each in zip(*expected, strict=True)]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_labels_have_the_mean_of_probabilities_over_the_labels_alone() -> None:
    one = np.log([[0.02, 0.06], [0.3, 0.1]])
    other = np.array([[np.log(0.5), np.log(0.1)], [np.log(0.001), -np.inf]])
    found = np.exp(mean_over_labels([one, other]))
    np.testing.assert_allclose(found, [[(1 / 4 + 5 / 6) / 2, (3 / 4 + 1 / 6) / 2], [7 / 8, 1 / 8]])
    np.testing.assert_allclose(mean_over_labels([one, one]), np.log([[1 / 4, 3 / 4], [3 / 4, 1 / 4]]))


def test_rows_of_which_a_part_is_learnt_are_fused_by_the_places_of_their_tokens(tmp_path: Path) -> None:
    """Rows are cut into pieces, and of each some tokens count: a model beside itself is itself, row by row."""
    folder = save_model(tmp_path / "model")
    rows = [{"prompt": f"the cat {i}", "completion": " sat on the mat" * (i % 5 + 1)} for i in range(12)]
    for name, those in (("rows", rows), ("train", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those))
    recipe = {"tokenizer": {"from": str(folder)}, "model": {"from": str(folder)}}
    data = {
        "train": "train.jsonl",
        "validation": ["rows.jsonl"],
        "format": "prompt",
        "prompt": "{prompt}",
        "completion": "{completion}",
    }

    def scored(length: int, overlong: str, mean: MeanOfTokens) -> Evaluation:
        cut = {"sequence_length": length, "overlong": overlong, "packing": "none"}
        (tmp_path / "r.yaml").write_text(json.dumps({**recipe, "data": {**data, **cut}}))
        loaded = load_recipe(str(tmp_path / "r.yaml"))
        return evaluate(folder, from_recipe(loaded), Options(precision="fp32"), Silent(), loaded, fusing=mean)

    with closing(MeanOfTokens(2)) as mean:
        both = [scored(8, "split", mean) for _ in range(2)]
        found = fuse_losses(both, mean)
    assert found.model == f"mean of {folder}, {folder}" and max(both[0].scores.tokens) > 8
    np.testing.assert_allclose(found.scores.nats, both[0].scores.nats, rtol=1e-6)
    for first, second in (((8, "split"), (12, "drop")), ((12, "drop"), (8, "split"))):
        with closing(MeanOfTokens(2)) as mean, pytest.raises(UsageError, match="not scored on the same tokens"):
            fuse_losses([scored(*first, mean), scored(*second, mean)], mean)
