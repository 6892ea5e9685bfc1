from __future__ import annotations

import pytest
import torch

from gptcli.model.resize import resize
from tests.tiny import make_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_new_rows_are_the_mean_of_the_old_ones_which_stay(kind: str, tied: bool) -> None:
    model = make_model(kind, tie_word_embeddings=tied)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    state = torch.get_rng_state()
    resize(model, 303)
    assert torch.equal(state, torch.get_rng_state())
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) is tied and model.config.vocab_size == 303
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:300], old)
        torch.testing.assert_close(new[300:], old.mean(0).expand(3, -1))


def test_rows_that_no_training_has_seen_become_the_mean_of_the_others() -> None:
    model = make_model()
    before = model.get_input_embeddings().weight.clone()
    resize(model, 300, [298, 299])
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:298], before[:298]) and len(after) == 300
    torch.testing.assert_close(after[298:], before[:298].mean(0).expand(2, -1))


def test_a_model_is_never_made_smaller() -> None:
    model = make_model()
    before = model.get_input_embeddings().weight
    resize(model, 10)
    assert model.get_input_embeddings().weight is before
