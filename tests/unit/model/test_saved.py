"""Weights as `save_pretrained` writes them, read by the names of the model that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcli.model.saved import saved_state
from tests.tiny import make_model

MIXTURE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "qwen3_moe": MIXTURE,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "llama": {"tie_word_embeddings": True},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_models_weights_come_back_to_the_last_bit_under_its_own_names(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, **MODELS[kind])
    model.save_pretrained(tmp_path)
    state, own = saved_state(model, tmp_path), model.state_dict()
    fused = [name for name in own if name not in load_file(tmp_path / "model.safetensors") and name in state]
    assert bool(fused) == (kind in ("qwen3_moe", "olmoe", "mixtral"))
    assert all(torch.equal(values, own[name]) for name, values in state.items())
    other = make_model(kind, **MODELS[kind])
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(state, strict=False)
    assert all(torch.equal(values, own[name]) for name, values in other.state_dict().items())


def test_tensors_that_are_lacking_and_unknown_ones_are_told(tmp_path: Path) -> None:
    model = make_model("qwen3_moe", **MIXTURE)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)
    saved["stranger"] = saved.pop("model.norm.weight")
    for expert in range(4):
        saved.pop(f"model.layers.1.mlp.experts.{expert}.down_proj.weight")
    save_file(saved, path, metadata={"format": "pt"})
    told = model.load_state_dict(saved_state(model, tmp_path), strict=False)
    assert sorted(told.missing_keys) == ["model.layers.1.mlp.experts.down_proj", "model.norm.weight"]
    assert told.unexpected_keys == ["stranger"]
