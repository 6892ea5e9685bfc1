from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptcli.data.chat_template import NAMED, with_template
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import RecipeError
from gptcli.recipe.load import load_recipe
from gptcli.train.vocabulary import vocabulary_of
from tests.tiny import byte_tokenizer, make_model, save_model, wrapped

CONFIG = make_model().config


def compared(folder: Path, tokenizer: Path) -> Any:
    """The vocabulary of a recipe whose tokenizer is in a folder, for the model in `base`."""
    path = folder / "recipe.yaml"
    path.write_text("data: {train: text.txt}\nmodel: {from: base}\ntrain: {max_steps: 1}\n")
    kept = import_tokenizer(str(tokenizer))
    size = len(json.loads((kept / "tokenizer.json").read_text())["model"]["vocab"])
    prepared: Any = SimpleNamespace(tokenizer=kept, train=SimpleNamespace(vocab_size=size))
    return vocabulary_of(load_recipe(str(path)), prepared, CONFIG)


def test_a_models_own_tokenizer_has_nothing_new(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    found = compared(tmp_path, base)
    assert (found.size, dict(found.new)) == (300, {})


def test_tokens_that_were_added_are_new(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    size = len(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"])
    found = compared(tmp_path, with_template(import_tokenizer(str(base)), NAMED["chatml"]))
    assert dict(found.new) == {size: "<|im_start|>", size + 1: "<|im_end|>"}
    assert found.size == max(300, size + 2)
    assert "2 tokens are new to it (<|im_start|>, <|im_end|>)" in str(found)


def test_a_model_without_a_tokenizer_knows_the_ids_that_it_has_rows_for(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    wrapped(byte_tokenizer(260)).save_pretrained(str(tmp_path / "small"))
    assert dict(compared(tmp_path, tmp_path / "small").new) == {}


def test_a_reserved_token_with_another_name_is_new(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    other = tmp_path / "other"
    other.mkdir()
    for path in base.glob("*token*"):
        (other / path.name).write_text(path.read_text().replace("<|pad|>", "<|call|>"))
    assert dict(compared(tmp_path, other).new) == {1: "<|call|>"}


def test_a_tokenizer_whose_ids_mean_other_texts_is_refused_with_one_of_them(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    other = byte_tokenizer(300)
    told = json.loads(other.to_str())
    vocabulary = told["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    vocabulary[names[10]], vocabulary[names[11]] = 11, 10
    wrapped(type(other).from_str(json.dumps(told))).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(RecipeError, match="2 of the ids of both mean other texts \\(10 is") as caught:
        compared(tmp_path, tmp_path / "other")
    assert "Leave out tokenizer" in str(caught.value.remedy)
