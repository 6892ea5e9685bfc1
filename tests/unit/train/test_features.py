"""`data.cache_features`: the same training as without, and the tower is run once on each medium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from gptcli.data.media.reader import MediaReader
from gptcli.errors import RecipeError, StoppedError
from gptcli.files import cache_root
from gptcli.model.load import load_model
from tests.media import media_project, needs_media
from tests.runs import assert_same_model, lines, truncate
from tests.unit.model.test_towers import PARTS
from tests.unit.train.test_media import run

pytestmark = needs_media

CACHED = "data.cache_features=true"
KINDS = [
    "llava",
    *(pytest.param(kind, marks=pytest.mark.slow_fault) for kind in ("idefics3", "qwen2_audio", "voxtral")),
]
LAYERS = ("CLIPEncoderLayer", "Idefics3EncoderLayer", "Qwen2AudioEncoderLayer", "VoxtralEncoderLayer")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def project(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, seed: str = "1") -> Path:
    """A recipe that goes on with a random model whose tower is frozen."""
    data = "{train: rows.jsonl, validation: 0, format: chat, sequence_length: 256, packing: none, workers: 0}"
    recipe = media_project(folder, kind, data=data, seed=seed)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GPTCLI_CACHE", str(folder / "cache"))
    run(recipe, "base", "train.max_steps=1")
    return media_project(
        folder,
        kind,
        data=data,
        model="{from: runs/base/final}",
        tokenizer="null",
        seed=seed,
        finetune=f"{{adapter: none, freeze: [{PARTS[kind][0]}]}}",
        train="{max_steps: 6, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1e-2, precision: fp32, "
        "log_every: 1, eval_every: 1, save_every: 2, sample_every: 0}",
    )


def tuned(recipe: Path, name: str, *overrides: str, stop_after: int | None = None) -> Path:
    return run(recipe, name, *overrides, command="finetune", stop_after=stop_after)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many media are decoded, and how often a layer of a tower is run."""
    counts = {"decoded": 0, "passes": 0}
    load = MediaReader.load

    def counted(self: MediaReader, medium: Any) -> Any:
        counts["decoded"] += 1
        return load(self, medium)

    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__ in LAYERS:
            counts["passes"] += 1

    handle = register_module_forward_hook(watch)
    with monkeypatch.context() as patch:
        patch.setattr(MediaReader, "load", counted)
        try:
            yield counts
        finally:
            handle.remove()


def folders() -> set[Path]:
    return {*(cache_root() / "features").glob("*")}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_without_it_and_a_later_run_neither_decodes_nor_runs_the_tower(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = project(tmp_path, kind, monkeypatch)
    before = folders()
    plain = lines(tuned(recipe, "plain"))
    with counting(monkeypatch) as first:
        cached = lines(tuned(recipe, "cached", CACHED))
    for mine, theirs in zip(cached, plain, strict=True):
        assert np.isclose(mine["loss"], theirs["loss"], rtol=1e-5, atol=0)
    assert len(folders() - before) == 1
    with counting(monkeypatch) as second:
        again = lines(tuned(recipe, "again", CACHED))
    assert again == cached
    # The rows on which it is tried, and nothing of the six steps.
    assert second["decoded"] <= 8 < first["decoded"] and second["passes"] == 1 < first["passes"]

    with pytest.raises(StoppedError):
        tuned(recipe, "resumed", CACHED, stop_after=3)
    resumed = tuned(recipe, "resumed", CACHED, "data.workers=1")
    assert lines(resumed) == cached
    assert_same_model(resumed / "final", tmp_path / "runs" / "cached" / "final")


@pytest.mark.slow_fault
def test_a_damaged_file_is_made_again_and_other_weights_have_features_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = project(tmp_path, "llava", monkeypatch)
    before = folders()
    cached = lines(tuned(recipe, "cached", CACHED))
    (folder,) = folders() - before
    for file in folder.iterdir():
        truncate(file)
    again = lines(tuned(recipe, "again", CACHED))
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in cached], rel=1e-5)

    shutil.rmtree(tmp_path / "runs" / "base")
    others = project(tmp_path, "llava", monkeypatch, seed="5")
    assert lines(tuned(others, "others", CACHED)) != cached
    assert len(folders() - before) == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("finetune={adapter: none, freeze: [multi_modal_projector]}",), "the tower .vision_tower. is trained"),
        (("finetune={adapter: none, freeze: []}",), "the tower .vision_tower. is trained"),
    ],
)
def test_a_tower_that_is_trained_is_refused_with_what_freezes_it(
    overrides: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = project(tmp_path, "llava", monkeypatch)
    with pytest.raises(RecipeError, match=says) as caught:
        tuned(recipe, "refused", CACHED, *overrides)
    assert "freeze: [vision_tower]" in str(caught.value.remedy)
    assert not (tmp_path / "runs" / "refused").exists()


@pytest.mark.slow_fault
@pytest.mark.parametrize("kind", ["llava", "qwen2_audio"])
def test_an_adapter_on_the_language_model_leaves_the_tower_to_be_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs the package peft")
    recipe = project(tmp_path, kind, monkeypatch)
    adapted = "finetune={adapter: lora, freeze: [], lora: {r: 2}}"
    plain = tuned(recipe, "plain", adapted)
    cached = tuned(recipe, "cached", adapted, CACHED)
    for mine, theirs in zip(lines(cached), lines(plain), strict=True):
        assert np.isclose(mine["loss"], theirs["loss"], rtol=1e-5, atol=0)
    whole = load_model(cached / "final", device=torch.device("cpu"))
    base = load_model(tmp_path / "runs" / "base" / "final", device=torch.device("cpu")).state_dict()
    changed = {name for name, values in whole.state_dict().items() if not torch.equal(values, base[name])}
    assert changed and all(name.startswith(f"model.{PARTS[kind][1]}.") for name in changed)


def test_rows_without_media_have_nothing_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = project(tmp_path, "llava", monkeypatch)
    said = [line for line in (tmp_path / "rows.jsonl").read_text().splitlines() if '"type": "image"' not in line]
    (tmp_path / "rows.jsonl").write_text("\n".join(said * 3))
    with pytest.raises(RecipeError, match=r"data\.cache_features: no row of this run has an image or a sound"):
        tuned(recipe, "refused", CACHED)
