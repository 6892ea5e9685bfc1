"""Several documents with pictures or sounds in one row are learnt as if each were alone, or the model is refused."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.data.media.reader import open_reader
from gptcli.data.packed import training_rows
from gptcli.data.tokenize import prepare
from gptcli.errors import RecipeError
from gptcli.model import isolation
from gptcli.model.build import build_config, build_model
from gptcli.model.media import media_model, media_token_ids
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.loss import TrainingLoss
from gptcli.train.rows import RunRows, inputs_and_labels
from tests.media import TINY, needs_media

CPU = torch.device("cpu")
RECIPE = """\
tokenizer: {{train: {{vocab_size: 320}}}}
data:
  train: rows.jsonl
  validation: 0
  format: prompt
  {key}: [seen]
  prompt: "{{seen}} What is it, row {{row}}?"
  completion: " {{said}}"
  sequence_length: 128
  packing: {packing}
model: {{type: {kind}, config: {config}}}
train: {{epochs: 1, global_batch_size: 1}}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of pictures, sounds and nothing, of several lengths."""
    from PIL import Image

    draw = np.random.default_rng(3)
    rows: dict[str, list[dict[str, Any]]] = {"images": [], "audios": []}
    for row in range(7):
        Image.fromarray(draw.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
        with wave.open(str(tmp_path / f"{row}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(draw.integers(-9000, 9000, 1600 * (row + 2), dtype=np.int16).tobytes())
        for key, ending in (("images", "png"), ("audios", "wav")):
            seen = None if row == 4 else f"{row}.{ending}"
            rows[key].append({"seen": seen, "row": row, "said": "a coat " * (row % 3 + 1)})
    for key, listed in rows.items():
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in listed))
    return tmp_path


def run_rows(folder: Path, kind: str, packing: str) -> tuple[RunRows, Any]:
    """The rows of a recipe and its model."""
    key = "audios" if kind in ("qwen2_audio", "voxtral") else "images"
    (folder / "rows.jsonl").write_text((folder / f"{key}.jsonl").read_text())
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(kind=kind, config=TINY[kind], packing=packing, key=key))
    loaded = load_recipe(str(path))
    prepared = prepare(loaded, Silent(), media=media_model(loaded))
    rows = training_rows(prepared.train, prepared.index, loaded.recipe, 1)
    plan: Any = SimpleNamespace(global_batch_size=1, total_rows=rows.rows_per_epoch)
    config, _ = build_config(loaded, media_token_ids(loaded, prepared.tokenizer))
    model = build_model(loaded, config, seed=1, attention="sdpa").eval()
    return RunRows(rows, plan, open_reader(prepared.tokenizer)), model


@needs_media
@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_audio", "voxtral"])
def test_documents_in_one_row_are_learnt_as_if_each_were_alone(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    nats, gradients, counts = [], [], []
    for packing in ("isolated", "none"):
        rows, model = run_rows(folder, kind, packing)
        loss, total = TrainingLoss(model, block=None, z_loss=0.0), 0.0
        for number in range(len(rows)):
            inputs = inputs_and_labels(rows.__getitems__([number]), CPU)
            labels = inputs.pop("labels")
            _, said, objective = loss(model, inputs, labels)
            objective.backward()  # type: ignore[no-untyped-call]
            total += float(said)
        nats.append(total)
        counts.append(len(rows))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert counts[1] == 7 and counts[0] <= 4
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    whole = sum(float(each.norm()) ** 2 for each in gradients[1].values()) ** 0.5
    for name, wanted in gradients[1].items():
        assert (gradients[0][name] - wanted).norm() <= 1e-4 * max(float(wanted.norm()), 1e-3 * whole), name


@needs_media
def test_a_model_that_mixes_documents_where_they_hold_pictures_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    rows, model = run_rows(folder, "llava", "isolated")
    isolation.check(model, documents=rows.trial(CPU))

    def brighten(_: Any, __: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """What a row sees of all its pictures is added to each of its tokens."""
        seen = kwargs["inputs_embeds"]
        if brighten.on:  # type: ignore[attr-defined]
            kwargs["inputs_embeds"] = seen + seen.mean(1, keepdim=True)
        return (), kwargs

    def look(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        brighten.on = kwargs.get("pixel_values") is not None  # type: ignore[attr-defined]

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.model.language_model.register_forward_pre_hook(brighten, with_kwargs=True)
    assert isolation.mixes(model) is None
    with pytest.raises(RecipeError, match="LlavaForConditionalGeneration mixes them"):
        isolation.check(model, documents=rows.trial(CPU))
