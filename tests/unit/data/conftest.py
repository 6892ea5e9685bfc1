"""A cache of its own for every test, and a recipe written from a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.data.tokenize import Prepared, prepare
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent


class Lines(Silent):
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GPTCLI_CACHE", str(folder))
    return folder


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def prepared(tmp_path: Path, lines: Lines) -> Callable[..., Prepared]:
    """Prepare a recipe whose data section is given as YAML flow text; the tokenizer is bytes unless given."""

    def run(data: str, *overrides: str, tokenizer: str = "{train: {algorithm: bytes}}") -> Prepared:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"tokenizer: {tokenizer}\ndata: {data}\n", encoding="utf-8")
        return prepare(load_recipe(str(recipe), overrides), lines)

    return run
