"""Tasks from files to numbers, on tiny random models: answers against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import DataError, DivergedError, RecipeError, UsageError
from gptcli.evaluation.corpus import from_recipe
from gptcli.evaluation.tasks import TaskResult, run_tasks
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.conftest import shared_data
from tests.tiny import END, make_model, save_model, shared_tokenizer

LABELS = ["mat", "sat on the mat", "hello"]
TASK: dict[str, Any] = {"references": "answer", "metrics": ["exact_match"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tasks") / "model", context=2048)


def run(model: Path, folder: Path, section: dict[str, Any], *, tokens: int = 6, **also: Any) -> TaskResult:
    written = {"generate": {"max_new_tokens": tokens}, **also, "eval": section}
    (folder / "task.yaml").write_text(json.dumps(written), encoding="utf-8")
    recipe = load_recipe(str(folder / "task.yaml"))
    return run_tasks(model, from_recipe(recipe), recipe, Silent(), predictions=folder / "answers.jsonl")


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def likelihood(model: Any, prompt: str, label: str, *, end: bool) -> float:
    tokenizer = shared_tokenizer()
    before = tokenizer(prompt)["input_ids"]
    ids = [*before, *tokenizer(label)["input_ids"], *([0] if end else [])]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(scores[at - 1, ids[at]]) for at in range(len(before), len(ids)))


@pytest.mark.parametrize(("labels", "end"), [(LABELS, False), (["mat", "mat."], True)])
def test_labels_are_chosen_as_a_plain_loop_chooses(model: Path, tmp_path: Path, labels: list[str], end: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
    rows = [{"q": f"the cat {i * i}", "answer": labels[i % len(labels)]} for i in range(24)]
    section = {"data": write(tmp_path, rows), "prompt": "say {q}:", "references": "answer", "labels": labels}
    found = run(model, tmp_path, section | {"metrics": ["accuracy", "f1"]})
    plain = make_model(context=2048)
    expected = []
    for row, line in zip(rows, answers(tmp_path), strict=True):
        scores = {label: likelihood(plain, f"say {row['q']}:", label, end=end) for label in labels}
        assert line["label_scores"] == pytest.approx(scores, rel=1e-4)
        expected.append(max(scores, key=lambda label: scores[label]))
    right = [row["answer"] for row in rows]
    assert found.metrics["accuracy"] == sklearn.accuracy_score(right, expected)
    assert found.metrics["f1_macro"] == sklearn.f1_score(
        right, expected, labels=labels, average="macro", zero_division=0
    )
    assert found.metrics["label_scores"].endswith("with the end of text") is end
    assert "precision_macro" not in found.metrics and found.rows == 24


@pytest.mark.parametrize("how", ["normalized", "calibrated"])
def test_other_scores_of_labels_give_every_row_a_label(model: Path, tmp_path: Path, how: str) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    data = write(tmp_path, [{"prompt": "the cat", "answer": " mat "}])
    section = {"data": data, "references": "answer", "metrics": ["accuracy"], "labels": LABELS, "label_scores": how}
    assert run(model, tmp_path, section).metrics["label_scores"] == how
    assert answers(tmp_path)[0]["label"] in LABELS


def test_texts_are_those_of_transformers_and_scored_by_the_references(model: Path, tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    tokenizer, plain = shared_tokenizer(), make_model(context=2048)
    texts = []
    for i in range(8):
        ids = torch.tensor([tokenizer(f"the cat {i}" + " sat" * i)["input_ids"]])
        out = plain.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=0)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    references = [texts[0], [texts[1], "hello"], "hello world", *texts[3:]]
    rows = [{"prompt": f"the cat {i}" + " sat" * i, "answer": references[i]} for i in range(8)]
    section = {"data": write(tmp_path, rows), "references": "answer", "metrics": ["chrf", "exact_match", "quality"]}
    found = run(model, tmp_path, section)
    assert [line["prediction"] for line in answers(tmp_path)] == texts
    streams = [[each if isinstance(each, str) else each[0] for each in references], [None, "hello", *[None] * 6]]
    assert found.metrics["chrf"] == sacrebleu.corpus_chrf(texts, streams).score
    assert found.metrics["exact_match"] == 7 / 8
    assert 0 <= found.metrics["ended"] <= 1


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"prompt": "a"}, {}, "has no column 'answer'"),
        ({"text": "a", "answer": "b"}, {}, "has no column 'prompt'"),
        ({"prompt": ["a"], "answer": "b"}, {}, "holds a list, not text"),
        ({"prompt": "a", "answer": None}, {}, "column 'answer' holds null"),
        ({"prompt": "a", "answer": []}, {}, "column 'answer' holds an empty list"),
        ({"prompt": "a", "answer": ["b", None]}, {}, "column 'answer' holds a list with null"),
        ({"prompt": "a", "answer": "\ud800"}, {}, "column 'answer' holds a lone surrogate"),
        ({"prompt": "a", "answer": " "}, {"metrics": ["wer"]}, "the reference is empty"),
        ({"prompt": "a", "answer": ["b", ""]}, {"metrics": ["bleu"]}, "the reference is empty"),
        ({"prompt": "a", "answer": "six"}, {"metrics": ["numeric_match"]}, "no number in the reference 'six'"),
        ({"prompt": "a", "answer": "dog"}, {"metrics": ["accuracy"], "labels": LABELS}, "'dog' is none of the labels"),
        ({"prompt": "the cat " * 2048, "answer": "dog"}, {}, "the model's context"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(
    model: Path, tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    for package in ("sklearn", "sacrebleu", "jiwer"):
        pytest.importorskip(package, reason="the extra eval is not installed")
    data = write(tmp_path, [{"prompt": "the cat", "answer": ["hello", "5"][0 if "labels" in changes else 1]}, row])
    with pytest.raises(DataError, match=said) as caught:
        run(model, tmp_path, {**TASK, "data": data, **changes})
    assert str(caught.value.where).endswith("rows.jsonl:2") and caught.value.exit_code == 3


def test_rows_that_are_wrong_can_be_left_out(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path, [{"prompt": "a", "answer": "b"}, {"prompt": "a"}, {"prompt": "c", "answer": "d"}])
    found = run(model, tmp_path, {**TASK, "data": data}, data={"train": "none.txt", "on_bad_row": "skip"})
    assert found.rows == 2


def test_an_empty_reference_is_an_answer_to_squads_metrics(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path, [{"prompt": "a", "answer": ""}])
    found = run(model, tmp_path, {**TASK, "data": data, "metrics": ["exact_match", "f1"]})
    assert found.metrics["exact_match"] == found.metrics["f1"] == float(not answers(tmp_path)[0]["prediction"])


def test_no_rows_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row to score"):
        run(model, tmp_path, {**TASK, "data": write(tmp_path, [])})
    with pytest.raises(UsageError, match="rows of files"):
        run(model, tmp_path, TASK, data={"train": "builtin:pydocs"})


def test_files_whose_lines_belong_together(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\nthe mat\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("die Katze\ndie Matte\n", encoding="utf-8")
    section = {"data": {"path": {"en": "a.txt", "de": "b.txt"}}, "prompt": "{en} = ", "references": "de"}
    assert run(model, tmp_path, {**section, "metrics": ["exact_match"]}).rows == 2
    assert [(line["prompt"], line["references"]) for line in answers(tmp_path)] == [
        ("the cat = ", ["die Katze"]),
        ("the mat = ", ["die Matte"]),
    ]
    (tmp_path / "b.txt").write_text("die Katze\n", encoding="utf-8")
    with pytest.raises(DataError, match="has 1 lines, and another file"):
        run(model, tmp_path, {**section, "metrics": ["exact_match"]})


def test_values_of_a_column_are_mapped(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    (tmp_path / "rows.tsv").write_text("good\t1\nbad\t0\n", encoding="utf-8")
    source = {"path": "rows.tsv", "columns": ["prompt", "y"], "map": {"y": {"0": "mat", "1": "hello"}}}
    section = {"data": source, "references": "y", "metrics": ["accuracy"], "labels": LABELS}
    assert run(model, tmp_path, section).rows == 2
    assert [line["references"] for line in answers(tmp_path)] == [["hello"], ["mat"]]
    (tmp_path / "rows.tsv").write_text("good\t2\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds '2', which map does not know"):
        run(model, tmp_path, section)


def test_weights_that_are_not_finite_are_code_5(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    shared_tokenizer().save_pretrained(str(tmp_path / "broken"))
    data = write(tmp_path, [{"prompt": "a", "answer": "mat"}])
    for section in (TASK, {**TASK, "metrics": ["accuracy"], "labels": LABELS}):
        with pytest.raises(DivergedError, match=r"rows\.jsonl:1"):
            run(tmp_path / "broken", tmp_path, {**section, "data": data})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"metrics": ["bleu"]}, "bleu needs references"),
        ({"metrics": ["accuracy"], "references": "a"}, "accuracy needs labels"),
        ({"labels": ["a", "b"]}, "labels are measured by"),
        ({"metrics": ["accuracy"], "references": "a", "labels": ["a"]}, "at least two"),
        ({"metrics": ["accuracy"], "references": "a", "labels": ["a", " a"]}, "there twice"),
        ({"metrics": ["accuracy"], "references": "a", "labels": ["a", " "]}, "a label is empty"),
        ({"metrics": []}, "metrics is empty"),
        ({"prompt": "no column"}, "no column in it"),
        ({"prompt": "{a!r}"}, "filled in as it is"),
        ({"prompt": "{}"}, "names no column"),
        ({"prompt": "{a"}, "expected '}' before end"),
        ({"label_scores": "normalized"}, "belongs to labels"),
    ],
)
def test_a_task_that_lacks_something_is_a_wrong_recipe(tmp_path: Path, section: dict[str, Any], said: str) -> None:
    (tmp_path / "task.yaml").write_text(json.dumps({"eval": section}), encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(tmp_path / "task.yaml"))


SETS: dict[str, dict[str, Any]] = {
    "sst2/test.tsv": {
        "data": {"columns": ["sentence", "y"], "map": {"y": {"0": "negative", "1": "positive"}}},
        "prompt": "{sentence}\nIt is",
        "references": "y",
        "labels": [" negative", " positive"],
        "metrics": ["accuracy", "precision", "recall", "f1"],
    },
    "scitldr/test.jsonl": {"data": {}, "prompt": "{title}: ", "references": "references", "metrics": ["rouge"]},
    "gsm8k/test.jsonl": {
        "data": {},
        "prompt": "{question}\n",
        "references": "answer",
        "metrics": ["numeric_match", "exact_match"],
    },
}


@pytest.mark.parametrize("name", SETS)
def test_public_sets_are_read(model: Path, tmp_path: Path, name: str) -> None:
    path = shared_data(name)
    for package in ("sklearn", "rouge_score"):
        pytest.importorskip(package, reason="the extra eval is not installed")
    section = SETS[name]
    found = run(model, tmp_path, {**section, "data": {**section["data"], "path": str(path)}, "limit": 12})
    assert found.rows == 12
    assert all(0 <= value <= 1 for value in found.metrics.values() if isinstance(value, float))


def test_a_translation_set_of_two_files_is_read(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    paths = {each: str(shared_data(f"multi30k/test_2016_flickr.{each}")) for each in ("en", "de")}
    section = {"data": {"path": paths}, "prompt": "{en} = ", "references": "de", "metrics": ["bleu", "chrf"]}
    found = run(model, tmp_path, {**section, "limit": 12})
    assert found.rows == 12 and "|version:" in found.metrics["bleu_signature"]


def test_the_end_of_text_is_the_first_token() -> None:
    assert shared_tokenizer().eos_token == END and shared_tokenizer().eos_token_id == 0
