from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.cli.evaluate import sort_arguments
from gptcli.data.tokenize import prepare
from gptcli.errors import UsageError
from gptcli.recipe.load import dump_yaml, load_recipe, resolved
from gptcli.reporting import Silent
from gptcli.runs.folder import RunFolder
from tests.conftest import Cli, make_project
from tests.tiny import make_model

KEYS = ["model", "data", "loss", "perplexity", "bits_per_byte", "documents", "tokens", "bytes", "metrics"]
KEYS += ["bits_per_character", "characters", "interval", "sources"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a text, its recipe, and a run of it whose model is random."""
    folder = make_project(tmp_path_factory.mktemp("eval"))
    loaded = load_recipe(str(folder / "tiny.yaml"))
    run = RunFolder(folder / "runs" / "tiny-run")
    run.update(name="tiny-run", status="done", started="2026-01-01T00:00:00+00:00")
    run.resolved.write_text(dump_yaml(resolved(loaded)))
    make_model("llama", vocab_size=258).save_pretrained(run.final)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTCLI_CACHE", str(cache))
        shutil.copytree(prepare(loaded, Silent()).tokenizer, run.final, dirs_exist_ok=True)
    shutil.copytree(run.final, run.checkpoint(4))
    (run.checkpoint(4) / "MANIFEST.json").write_text("{}")
    return folder


def plain_loss(folder: Path, texts: list[str], window: int = 32) -> tuple[float, int]:
    """A loop of transformers alone: bytes are the tokens, 256 is the end of text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for text in texts:
        ids = [256, *text.encode()]
        for begin in range(0, len(ids) - 1, window):
            piece = torch.tensor([ids[begin : begin + window + 1]])
            with torch.no_grad():
                scores = model(piece[:, :-1]).logits.log_softmax(-1)
            total -= float(scores.gather(-1, piece[:, 1:, None]).double().sum())
            count += piece.shape[1] - 1
    return total, count


def check(result: dict[str, Any], texts: list[str], folder: Path) -> None:
    assert list(result) == KEYS
    nats, tokens = plain_loss(folder, texts)
    size = sum(len(text.encode()) for text in texts)
    assert (result["tokens"], result["bytes"], result["documents"]) == (tokens, size, len(texts))
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["characters"] == sum(map(len, texts))
    assert result["bits_per_character"] == pytest.approx(nats / math.log(2) / result["characters"], rel=1e-5)


def held_out(folder: Path, share: float = 0.1) -> list[str]:
    paragraphs = (folder / "text.txt").read_text().split("\n\n")
    return [text[int(len(text) * (1 - share)) :] for text in paragraphs]


def test_files_are_scored_as_a_plain_loop_does(here: Path, run_cli: Cli) -> None:
    texts = ["hello world 世界 🙂\n", "x" * 100]
    for name, text in zip(("a.txt", "b.txt"), texts, strict=True):
        (here / name).write_text(text, encoding="utf-8")
    done = run_cli("eval", "tiny-run", "--data", "a.txt", "--data", "b.txt", "--json", cwd=here)
    assert done.code == 0, done.err
    result = done.json()
    assert (result["model"], result["data"], result["metrics"]) == ("runs/tiny-run/final", "a.txt, b.txt", {})
    check(result, texts, here / "runs" / "tiny-run" / "final")


def test_by_itself_it_takes_the_newest_run_and_what_that_held_out(here: Path, run_cli: Cli) -> None:
    done = run_cli("eval", "--json", cwd=here)
    assert done.code == 0, done.err
    check(done.json(), held_out(here), here / "runs" / "tiny-run" / "final")


def test_another_tokenizer_reads_the_same_held_out_texts(here: Path, run_cli: Cli) -> None:
    recipe = "tokenizer.train={algorithm: bpe, vocab_size: 300}"
    done = run_cli("eval", "tiny.yaml", recipe, "--json", cwd=here)
    assert done.code == 0, done.err
    assert "another" in done.err or "not the recipe's" in done.err
    check(done.json(), held_out(here), here / "runs" / "tiny-run" / "final")


def test_several_models_are_a_list_and_one_table(here: Path, run_cli: Cli) -> None:
    both = ("tiny-run", "runs/tiny-run/checkpoint-4", "tiny.yaml")
    results = run_cli("eval", *both, "--json", "--limit", "5", "--stride", "8", cwd=here).json()
    assert [result["model"] for result in results] == ["runs/tiny-run/final", "runs/tiny-run/checkpoint-4"]
    assert results[0]["loss"] == results[1]["loss"] and results[0]["documents"] == 5
    table = run_cli("eval", *both, "--limit", "5", cwd=here)
    assert table.code == 0 and "checkpoint-4" in table.out and "perplexity" in table.out


def test_columns_of_tables_and_lines_of_text(here: Path, run_cli: Cli) -> None:
    (here / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    rows = run_cli("eval", "--data", "rows.jsonl", "--text", "body", "--json", cwd=here).json()
    (here / "lines.txt").write_text("one\ntwo\n")
    lines = run_cli("eval", "--data", "lines.txt", "--documents", "line", "--json", cwd=here).json()
    assert rows["documents"] == lines["documents"] == 2
    assert rows["loss"] == lines["loss"]


def test_a_loss_that_is_not_finite_is_null_and_exits_5(here: Path, run_cli: Cli) -> None:
    broken = here / "broken"
    shutil.copytree(here / "runs" / "tiny-run" / "final", broken)
    model = make_model("llama", vocab_size=258)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    done = run_cli("eval", "broken", "tiny.yaml", "--json", cwd=here)
    assert done.code == 5
    assert done.json()["loss"] is None and done.json()["bits_per_byte"] is None
    assert "not a finite number" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--data", "empty.txt"], 3, "empty.txt"),
        (["--data", "absent.txt"], 3, "absent.txt"),
        (["--data", "text.txt", "--sequence-length", "65"], 2, "64"),
        (["--data", "text.txt", "--stride", "33"], 2, "stride"),
        (["--data", "text.txt", "--documents", "page"], 2, "page"),
        (["tiny.yaml", "other.yaml"], 2, "both recipes"),
        (["tiny.yaml", "data.validation=0"], 2, "--data"),
        (["plain"], 2, "--data"),
        (["absent"], 7, "absent"),
        (["without", "--data", "text.txt"], 7, "without"),
    ],
)
def test_errors_are_a_few_lines(here: Path, run_cli: Cli, arguments: list[str], code: int, text: str) -> None:
    (here / "empty.txt").touch()
    (here / "without").mkdir(exist_ok=True)
    shutil.copytree(here / "runs" / "tiny-run" / "final", here / "plain", dirs_exist_ok=True)
    done = run_cli("eval", *arguments, cwd=here)
    assert done.code == code, done.err
    assert text in done.err and "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 10


def test_arguments_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sort_arguments(["a/b", "x.yaml", "eval.limit=3", "run"]) == (["a/b", "run"], "x.yaml", ["eval.limit=3"])
    assert sort_arguments(["quickstart", "other"]) == (["other"], "quickstart", [])
    assert sort_arguments([]) == ([], None, [])
    with pytest.raises(UsageError):
        sort_arguments(["quickstart", "x.yml"])
    assert sort_arguments(["tiny"])[1] == "tiny"
    RunFolder(tmp_path / "runs" / "tiny").update(status="done")
    assert sort_arguments(["tiny"]) == (["tiny"], None, [])
    RunFolder(tmp_path / "runs" / "quickstart").update(status="done")
    assert sort_arguments(["quickstart"])[1] == "quickstart"
