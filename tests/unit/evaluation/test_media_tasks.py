"""Tasks and losses of models that see or hear, against transformers' own processors called on each row."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.data.media.item import place_of
from gptcli.errors import DataError, UsageError
from gptcli.evaluation import evaluate as evaluating
from gptcli.evaluation.answers import Share, answer, encode, merged
from gptcli.evaluation.corpus import from_files, from_recipe
from gptcli.evaluation.loss import loss_of
from gptcli.evaluation.page import write_page
from gptcli.evaluation.supervised import packing_for, supervised_windows
from gptcli.evaluation.tasks import TaskResult, read_task, run_tasks, task_reader
from gptcli.model.load import load_model, load_tokenizer
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.reporting import Silent
from tests.media import TINY, louder, needs_media, save_media_model, write_media
from tests.tiny import save_model

pytestmark = needs_media
CPU = torch.device("cpu")
FAMILIES = ("llava", "idefics3", "qwen2_audio")
LABELS = [" shoe", " coat", " a shoe", " one two"]
COLUMN = {"llava": "image", "idefics3": "image", "qwen2_audio": "audio"}
Media = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tasks", "evaluate"):
        monkeypatch.setattr(f"gptcli.evaluation.{module}.best_device", lambda: CPU)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    """The folder of a family: `model`, and rows of five media in `rows.jsonl`."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = home = tmp_path_factory.mktemp(kind)
            save_media_model(home, kind)
            names = write_media(home / "files", kind, 5)
            rows = [{COLUMN[kind]: f"files/{name}", "q": "one " * at, "label": "coat"} for at, name in enumerate(names)]
            write(home / "rows.jsonl", rows)
            write(home / "train.jsonl", [{**row, "label": "shoe"} for row in rows])
        return made[kind]

    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe(folder: Path, kind: str, *, of_data: dict[str, Any] | None = None, **section: Any) -> LoadedRecipe:
    column = COLUMN[kind]
    about = {
        "train": str(folder / "train.jsonl"),
        "validation": 0.5,
        "format": "prompt",
        f"{column}s": [column],
        "prompt": f"{{{column}}}\n{{q}}This is a",
        "completion": " {label}",
        "sequence_length": 256,
        "packing": "none",
        **(of_data or {}),
    }
    measured = {"data": str(folder / "rows.jsonl"), "references": "label", **section}
    model = {"type": kind, "config": json.loads(json.dumps(_config(kind)))}
    written = {"model": model, "tokenizer": {"train": {"vocab_size": 320}}, "data": about, "eval": measured}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**written, "generate": {"max_new_tokens": 5}}), encoding="utf-8")
    return load_recipe(str(path))


def _config(kind: str) -> Any:
    import yaml

    return yaml.safe_load(TINY[kind])


def run(folder: Path, loaded: LoadedRecipe, **more: Any) -> tuple[TaskResult, list[dict[str, Any]]]:
    path = folder / "answers.jsonl"
    found = run_tasks(folder / "model", from_recipe(loaded), loaded, Silent(), predictions=path, **more)
    return found, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain_inputs(processor: Any, kind: str, file: Path, text: str) -> Any:
    """What transformers' own processor makes of one row."""
    if kind == "qwen2_audio":
        import soundfile

        sound, rate = soundfile.read(file, dtype="float32")
        return processor(text=processor.audio_token + text, audio=[sound], sampling_rate=rate, return_tensors="pt")
    from PIL import Image

    return processor(text=processor.image_token + text, images=[Image.open(file)], return_tensors="pt")


def continued(model: Any, inputs: Any, ids: list[int]) -> float:
    """The log-likelihood of ids after a row."""
    before = inputs["input_ids"]
    whole = torch.cat([before, torch.tensor([ids])], dim=1)
    more = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        scores = model(input_ids=whole, attention_mask=torch.ones_like(whole), **more).logits[0].log_softmax(-1)
    return sum(float(scores[at - 1, whole[0, at]]) for at in range(before.shape[1], whole.shape[1]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_labels_are_as_likely_as_the_models_own_processor_makes_them(media: Media, kind: str) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    folder = media(kind)
    found, lines = run(folder, recipe(folder, kind, labels=LABELS, metrics=["accuracy", "f1"]))
    model = AutoModelForMultimodalLM.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    chosen = []
    for at, line in enumerate(lines):
        file = folder / "files" / Path(line["media"][0]).name
        inputs = plain_inputs(processor, kind, file, "\n" + "one " * at + "This is a")
        expected = {
            label.strip(): continued(model, inputs, processor.tokenizer(label, add_special_tokens=False)["input_ids"])
            for label in LABELS
        }
        assert line["label_scores"] == pytest.approx(expected, abs=1e-4)
        assert line["prompt"] == f"[{COLUMN[kind]} {line['media'][0]}]\n{'one ' * at}This is a"
        chosen.append(max(expected, key=lambda label: expected[label]))
    assert [line["label"] for line in lines] == chosen
    assert len({json.dumps(line["label_scores"]) for line in lines}) == len(lines)
    assert found.metrics["accuracy"] == chosen.count("coat") / 5


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_are_those_of_transformers_and_the_models_own_processor(media: Media, kind: str) -> None:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    folder = media(kind)
    found, lines = run(folder, recipe(folder, kind, metrics=["exact_match", "quality"]))
    model = AutoModelForMultimodalLM.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    expected = []
    for at, line in enumerate(lines):
        file = folder / "files" / Path(line["media"][0]).name
        inputs = plain_inputs(processor, kind, file, "\n" + "one " * at + "This is a")
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(made, skip_special_tokens=True).strip())
    assert [line["prediction"] for line in lines] == expected and len(set(expected)) > 1
    assert found.rows == 5 and found.metrics["exact_match"] == 0


def test_what_is_seen_decides(media: Media, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    folder = media("llava")
    rows = [{"image": f"files/{name}.png", "q": "", "label": "coat"} for name in (0, 1, 0)]
    write(folder / "same.jsonl", rows)
    _, lines = run(folder, recipe(folder, "llava", **_labels(folder / "same.jsonl")))
    first, second, again = ([*line["label_scores"].values()] for line in lines)
    assert first == pytest.approx(again, abs=1e-5) and first != pytest.approx(second, abs=1e-2)


def _labels(path: Path) -> dict[str, Any]:
    return {"data": str(path), "labels": LABELS, "metrics": ["accuracy"]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "files/none.png"}, "files/none.png does not exist"),
        ({"image": "rows.jsonl"}, "rows.jsonl is not an image"),
        ({"image": "../x.png"}, "x.png"),
        ({"image": ["files/0.png", "files/1.png"]}, "has 2 images, and the prompt has 1 place {image}"),
        ({"image": 5}, "of column 'image' is a number"),
        ({"image": "files/0.png", "q": "<image>"}, "holds <image>, by which the model knows an image"),
        ({"image": "files/0.png", "q": place_of("image")}, "has 1 image and 2 places for them"),
    ],
)
def test_a_row_whose_media_cannot_be_used_is_named_or_left_out(media: Media, row: dict[str, Any], said: str) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    folder = media("llava")
    good = {"image": "files/0.png", "q": "", "label": "coat"}
    write(folder / "bad.jsonl", [good, {**good, **row}, good])
    with pytest.raises(DataError) as caught:
        run(folder, recipe(folder, "llava", **_labels(folder / "bad.jsonl")))
    assert said in caught.value.what and str(caught.value.where).endswith("bad.jsonl:2")
    loaded = recipe(folder, "llava", of_data={"on_bad_row": "skip"}, **_labels(folder / "bad.jsonl"))
    assert run(folder, loaded)[0].rows == 2


@pytest.mark.parametrize(("kind", "reads"), [("llama", "text alone"), ("qwen2_audio", "audios alone")])
def test_a_model_that_does_not_read_what_is_asked_about_is_refused(
    media: Media, tmp_path: Path, kind: str, reads: str
) -> None:
    folder = media("llava")
    model = save_model(tmp_path / "model") if kind == "llama" else media(kind) / "model"
    loaded = recipe(folder, "llava", metrics=["exact_match"])
    with pytest.raises(UsageError, match=f"has a place for images, and this model reads {reads}"):
        run_tasks(model, from_recipe(loaded), loaded, Silent())


def test_processes_share_the_rows_of_labels(media: Media) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    folder = media("llava")
    loaded = recipe(folder, "llava", labels=LABELS, metrics=["accuracy"])
    reader = task_reader(folder / "model", loaded)
    task = read_task(from_recipe(loaded), loaded, Silent(), reader)
    model, tokenizer = load_model(folder / "model", device=CPU), load_tokenizer(folder / "model")
    prompts = encode(model, tokenizer, task)

    def scores(share: Share) -> Any:
        return answer(model, tokenizer, task, prompts, Silent(), share, reader=reader)

    whole = scores(Share()).scores
    parts = merged([scores(Share(0, 2)), scores(Share(1, 2))]).scores
    assert whole is not None and parts is not None and not np.isnan(whole).any()
    assert parts == pytest.approx(whole, abs=1e-5)


def test_a_file_that_has_gone_since_the_rows_were_read_is_an_error(media: Media, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    folder = media("llava")
    names = write_media(tmp_path / "files", "llava", 1)
    write(tmp_path / "rows.jsonl", [{"image": f"files/{names[0]}", "q": "", "label": "coat"}])
    loaded = recipe(folder, "llava", **_labels(tmp_path / "rows.jsonl"))
    reader = task_reader(folder / "model", loaded)
    task = read_task(from_recipe(loaded), loaded, Silent(), reader)
    model, tokenizer = load_model(folder / "model", device=CPU), load_tokenizer(folder / "model")
    prompts = encode(model, tokenizer, task)
    (tmp_path / "files" / names[0]).unlink()
    with pytest.raises(DataError, match=r"0\.png does not exist"):
        answer(model, tokenizer, task, prompts, Silent(), reader=reader)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_loss_of_a_held_out_row_is_that_of_the_models_own_processor(
    media: Media, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptcli.data.media.reader import open_reader
    from gptcli.data.tokenize import prepare
    from gptcli.model.build import build_config, build_model
    from gptcli.model.media import media_model, media_token_ids

    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "cache"))
    folder = media(kind)
    loaded = recipe(folder, kind, of_data={"validation": str(folder / "rows.jsonl")})
    prepared = prepare(loaded, Silent(), media=media_model(loaded))
    config, _ = build_config(loaded, media_token_ids(loaded, prepared.tokenizer))
    model = build_model(loaded, config, seed=1, attention=None).eval()
    louder(model)
    assert prepared.validation is not None
    packing = packing_for(prepared.validation, loaded.recipe)
    assert packing is not None
    reader = open_reader(prepared.tokenizer)
    stream = list(supervised_windows(prepared.validation, replace(packing, sequence_length=256)))
    found = []
    for batch_tokens in (1, 8192):
        nats = array("d")
        loss_of(model, iter(stream), pad_id=0, batch_tokens=batch_tokens, per_document=nats, reader=reader)
        found.append(list(nats))
    ids = reader.processor.tokenizer(" coat", add_special_tokens=False)["input_ids"]
    expected = []
    for at, name in enumerate(sorted(path.name for path in (folder / "files").iterdir())):
        inputs = plain_inputs(reader.processor, kind, folder / "files" / name, "\n" + "one " * at + "This is a")
        expected.append(-continued(model, inputs, [*ids, reader.processor.tokenizer.eos_token_id]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(expected, rel=1e-5)


def test_plain_text_is_scored_and_shown_by_a_model_that_sees(media: Media, tmp_path: Path) -> None:
    folder = media("llava")
    (tmp_path / "text.txt").write_text("a shoe, a coat, one two\n", encoding="utf-8")
    options = evaluating.Options(curves=True)
    found = evaluating.evaluate(folder / "model", from_files([str(tmp_path / "text.txt")]), options, Silent())
    write_page(tmp_path / "page.html", [found])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert found.result.tokens > 0 and "Surprise" in page and "coat" in page


def test_a_page_names_the_media_of_the_first_answers(media: Media, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    folder = media("llava")
    found, lines = run(folder, recipe(folder, "llava", labels=LABELS, metrics=["accuracy"]))
    write_page(tmp_path / "page.html", tasks=[found])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(line["media"][0] in page for line in lines) and "The first answers" in page
