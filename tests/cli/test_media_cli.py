"""`gptcli tokenize` of rows with images: what is told of bad ones, the report, and the preview."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.media import TINY, needs_media
from tests.unit.data.media.files import make_media

pytestmark = needs_media
RECIPE = f"""\
model: {{type: llava, config: {TINY["llava"]}}}
tokenizer: {{train: {{vocab_size: 300}}}}
data:
  train: a.jsonl
  validation: 0
  format: prompt
  images: [image]
  prompt: "{{image}}\\nThis is a"
  completion: " {{label}}"
  sequence_length: 64
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_media(tmp_path)
    names = ("good.png", "wide.png", "cut.jpg", None)
    rows = ({"image": name and f"media/{name}", "label": "coat"} for name in names)
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def test_a_picture_that_is_cut_off_is_code_3_with_file_and_row(folder: Path, run_cli: Cli) -> None:
    done = run_cli("tokenize", "r.yaml", cwd=folder)
    assert done.code == 3 and "Traceback" not in done.err
    assert "a.jsonl:3" in done.err and "media/cut.jpg ends in the middle (truncated)" in done.err
    assert "data.on_bad_row: skip" in done.err and len(done.err.splitlines()) <= 8


def test_pictures_are_counted_with_the_rows_that_were_left_out(folder: Path, run_cli: Cli) -> None:
    done = run_cli("tokenize", "r.yaml", "data.on_bad_row=skip", cwd=folder, COLUMNS="200")
    assert done.code == 0, done.err
    assert "  2 images in 2 rows (1 without): 28 x 28 to 60 x 40 pixels, 16 tokens each (of a row's 64), " in done.out
    assert "dropped: 1 damaged file; first: a.jsonl:3: damaged file" in done.out
    report = run_cli("tokenize", "r.yaml", "data.on_bad_row=skip", "--json", cwd=folder).json()
    assert report["reused"] and report["dropped"] == {"damaged file": 1}
    assert report["train"]["media"]["image"]["tokens"] == 32


def test_a_preview_names_pictures_and_shows_a_repeated_placeholder_once(folder: Path, run_cli: Cli) -> None:
    done = run_cli("tokenize", "r.yaml", "--preview", "2", cwd=folder, COLUMNS="200")
    assert done.code == 0, done.err
    lines = done.out[done.out.index("a.jsonl:1: ") :].splitlines()
    assert lines[1] == "  image media/good.png (28 x 28, 16 tokens)"
    assert lines[2].startswith("<image> x 16|") and done.out.count("<image>") == 2
    assert "  image media/wide.png (60 x 40, 16 tokens)" in lines
    shown = run_cli("tokenize", "r.yaml", "--preview", "1", "--json", cwd=folder).json()["documents"][0]
    assert shown["media"] == [{"kind": "image", "name": "media/good.png", "extent": [28, 28], "tokens": 16}]
    assert [token["text"] for token in shown["tokens"]].count("<image>") == 16
