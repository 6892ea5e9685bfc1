from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcli.errors import RecipeError
from gptcli.model.build import TokenIds, build_config, build_model, count_parameters, counts_of, uses_a_matrix_twice
from gptcli.recipe.load import LoadedRecipe, load_recipe
from tests.tiny import make_model

IDS = TokenIds(vocab_size=258, bos=256, eos=256, pad=257)


def recipe(tmp_path: Path, model: str) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(f"data: {{train: builtin:pydocs, sequence_length: 16}}\nmodel: {model}\n")
    return load_recipe(str(path))


TINY = "config: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}"


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gpt2",
        "qwen3",
        "mistral",
        "gemma3_text",
        "opt",
        "gpt_neox",
        "phi3",
        "olmo2",
        "mixtral",
        "bloom",
        "falcon",
    ],
)
def test_any_causal_type_is_built_small_and_counts_its_parameters(tmp_path: Path, model_type: str) -> None:
    loaded = recipe(tmp_path, f"{{type: {model_type}, {TINY}}}")
    config, _ = build_config(loaded, IDS)
    model = build_model(loaded, config, seed=1, attention=None)
    assert model.config.vocab_size == 258
    logits = model(torch.arange(16)[None]).logits
    assert logits.shape == (1, 16, 258)
    counts = counts_of(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts == replace(count_parameters(config), kept=None, kept_half=None)
    # Small in every dimension: nothing kept the width of the type's default.
    assert counts.total < 300_000


def test_the_mlp_keeps_the_proportions_of_the_type(tmp_path: Path) -> None:
    config, _ = build_config(recipe(tmp_path, "{type: llama, preset: 10m}"), IDS)
    assert config.intermediate_size == 1024  # 11008 / 4096 * 384 = 1032, to a multiple of 64
    config, _ = build_config(recipe(tmp_path, "{type: llama, preset: 10m, config: {intermediate_size: 1000}}"), IDS)
    assert config.intermediate_size == 1000


def test_config_wins_over_the_preset_under_the_types_own_names_too(tmp_path: Path) -> None:
    config, _ = build_config(recipe(tmp_path, "{type: gpt2, preset: 1m, config: {n_layer: 3}}"), IDS)
    assert (config.num_hidden_layers, config.hidden_size) == (3, 128)


def test_dropout_is_zero_and_gelu_is_fused_unless_asked_and_both_are_said(tmp_path: Path) -> None:
    config, notes = build_config(recipe(tmp_path, f"{{type: gpt2, {TINY}}}"), IDS)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    assert config.activation_function == "gelu_pytorch_tanh"
    assert any("dropout" in note for note in notes)
    assert any("gelu" in note for note in notes)
    asked = "{type: gpt2, config: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, attn_pdrop: 0.2}}"
    assert build_config(recipe(tmp_path, asked), IDS)[0].attn_pdrop == 0.2


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, f"{{type: llama, {TINY}}}")
    config, _ = build_config(loaded, IDS)
    one, same, other = (build_model(loaded, config, seed=seed, attention=None) for seed in (1, 1, 2))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("{type: lama, preset: 1m}", "Did you mean llama"),
        ("{type: bert, preset: 1m}", "looks at later tokens"),
        ("{type: t5, preset: 1m}", "not a causal language model"),
        ("{type: llama, config: {hiden_size: 64}}", "Did you mean hidden_size"),
        ("{type: llama, config: {hidden_size: 30, num_attention_heads: 4}}", "does not make a model"),
        ("{type: llama, config: {num_hidden_layers: many}}", "does not make a model"),
    ],
)
def test_a_model_that_cannot_be_is_a_recipe_error_with_its_line(tmp_path: Path, model: str, says: str) -> None:
    loaded = recipe(tmp_path, model)
    with pytest.raises(RecipeError) as caught:
        config, _ = build_config(loaded, IDS)
        build_model(loaded, config, seed=1, attention=None)
    assert says in "\n".join(caught.value.lines())
    assert "r.yaml:2" in str(caught.value.where)


def test_a_matrix_that_two_layers_share_is_found_and_a_tied_head_is_none() -> None:
    for model in (make_model("llama"), make_model("llama", tie_word_embeddings=True), make_model("gpt2")):
        assert not uses_a_matrix_twice(model)
    model = make_model("llama")
    model.model.layers[1] = model.model.layers[0]
    assert uses_a_matrix_twice(model)
