"""Rows that are divided over processes (`launch.parallel.cp`): windows, and models for which that is not right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import team
from tests.conftest import make_project
from tests.runs import Forks, lines

SETTINGS = ("pretrain", "tiny.yaml", "train.max_steps=3", "train.log_every=1", "train.save_every=0")
DIVIDED = ("launch.parallel.cp=2",)
SIZES = "num_hidden_layers: 2, hidden_size: 32"


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    "model",
    [
        # Shorter than a piece of a row, and longer; grouped queries.
        f"{{type: mistral, config: {{{SIZES}, num_attention_heads: 4, num_key_value_heads: 2, sliding_window: 5}}}}",
        f"{{type: mistral, config: {{{SIZES}, num_attention_heads: 4, num_key_value_heads: 4, sliding_window: 20}}}}",
        f"{{type: gemma3_text, config: {{{SIZES}, num_attention_heads: 4, num_key_value_heads: 1, head_dim: 8, "
        "sliding_window: 9, layer_types: [sliding_attention, full_attention]}}",
    ],
    ids=["short", "long", "alternating"],
)
def test_a_window_goes_over_the_pieces_of_a_row(tmp_path: Path, forks: Forks, model: str) -> None:
    folder = make_project(tmp_path)
    team.run(forks, 1, *SETTINGS, f"model={model}", "name=one", cwd=folder)
    team.run(forks, 2, *SETTINGS, *DIVIDED, f"model={model}", "name=two", cwd=folder)
    one, two = ([line["loss"] for line in lines(folder / "runs" / name) if "loss" in line] for name in ("one", "two"))
    assert len(one) == 3
    assert np.allclose(one, two, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            f"{{type: mamba, config: {{{SIZES}}}}}",
            "MambaForCausalLM has an attention of its own, which sees one process's tokens",
        ),
        # Attention and short convolutions, which would begin anew in each piece.
        (
            f"{{type: lfm2, config: {{{SIZES}, num_attention_heads: 4, num_key_value_heads: 2, "
            "layer_types: [full_attention, conv]}}",
            "Lfm2ForCausalLM cannot take divided rows (model.layers.1.conv.out_proj gives something else)",
        ),
    ],
    ids=["recurrence", "convolution"],
)
def test_a_model_that_would_give_other_logits_is_refused_before_the_first_step(
    tmp_path: Path, forks: Forks, model: str, said: str
) -> None:
    folder = make_project(tmp_path)
    ended = team.start(forks, 2, *SETTINGS, *DIVIDED, "model.config=null", f"model={model}", cwd=folder).finish()
    assert [done.code for done in ended] == [2, 2], ended
    assert ended[0].err.endswith(f"error: launch.parallel.cp: {said}\n  Set launch.parallel.cp: 1.\n")
    assert not list((folder / "runs" / "tiny").glob("checkpoint-*"))
