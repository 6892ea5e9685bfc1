from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CheckpointError, MissingError
from gptcli.model.folder import absurd_size, check_config, check_index, check_weights


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 126, "hidden_size": 16_384, "num_attention_heads": 128, "vocab_size": 262_144},
        {"n_layer": 96, "n_embd": 12_288, "n_head": 96, "n_positions": 2**31, "n_inner": None},
        {"num_experts": 512, "n_routed_experts": 384, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        {"vision_feature_layer": -2, "rope_theta": 10_000_000_000, "max_position_embeddings": 10**30},
        {"num_hidden_layers": True, "hidden_size": "x", "sliding_window": 2**40, "eos_token_id": -1},
    ],
)
def test_sizes_of_real_models_are_taken(fields: dict[str, Any]) -> None:
    assert absurd_size(fields) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 1_001},
        {"num_layers": -1},
        {"encoder_layers": 10**6},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"num_local_experts": 10**6},
        {"hidden_size": 10**9},
        {"moe_intermediate_size": 10**9},
        {"d_model": 10**9},
        {"num_key_value_heads": 10**9},
        {"head_dim": 10**9},
    ],
)
def test_sizes_that_no_model_has_are_named(fields: dict[str, Any]) -> None:
    (key,) = fields
    assert (absurd_size(fields) or "").startswith("num_hidden_layers" if key == "text_config" else key)


def test_a_kernel_of_the_hub_is_allowed_only_with_trust() -> None:
    for fields in ({"attn_implementation": "a/b"}, {"text_config": {"experts_implementation": {"": "a/b"}}}):
        with pytest.raises(MissingError, match="kernel 'a/b'"):
            check_config(fields, "config.json", trust_remote_code=False)
        check_config(fields, "config.json", trust_remote_code=True)
    check_config({"attn_implementation": "flash_attention_2"}, "config.json", trust_remote_code=False)


@pytest.mark.parametrize("name", ["w.bin", "../w.safetensors", "/w.safetensors", "a/w.safetensors", "", 1, None, ["w"]])
def test_an_index_names_safetensors_beside_it_and_nothing_else(tmp_path: Path, name: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "w.safetensors"}}))
    assert check_index(index) == [tmp_path / "w.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "w.safetensors", "b": name}}))
    with pytest.raises(CheckpointError):
        check_index(index)


def test_whole_weights_go_before_an_index_as_transformers_has_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("damaged")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert check_weights(tmp_path, {}) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not an index"):
        check_weights(tmp_path, {})
