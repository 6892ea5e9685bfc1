"""The tokens that stand for images and sounds, in a tokenizer that a recipe trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.data.job import find_job
from gptcli.data.tokenize import find_tokenizer
from gptcli.data.tokenizer import load_fast
from gptcli.errors import RecipeError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent


def trained(tmp_path: Path, training: str) -> Path:
    (tmp_path / "a.txt").write_text("some text to train a tokenizer on, some text. " * 20)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {{train: a.txt, validation: 0, sequence_length: 4}}\ntokenizer: {{train: {{{training}}}}}\n"
        "model: {type: llava, preset: vision-1m}\n"
    )
    loaded = load_recipe(str(recipe))
    job = find_job(loaded, Silent(), verify=False)
    return find_tokenizer(loaded, job, Silent(), (("<image>", "<|AUDIO|>"), lambda tokenizer, into: None))[0]


def test_each_is_one_token_and_counts_in_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_fast(trained(tmp_path, "vocab_size: 270"))
    assert tokenizer.get_vocab_size(with_added_tokens=True) == 270
    for text in ("<image>", "<|AUDIO|>"):
        assert tokenizer.encode(f"a{text}b").ids.count(tokenizer.token_to_id(text)) == 1


def test_a_vocabulary_of_bytes_alone_has_no_place_for_them(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="algorithm bytes has no <image>"):
        trained(tmp_path, "algorithm: bytes")
