from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """\
tokenizer:
  train: {algorithm: bytes}
data:
  train: corpus.txt
  documents: line
  validation: 10%
  sequence_length: 32
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "gptcli", "tokenize", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "corpus.txt").write_text("".join(f"this is line {n}\n" for n in range(500)))
    return tmp_path


def test_the_report_is_printed_and_the_second_run_finds_everything(folder: Path) -> None:
    first = run(folder, "recipe.yaml")
    assert first.returncode == 0, first.stderr
    assert "rows of 32 tokens" in first.stdout and "written" in first.stdout
    second = run(folder, "recipe.yaml")
    assert second.returncode == 0, second.stderr
    assert "found in the cache" in second.stdout


def test_json_is_one_document_and_the_shards_are_there(folder: Path) -> None:
    result = run(folder, "recipe.yaml", "--json", "data.validation=0")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["train"]["documents"] == 500
    assert report["validation"] is None
    assert (Path(report["train_folder"]) / "manifest.json").is_file()
    assert (Path(report["tokenizer_folder"]) / "tokenizer.json").is_file()


def test_quiet_prints_nothing(folder: Path) -> None:
    result = run(folder, "recipe.yaml", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_missing_data_is_code_3_with_the_line_the_key_and_the_nearest_name(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("corpus.txt", "corpsu.txt"))
    result = run(folder, "recipe.yaml")
    assert result.returncode == 3
    assert "recipe.yaml:4" in result.stderr and "corpus.txt" in result.stderr
    assert len(result.stderr.splitlines()) <= 8


def test_a_bad_row_is_code_3_with_file_and_row(folder: Path) -> None:
    with (folder / "corpus.txt").open("ab") as file:
        file.write(b"\xff\n")
    result = run(folder, "recipe.yaml")
    assert result.returncode == 3
    assert "corpus.txt:501" in result.stderr and "on_bad_row" in result.stderr


def test_a_run_loads_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from gptcli.cli.main import main; code = main(['tokenize', 'recipe.yaml', '--quiet']); "
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache")}
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, timeout=120).returncode == 0


@pytest.fixture
def sources(folder: Path) -> Path:
    """Two sources, and a recipe that trains its tokenizer."""
    (folder / "other.jsonl").write_text(
        "".join(json.dumps({"text": f"The {n}th, <|endoftext|>!"}) + "\n" for n in range(9))
    )
    text = RECIPE.replace("algorithm: bytes", "algorithm: bpe, vocab_size: 280").replace("10%", "0")
    (folder / "recipe.yaml").write_text(text.replace("corpus.txt", "[corpus.txt, other.jsonl]"))
    return folder


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_a_preview_shows_documents_of_each_source_in_turn_as_tokens(sources: Path, tokenizer: str) -> None:
    override = "tokenizer.train={algorithm: bytes}" if tokenizer == "bytes" else "tokenizer.train.vocab_size=280"
    result = run(sources, "recipe.yaml", "--preview", "3", "--json", override)
    assert result.returncode == 0, result.stderr
    documents = json.loads(result.stdout)["documents"]
    assert [document["document"] for document in documents] == ["corpus.txt:1", "other.jsonl:1", "corpus.txt:2"]
    texts = ["".join(token["text"] for token in document["tokens"][:-1]) for document in documents]
    assert texts == ["this is line 0", "The 0th, <|endoftext|>!", "this is line 1"]
    for document in documents:
        assert document["total"] == len(document["tokens"])
        last = document["tokens"][-1]
        assert (last["text"], last["special"]) == ("<|endoftext|>", True)
    special = [token["text"] for token in documents[1]["tokens"] if token["special"]]
    assert special == ["<|endoftext|>", "<|endoftext|>"]
    assert not list((sources / "cache").glob("data/*/train"))


def test_a_preview_for_people_has_bars_between_tokens_and_cuts_long_documents(folder: Path) -> None:
    (folder / "corpus.txt").write_text("ab\tc\n" + "z" * 1_000 + "\n")
    result = run(folder, "recipe.yaml", "--preview", "5")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "corpus.txt:1: 5 tokens"
    assert lines[1] == "a|b|⇥|c|<|endoftext|>"
    assert "corpus.txt:2: 1,001 tokens" in lines
    assert "... and 801 more tokens" in result.stdout.replace("\n", " ")
    assert run(folder, "recipe.yaml", "--preview", "2", "--quiet").stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--piece", "0/3"),
        ("--piece", "4/3"),
        ("--piece", "x"),
        ("--piece", "1"),
        ("--piece", "-1/3"),
        ("--piece", "1/0"),
        ("--preview", "3", "--piece", "1/3"),
        ("--preview", "3", "--finish"),
        ("--piece", "1/3", "--finish"),
        ("--piece", "1/3", "--smoke"),
        ("--preview", "0"),
    ],
    ids=" ".join,
)
def test_what_is_no_part_or_excludes_another_option_is_code_2(folder: Path, arguments: tuple[str, ...]) -> None:
    result = run(folder, "recipe.yaml", *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "cache").exists()


def test_ray_that_is_not_installed_is_code_7_with_what_to_install(folder: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from gptcli.cli.main import main; "
        "sys.exit(main(['tokenize', 'recipe.yaml', 'tokenize.executor=ray']))"
    )
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 7, result.stderr
    assert "pip install 'gptcli[ray]'" in result.stderr


CHAT = """\
tokenizer: {train: {algorithm: bpe, vocab_size: 300}, chat_template: chatml}
data: {train: chat.jsonl, format: chat, validation: 0}
"""


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    (tmp_path / "chat.yaml").write_text(CHAT)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}))
    return tmp_path


def test_what_is_trained_on_of_a_conversation_is_shown_and_counted(chat: Path) -> None:
    shown = run(chat, "chat.yaml", "--preview", "1")
    assert shown.returncode == 0, shown.stderr
    assert "chat.jsonl:1" in shown.stdout
    assert "⟦h|e|l|l|o|<|im_end|>⟧⏎" in shown.stdout and shown.stdout.count("⟦") == 2, "the legend, and the answer"
    (document,) = json.loads(run(chat, "chat.yaml", "--preview", "1", "--json").stdout)["documents"]
    assert [token["text"] for token in document["tokens"] if token["supervised"]] == [*"hello", "<|im_end|>"]
    done = run(chat, "chat.yaml")
    assert done.returncode == 0, done.stderr
    assert "training: 1 rows, " in done.stdout and "(6 supervised, " in done.stdout
    assert "dropped: 1 no supervised token; first: chat.jsonl:2" in done.stdout


def test_a_bad_conversation_is_code_3_with_file_and_row(chat: Path) -> None:
    (chat / "chat.jsonl").write_text('{"messages": [{"role": "robot", "content": "hi"}]}\n')
    result = run(chat, "chat.yaml")
    assert result.returncode == 3
    assert result.stderr.startswith("error: chat.jsonl:1: message 1 has the unknown role 'robot'")
    assert "on_bad_row: skip" in result.stderr and len(result.stderr.splitlines()) <= 3
