"""Recipes of tiny models that see or hear: a tokenizer and a processor for each, made once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.data.tokenize import Prepared, prepare
from gptcli.data.tokenizer import train_bpe
from gptcli.recipe.load import load_recipe
from tests.unit.data.conftest import Lines


class Told(Lines):
    """Keeps warnings as well."""

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")


@pytest.fixture(scope="session")
def media_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media-cache")


@pytest.fixture(autouse=True)
def cache(media_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One for all tests, so that a processor is made once; data are under keys of their own folders."""
    monkeypatch.setenv("GPTCLI_CACHE", str(media_cache))
    return media_cache


@pytest.fixture
def lines() -> Told:
    return Told()


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tokenizer for a type of model, with its placeholders."""

    @functools.cache
    def made(kind: str) -> Path:
        from transformers import AutoConfig

        from gptcli.model.processor import media_tokens

        folder = tmp_path_factory.mktemp(kind)
        tokens = media_tokens(AutoConfig.for_model(kind)).values()
        text = ["What is this? This is a coat, a shoe. "] * 3
        train_bpe(text, folder, vocab_size=300, pattern="gpt4", special_tokens=[*tokens])
        return folder

    return made


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_of: Callable[[str], Path]) -> Callable[..., Path]:
    """Write the recipe of a data section (YAML flow text) and a tiny model; `chat`: a template for conversations."""

    from tests.media import TINY

    def written(data: str, kind: str = "llava", *, chat: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        template = f", chat_template: {chat}" if chat else ""
        model = f"{{type: {kind}, config: {TINY[kind]}}}"
        path.write_text(
            f"tokenizer: {{from: {tokenizer_of(kind)}{template}}}\nmodel: {model}\ndata: {data}\n", encoding="utf-8"
        )
        return path

    return written


@pytest.fixture
def prepared(recipe: Callable[..., Path], lines: Told) -> Callable[..., Prepared]:
    """Prepare the data of such a recipe."""

    def run(data: str, *overrides: str, kind: str = "llava", chat: str = "", verify: bool = False) -> Prepared:
        from gptcli.model.media import media_model

        loaded = load_recipe(str(recipe(data, kind, chat=chat)), overrides)
        return prepare(loaded, lines, verify=verify or None, media=media_model(loaded))

    return run
