from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import make_project
from tests.runs import Forks
from tests.tiny import make_model


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder with a run of 8 steps, and the same text as lines of two files."""
    folder = make_project(tmp_path_factory.mktemp("compare"))
    done = forks("pretrain", "tiny.yaml", cwd=folder)
    assert done.code == 0, done.err
    lines = (folder / "text.txt").read_text().split("\n\n")
    (folder / "a.txt").write_text("\n".join(lines[:25]) + "\n\n \n")
    (folder / "b.txt").write_text("\n".join(lines[25:]))
    return folder


def test_a_later_checkpoint_wins_and_a_model_is_no_different_from_itself(here: Path, forks: Forks) -> None:
    results = forks("eval", "runs/tiny/checkpoint-4", "tiny", "tiny.yaml", "--json", cwd=here).json()
    found = results[1]["compared"]
    assert (found["with"], found["by"], found["verdict"]) == ("runs/tiny/checkpoint-4", "loss", "better")
    assert found["p"] < 0.01 and found["interval"][0] < found["difference"] < found["interval"][1] < 0
    assert found["difference"] == pytest.approx(results[1]["loss"] - results[0]["loss"])
    assert results[0]["interval"]["loss"][0] < results[0]["loss"] < results[0]["interval"]["loss"][1]
    again = forks("runs", "compare", "tiny", "tiny", "runs/tiny/checkpoint-4", "--json", cwd=here)
    assert again.err.count("as kept of an earlier evaluation") == 3 and "windows of" not in again.err
    itself, earlier = (result["compared"] for result in again.json()[1:])
    assert (itself["verdict"], itself["difference"], itself["p"]) == ("no difference", 0, 1)
    assert earlier["verdict"] == "worse" and earlier["difference"] == pytest.approx(-found["difference"])


def test_a_comparison_scores_what_is_not_kept_and_what_has_changed(here: Path, forks: Forks) -> None:
    data = ("--data", "a.txt", "--documents", "line")
    first = forks("runs", "compare", "tiny", "runs/tiny/checkpoint-4", *data, "--markdown", "table.md", cwd=here)
    assert first.code == 0 and first.out.count("windows of 32 tokens") == 2, first.err
    assert "worse" in first.out and "beside runs/tiny/final" in first.out
    table = (here / "table.md").read_text()
    assert table.startswith("a.txt: 25 documents") and table.count("\n| ") == 4 and "| worse |" in table
    for more in (("--stride", "8"), ("--limit", "12"), ("--sequence-length", "16")):
        changed = forks("runs", "compare", "tiny", "runs/tiny/checkpoint-4", *data, *more, cwd=here)
        assert changed.out.count("windows of") == 2
    text = (here / "a.txt").read_text()
    (here / "a.txt").write_text(text.replace("model", "ledom"))
    changed = forks("runs", "compare", "tiny", "runs/tiny/checkpoint-4", *data, cwd=here)
    (here / "a.txt").write_text(text)
    assert changed.out.count("windows of") == 2


def test_sources_are_told_apart_and_documents_without_text_are_said(here: Path, forks: Forks) -> None:
    data = ("--documents", "line", "--data", "a.txt", "--data", "b.txt")
    done = forks("eval", "tiny", *data, "--json", cwd=here)
    result = done.json()
    assert [(source["source"], source["documents"]) for source in result["sources"]] == [("a.txt", 25), ("b.txt", 55)]
    alone = forks("eval", "tiny", "--documents", "line", "--data", "b.txt", "--json", cwd=here).json()
    assert alone["sources"] == []
    assert result["sources"][1]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert sum(source["tokens"] for source in result["sources"]) == result["tokens"]
    assert "2 documents without text were left out" in done.err
    shown = forks("eval", "tiny", *data, cwd=here).out
    assert "by source" in shown and "(95%: " in shown and "bits/character" in shown


def test_few_documents_have_no_interval_and_no_verdict(here: Path, forks: Forks) -> None:
    results = forks("eval", "tiny", "runs/tiny/checkpoint-4", "--data", "a.txt", "--json", cwd=here).json()
    assert results[0]["interval"] == {"loss": None, "bits_per_byte": None}
    assert results[1]["compared"]["verdict"] == "too few documents"


def test_a_model_that_gives_nan_for_a_token_is_code_5_and_names_the_document(here: Path, forks: Forks) -> None:
    broken = here / "broken"
    shutil.copytree(here / "runs" / "tiny" / "final", broken)
    model = make_model("llama", vocab_size=258)
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("Q")] = float("nan")
    model.save_pretrained(broken)
    rows = ["fine"] * 12
    rows[6] = "a Q is bad"
    (here / "rows.txt").write_text("\n".join(rows))
    done = forks("eval", "tiny", "broken", "--data", "rows.txt", "--documents", "line", "--json", cwd=here)
    assert done.code == 5 and "no finite loss of 1 of 12 documents; the first: rows.txt:7" in done.err
    assert done.json()[1]["compared"]["verdict"] == "not finite" and done.json()[1]["loss"] is None


@pytest.mark.parametrize("file", [".", "absent/table.md"])
def test_a_table_that_cannot_be_written_is_said_before_anything_is_scored(here: Path, forks: Forks, file: str) -> None:
    done = forks("eval", "tiny", "--data", "a.txt", "--markdown", file, cwd=here)
    assert done.code == 2 and "--markdown" in done.err and "windows of" not in done.out
    assert not (here / "absent").exists()


def test_a_comparison_of_one_model_is_a_usage_error(here: Path, forks: Forks) -> None:
    done = forks("runs", "compare", "tiny", cwd=here)
    assert done.code == 2 and "two models" in done.err
