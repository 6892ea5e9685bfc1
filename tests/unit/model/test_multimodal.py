"""Models that see or hear, from nothing: built, saved, and loaded by transformers alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from gptcli.data.media.reader import load_processor
from gptcli.errors import MissingError, RecipeError
from gptcli.model.build import TokenIds, build_config, build_model, count_parameters
from gptcli.model.load import load_model
from gptcli.model.processor import check_processor, media_tokens
from gptcli.processors import fitted, save_processor
from tests.media import FAMILIES, TINY, built, needs_media, recipe


@pytest.mark.parametrize("kind", TINY)
def test_a_model_of_any_family_is_saved_whole(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForMultimodalLM

    loaded = recipe(tmp_path, f"{{type: {kind}, config: {TINY[kind]}}}")
    media = {"image": 2, "audio": 2, "video": 3, "vision_start": 4, "vision_end": 5}
    config, _ = build_config(loaded, TokenIds(300, 0, 0, 1, media))
    made = build_model(loaded, config, seed=1, attention=None)
    assert count_parameters(config).total == sum(p.numel() for p in made.parameters()) < 600_000
    made.save_pretrained(tmp_path / "final")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "final")
    weights = dict(again.named_parameters())
    assert weights.keys() == dict(made.named_parameters()).keys()
    assert all(torch.equal(weights[name], values) for name, values in made.named_parameters())


@needs_media
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_built_from_nothing_is_read_by_transformers_alone(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    made, processor = built(tmp_path, f"{{type: {kind}, config: {TINY[kind]}}}")
    made.save_pretrained(tmp_path / "final")
    save_processor(processor, tmp_path / "final")

    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "final").eval()
    # As many placeholders as features, or the forward pass raises.
    processor = AutoProcessor.from_pretrained(tmp_path / "final")
    fitted(processor, tmp_path / "final")  # of voxtral, which alone takes no sounds with a text
    check_processor(processor, again)
    ours = load_model(tmp_path / "final", device=torch.device("cpu"))
    check_processor(load_processor(tmp_path / "final"), ours)


@needs_media
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_ids_of_placeholders_are_those_of_the_tokenizer(tmp_path: Path, kind: str) -> None:
    made, processor = built(tmp_path, f"{{type: {kind}, config: {TINY[kind]}}}")
    tokens = media_tokens(made.config)
    vocabulary = processor.tokenizer.get_vocab()
    for modality in {"image", "audio"} & tokens.keys():
        assert getattr(made.config, f"{modality}_token_id") == vocabulary[tokens[modality]]
        assert getattr(processor, f"{modality}_token") == tokens[modality]


@needs_media
@pytest.mark.parametrize(("kind", "preset"), [("llava", "vision-1m"), ("qwen2_audio", "audio-1m")])
def test_a_preset_is_of_its_size_and_is_counted_without_memory(tmp_path: Path, kind: str, preset: str) -> None:
    made, _ = built(tmp_path, f"{{type: {kind}, preset: {preset}}}")
    total = sum(parameter.numel() for parameter in made.parameters())
    assert 0.8e6 < total < 2e6
    assert count_parameters(made.config).total == total


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("{type: whisper, preset: audio-1m}", "whisper is an encoder-decoder"),
        ("{type: florence2, preset: vision-1m}", "florence2 is an encoder-decoder"),
        ("{type: llama, preset: vision-1m}", "is for a type that sees or hears"),
        ("{type: qwen2_audio, preset: vision-1m}", "no part of qwen2_audio has these"),
        ("{type: llava, config: {vision_confg: {patch_size: 7}}}", "Did you mean vision_config"),
        ("{type: llava, config: {vision_config: {patch_sise: 7}}}", "Did you mean patch_size"),
        ("{type: llava, config: {text_config: {hiden_size: 64}}}", "Did you mean hidden_size"),
        ("{type: llava, config: {text_config: {model_type: lama}}}", "Did you mean llama"),
        ("{type: llava, config: {text_config: 64}}", "expected fields of a LlamaConfig"),
    ],
)
def test_a_model_that_cannot_be_is_a_recipe_error_with_its_line(tmp_path: Path, model: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_config(recipe(tmp_path, model), TokenIds(300, 0, 0, 1))
    assert says in "\n".join(caught.value.lines())
    assert "r.yaml:2" in str(caught.value.where)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else find(name, *rest))
    with pytest.raises(MissingError) as caught:
        media_tokens(AutoConfig.for_model("llava"))
    assert "pip install 'gptcli[multimodal]'" in "\n".join(caught.value.lines())


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no processor in this folder"):
        load_processor(tmp_path)


@needs_media
def test_a_type_that_adds_pictures_layer_by_layer_has_the_tokenizers_ends_everywhere(tmp_path: Path) -> None:
    sizes = "{scale_factor: 2, out_hidden_size: 128, deepstack_visual_indexes: [0], use_fine_route: false}"
    made, processor = built(
        tmp_path, f"{{type: granite_docling, preset: vision-1m, config: {{vision_config: {sizes}}}}}"
    )
    check_processor(processor, made)
    for config in (made.config, made.config.text_config):
        assert config.pad_token_id == processor.tokenizer.pad_token_id == 1


@needs_media
def test_a_model_that_runs_on_no_text_without_a_picture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="idefics does not run on a text"):
        built(tmp_path, "{type: idefics, preset: vision-1m}")
