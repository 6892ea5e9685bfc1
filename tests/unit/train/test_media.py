"""Training of models that see or hear: every family by one way, saved, resumed exactly, read by transformers."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.data.media.item import place_of
from gptcli.errors import DataError, StoppedError
from gptcli.generation.media_prompt import media_prompt, model_reader
from gptcli.generation.settings import Settings
from gptcli.generation.text import complete_batch
from gptcli.model.load import load_model, load_tokenizer
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.runs.folder import RunFolder
from gptcli.train.assemble import assemble, describe
from gptcli.train.begin import Options
from gptcli.train.run import train
from tests.media import FAMILIES, media_project, mistral_folder, needs_media, sound, write_media
from tests.runs import assert_all_good, assert_same_model, lines
from tests.unit.train.test_backoff import running_out

pytestmark = needs_media


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(recipe: Path, name: str, *overrides: str, command: str = "pretrain", stop_after: int | None = None) -> Path:
    loaded = load_recipe(str(recipe), [f"name={name}", *overrides])
    train(loaded, Options(command, stop_after=stop_after), Silent())
    return recipe.parent / "runs" / name


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_resumed_run_is_the_undisturbed_one_and_transformers_loads_it(
    kind: str, tmp_path: Path, monkeypatch: Any
) -> None:
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


def test_a_voxtral_as_mistral_publishes_it_is_fine_tuned_and_asked(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    folder = mistral_folder(tmp_path / "base")
    names = write_media(tmp_path, "voxtral", 4)
    rows = [json.dumps({"audio": name, "text": "one"}) for name in names]
    (tmp_path / "sounds.jsonl").write_text("\n".join(rows))
    prompt = '"[INST][BEGIN_AUDIO]{audio}What is said?[/INST]"'
    data = f'{{train: sounds.jsonl, format: prompt, audios: [audio], prompt: {prompt}, completion: "{{text}}", '
    recipe = media_project(
        tmp_path,
        "voxtral",
        model=f"{{from: {folder}}}",
        tokenizer="null",
        data=data + "validation: 0, sequence_length: 256, packing: isolated, workers: 0}",
    )
    final = run(recipe, "tuned", command="finetune") / "final"
    model, tokenizer = load_model(final, device=torch.device("cpu")), load_tokenizer(final)
    reader = model_reader(final)
    assert reader is not None and reader.tokens == {"audio": "[AUDIO]"}
    prompts = [media_prompt(reader, tokenizer, f"[INST]{place_of('audio')}[/INST]", [sound(seed)]) for seed in (1, 2)]
    first, second = (list(prompt) for prompt in prompts)
    assert first == second == [3, *[24] * 25, 4]
    settings = Settings(max_new_tokens=8, greedy=True)
    one, two = complete_batch(model, tokenizer, prompts, settings, reader=reader)
    assert one[0].text != two[0].text, "it hears"


def test_sounds_so_short_that_each_is_one_token_are_trained_on(tmp_path: Path, monkeypatch: Any) -> None:
    import numpy as np
    import soundfile

    data = "{train: rows.jsonl, validation: 25%, format: chat, sequence_length: 256, packing: none, workers: 0}"
    recipe = media_project(tmp_path, "qwen2_audio", data=data)
    for path in tmp_path.glob("*.wav"):
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 600), 16000)
    rows = [line for at, line in enumerate((tmp_path / "rows.jsonl").read_text().splitlines(True)) if at % 3 == 1]
    (tmp_path / "rows.jsonl").write_text("".join(rows * 3))
    monkeypatch.chdir(tmp_path)
    assert all(line["loss"] > 0 for line in lines(run(recipe, "short")) if "loss" in line)


def test_half_as_many_rows_at_once_after_memory_ran_out_have_the_same_losses(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = media_project(tmp_path, "llava")
    monkeypatch.chdir(tmp_path)
    by_twos = run(recipe, "by-twos", "train.micro_batch_size=2")
    with running_out(1):
        halved = run(recipe, "halved", "train.micro_batch_size=4")
    assert lines(halved) == lines(by_twos)
    assert_same_model(halved / "final", by_twos / "final")


def test_a_picture_that_vanished_or_changed_since_ends_the_run_and_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = media_project(tmp_path, "llava")
    monkeypatch.chdir(tmp_path)
    run(recipe, "before")
    pictures = [*tmp_path.glob("*.png")]
    for picture in pictures:
        picture.write_bytes((tmp_path / "runs" / "before" / "run.json").read_bytes())
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"\d\.png is another one than when the data was prepared") as caught:
            run(recipe, f"changed-{workers}", f"data.workers={workers}", "train.eval_every=0")
        assert "rows.jsonl tokens" in caught.value.what and "put back what was there" in str(caught.value.remedy)
        assert len(caught.value.lines()) == 2
    for picture in pictures:
        picture.unlink()
    with pytest.raises(DataError, match=r"\d\.png does not exist"):
        run(recipe, "vanished", "data.workers=1", "train.eval_every=0")
    with pytest.raises(DataError, match=r"\d\.png does not exist, of document \d"):
        run(recipe, "unseen", "train.eval_at_start=true")


class Killing(Silent):
    """Kills the processes that read ahead at the first evaluation, far from the end."""

    def say(self, text: str) -> None:
        if text.startswith("step"):
            for child in multiprocessing.active_children():
                child.kill()


def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = media_project(tmp_path, "llava")
    monkeypatch.chdir(tmp_path)
    long = ["name=killed", "data.workers=1", "train.max_steps=20", "train.eval_every=2", "train.save_every=20"]
    with pytest.raises(DataError, match="reads images and sounds was ended") as caught:
        train(load_recipe(str(recipe), long), Options("pretrain"), Killing())
    assert "data.workers: 0" in str(caught.value.remedy)
    assert not multiprocessing.active_children()


def test_what_is_trained_is_said_only_where_something_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    # The positions of its tower are constants.
    loaded = load_recipe(str(media_project(tmp_path, "qwen2_audio")))
    monkeypatch.chdir(tmp_path)
    assembly = assemble(loaded, RunFolder(tmp_path / "runs" / "x"), Silent())
    assert assembly.plan.trained_parameters < assembly.plan.parameters
    assert not [line for line in describe(assembly) if line.startswith("trained:")]
