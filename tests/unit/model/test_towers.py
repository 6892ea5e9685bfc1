"""Towers and language models, found in any family: what is frozen, and where an adapter goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import RecipeError
from gptcli.model.adapt import freeze, put_adapter
from gptcli.model.build import TokenIds, build_config, build_model
from gptcli.model.towers import is_frozen, language_model, towers
from gptcli.recipe.load import LoadedRecipe, load_recipe
from tests.media import TINY

# By transformers' names: the tower, the language model, and what joins them (qwen2_vl's is in the tower).
PARTS = {
    "llava": ("vision_tower", "language_model", "multi_modal_projector"),
    "idefics3": ("vision_model", "text_model", "connector"),
    "qwen2_vl": ("visual", "language_model", "merger"),
    "qwen2_audio": ("audio_tower", "language_model", "multi_modal_projector"),
    "voxtral": ("audio_tower", "language_model", "multi_modal_projector"),
}


def loaded(tmp_path: Path, kind: str, **finetune: str) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    section = ", ".join(f"{key}: {value}" for key, value in finetune.items())
    path.write_text(
        f"data: {{train: builtin:pydocs}}\nmodel: {{type: {kind}, config: {TINY[kind]}}}\nfinetune: {{{section}}}\n"
    )
    return load_recipe(str(path))


def made(recipe: LoadedRecipe) -> Any:
    media = {"image": 2, "audio": 2, "video": 3, "vision_start": 4, "vision_end": 5}
    return build_model(recipe, build_config(recipe, TokenIds(300, 0, 0, 1, media))[0], seed=1, attention=None)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", PARTS)
def test_the_tower_of_any_family_is_frozen_by_its_name_and_stays_in_evaluation_mode(kind: str, tmp_path: Path) -> None:
    tower, text, _ = PARTS[kind]
    recipe = loaded(tmp_path, kind, adapter="none", freeze=f"[{tower}]")
    model = made(recipe)
    assert [*towers(model)] == [f"model.{tower}"] and language_model(model) == f"model.{text}"
    before = trained(model)
    freeze(model, recipe)
    assert before - trained(model) == {name for name in before if name.startswith(f"model.{tower}.")}
    model.train()
    assert not any(module.training for module in model.get_submodule(f"model.{tower}").modules())
    assert model.get_submodule(f"model.{text}").training
    assert is_frozen(model.get_submodule(f"model.{tower}"))


@pytest.mark.parametrize("kind", PARTS)
def test_an_adapter_is_on_the_language_model_alone_unless_more_is_named(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the package peft")
    _, text, joins = PARTS[kind]
    model = made(loaded(tmp_path, kind, adapter="lora"))
    put_adapter(model, loaded(tmp_path, kind, adapter="lora"))
    assert all(name.startswith(f"model.{text}.") for name in trained(model))
    assert {name.split(".")[-4] for name in trained(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }

    recipe = loaded(tmp_path, kind, adapter="lora", lora=f"{{target_modules: [q_proj, {joins}]}}")
    model = made(recipe)
    put_adapter(model, recipe)
    inside = {name for name in trained(model) if name.startswith(f"model.{text}.")}
    assert inside and all(".q_proj." in name for name in inside)
    assert trained(model) - inside and all(f".{joins}." in name for name in trained(model) - inside)


def test_a_name_that_is_not_there_or_is_there_twice_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for name, says, remedy in (
        ("vision_towr", "has no module vision_towr", "vision_tower"),
        ("audio_tower", "has no module audio_tower", "vision_tower"),
        ("layers.0", "is the name of 2 modules", "vision_tower.encoder.layers.0, language_model.layers.0"),
    ):
        recipe = loaded(tmp_path, "llava", adapter="none", freeze=f"[{name}]")
        with pytest.raises(RecipeError, match=says) as caught:
            freeze(made(recipe), recipe)
        assert remedy in str(caught.value.remedy) and "r.yaml:3" in str(caught.value.where)
