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
