"""Training of models that see or hear: every family by one way, saved, resumed exactly, and read by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import RecipeError, StoppedError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.begin import Options
from gptcli.train.run import train
from tests.media import FAMILIES, media_project, needs_media
from tests.runs import assert_all_good, assert_same_model, lines

pytestmark = needs_media


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(recipe: Path, name: str, *overrides: str, command: str = "pretrain", stop_after: int | None = None) -> Path:
    loaded = load_recipe(str(recipe), [f"name={name}", *overrides])
    train(loaded, Options(command, stop_after=stop_after), Silent())
    return recipe.parent / "runs" / name


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_resumed_run_is_the_undisturbed_one_and_transformers_loads_it(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    recipe = media_project(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    whole = run(recipe, "whole")
    with pytest.raises(StoppedError, match="step 1 of 2 is saved"):
        run(recipe, "resumed", stop_after=1)
    resumed = run(recipe, "resumed")
    assert lines(resumed) == lines(whole)
    assert_same_model(resumed / "final", whole / "final")
    assert_all_good(resumed)

    first, second = (line["loss"] for line in lines(whole) if "loss" in line)
    assert first != second
    processor = AutoProcessor.from_pretrained(whole / "final")
    again = AutoModelForMultimodalLM.from_pretrained(whole / "final")
    assert {*again.state_dict()} and len(processor.tokenizer) == again.config.get_text_config().vocab_size


def test_a_family_whose_processor_reads_no_placeholders_is_refused_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = media_project(tmp_path, "voxtral")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="voxtral cannot be built from nothing") as caught:
        run(recipe, "refused")
    assert caught.value.code == 2
