"""What others wrote is shown, and never acted on: control characters and rich's markup in texts, names and keys.

The commands write to a real terminal (a pty). A terminal acts on what begins with ESC or its one-character forms (C1),
so of those only what gptcli itself shows may come through: colours, and a bar's line that is written anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import UsageError
from tests.conftest import Cli, make_project
from tests.tiny import save_model
from tests.warm import MB, Ended, Warm

# Sets the title, clears the screen, moves up, answers with what a shell would read as input; and the same in C1.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[1A\x1b[6n\x9b2J\x9d0;owned\x9c\x08\x7f"
MARKUP = "[red]red[/] [/] [bold] :skull: [link=https://example.com]x[/link] \\"
HOSTILE = ESCAPES + MARKUP
OURS = re.compile(r"\x1b\[([0-9;]*m|\?25[lh]|2K)")  # colours, and what a progress bar needs
ACTED_ON = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
TERMINAL = {"terminal": True, "TERM": "xterm-256color", "COLUMNS": "200"}


def assert_harmless(done: Ended, *, markup: bool = True) -> None:
    """Nothing that a terminal acts on but colours, and markup as it was written."""
    text = OURS.sub("", done.out).replace("\r\n", "\n")
    found = ACTED_ON.search(text.replace("\r", ""))
    assert found is None, repr(text[max(0, found.start() - 40) : found.end() + 40])
    assert "\u241b]0;owned" in text
    assert "Traceback" not in text
    if markup:
        joined = re.sub(r"\s+", " ", text)
        assert re.sub(r"\s+", " ", MARKUP) in joined, joined


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run of which every text is hostile."""
    folder = make_project(tmp_path_factory.mktemp("terminal"))
    save_model(folder / "model")
    run = folder / "runs" / os.fsdecode(b"[red]x[b]\x1b[2J")
    run.mkdir(parents=True)
    fields = {
        "name": HOSTILE, "status": "failed", "reason": HOSTILE, "device": HOSTILE, "command_line": HOSTILE,
        "started": "2026-01-01T00:00:00+00:00", "versions": {HOSTILE: HOSTILE}, "result": {"loss": HOSTILE},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(fields))
    broken = folder / "runs" / "broken"
    broken.mkdir()
    (broken / "run.json").write_text(json.dumps({"status": HOSTILE}))
    return folder


@pytest.mark.parametrize("command", [("runs", "list"), ("runs", "show", os.fsdecode(b"[red]x[b]\x1b[2J"))])
def test_a_hostile_run_is_listed_and_shown(here: Path, cold: Warm, command: tuple[str, ...]) -> None:
    done = cold(*command, cwd=here, **TERMINAL)
    assert done.code == 0, done.out
    text = OURS.sub("", done.out).replace("\r", "")
    assert ACTED_ON.search(text) is None, repr(text)
    assert "[red]x[b]\u241b[2J" in text.replace("\n", "")


@pytest.mark.parametrize(
    "text",
    [
        "{key}: 1\n",
        "train: {{{key}: 1}}\n",
        "seed: {key}\n",
        "name: {key}\n",
        "train: {{optimizer: {key}}}\n",
        "data: {{train: {key}}}\ntrain: {{max_steps: 1}}\n",
        "extends: {key}\n",
    ],
)
def test_keys_and_values_of_a_recipe_are_shown_in_its_errors(tmp_path: Path, cold: Warm, text: str) -> None:
    quoted = json.dumps(HOSTILE)
    (tmp_path / "r.yaml").write_text(text.format(key=quoted))
    done = cold("pretrain", "r.yaml", cwd=tmp_path, **TERMINAL)
    assert done.code == UsageError.exit_code, done.out
    shown = OURS.sub("", done.out).replace("\r", "")
    assert ACTED_ON.search(shown) is None, repr(shown)
    assert "Traceback" not in shown and len(shown.splitlines()) <= 8


@pytest.mark.parametrize(
    "arguments",
    [
        ("pretrain", HOSTILE),
        ("pretrain", f"{HOSTILE}.yaml"),
        ("pretrain", "tiny.yaml", f"{HOSTILE}=1"),
        ("pretrain", "tiny.yaml", f"name={HOSTILE}"),
        ("pretrain", "tiny.yaml", f"seed={HOSTILE}"),
        ("pretrain", "tiny.yaml", f"--{HOSTILE}"),
        ("pretrain", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj"),
        ("pretrain", "\udcff\udcfe"),
        ("pretrain", "tiny.yaml", "name=\udcff"),
        ("pretrain", "tiny.yaml", "data.train=\udcff.txt"),
        ("pretrain", "x" * 100_000),
        (HOSTILE,),
        ("runs", "show", HOSTILE),
        ("generate", HOSTILE, "--prompt", "x"),
        ("generate", "[/x]\udcff", "--prompt", "x"),
        ("eval", HOSTILE, "--data", "x"),
        ("recipes", "show", HOSTILE),
        ("tokenize", "tiny.yaml", "--piece", HOSTILE),
    ],
    ids=lambda arguments: ascii(arguments)[:60],
)
def test_hostile_arguments_are_told_in_a_few_lines(here: Path, cold: Warm, arguments: tuple[str, ...]) -> None:
    done = cold(*arguments, cwd=here, **TERMINAL)
    assert done.code in (2, 7), done.out
    text = OURS.sub("", done.out).replace("\r", "")
    assert ACTED_ON.search(text) is None, repr(text)
    assert "Traceback" not in text and len(text.splitlines()) <= 8
    assert max(map(len, text.splitlines())) <= 2100


def test_a_recipe_is_shown_on_a_terminal_as_text_and_in_a_pipe_as_it_is(tmp_path: Path, cold: Warm) -> None:
    (tmp_path / "r.yaml").write_text(f"# {HOSTILE}\n")
    assert_harmless(cold("recipes", "show", "r.yaml", cwd=tmp_path, **TERMINAL))
    piped = cold("recipes", "show", "r.yaml", cwd=tmp_path)
    assert piped.out == f"# {HOSTILE}\n"


@pytest.mark.parametrize("mode", [("--preview", "1"), ("--json",), ("--preview", "1", "--json")])
def test_documents_are_shown_as_text(tmp_path: Path, warm: Warm, mode: tuple[str, ...]) -> None:
    make_project(tmp_path)
    (tmp_path / "text.txt").write_text(f"{HOSTILE} " * 30)
    done = warm("tokenize", "tiny.yaml", *mode, cwd=tmp_path, GPTCLI_CACHE=str(tmp_path / "cache"), **TERMINAL)
    assert done.code == 0, done.out
    text = OURS.sub("", done.out).replace("\r", "")
    assert ACTED_ON.search(text) is None, repr(text[:2000])


def test_names_of_models_and_data_are_shown_by_eval(here: Path, tmp_path: Path, warm: Warm) -> None:
    name = "[red][bold]x[b]\x1b[2J\x9b"
    shutil.copytree(here / "model", tmp_path / name)
    (tmp_path / f"{name}.txt").write_text("hello world\n" * 20)
    done = warm("eval", name, "--data", f"{name}.txt", cwd=tmp_path, **TERMINAL)
    assert done.code == 0, done.out
    text = OURS.sub("", done.out).replace("\r", "")
    assert ACTED_ON.search(text) is None, repr(text)
    assert "[red][bold]x[b]\u241b[2J\ufffd" in text
    several = warm("eval", name, name, "--data", f"{name}.txt", cwd=tmp_path, **TERMINAL)
    assert several.code == 0, several.out
    assert ACTED_ON.search(OURS.sub("", several.out).replace("\r", "")) is None


def test_what_a_model_writes_is_shown_as_text_and_piped_as_it_is(here: Path, warm: Warm) -> None:
    arguments = ("generate", "model", "--greedy", "--max-new-tokens", "1")
    done = warm(*arguments, cwd=here, stdin=HOSTILE.encode(), **TERMINAL)
    assert done.code == 2, "longer than the model's context of 64"
    done = warm(*arguments, cwd=here, stdin=ESCAPES.encode(), **TERMINAL)
    assert done.code == 0, done.out
    assert_harmless(done, markup=False)
    piped = warm(*arguments, cwd=here, stdin=ESCAPES.encode())
    assert piped.out.startswith(ESCAPES)
    as_json = warm(*arguments, "--json", cwd=here, stdin=ESCAPES.encode(), **TERMINAL)
    assert ACTED_ON.search(OURS.sub("", as_json.out).replace("\r", "")) is None
    assert json.loads(as_json.out.splitlines()[-1])["prompt"] == ESCAPES


@pytest.mark.parametrize(
    ("prompt", "stdin", "code"),
    [
        (None, b"a\0b", 0),
        (None, b"\0", 0),
        (None, b"\xff\xfe", 0),
        ("\udcff", b"", 2),
        ("a\ud800b", b"", 2),
        (None, b"ten megabytes " * 750_000, 2),
        (None, b"\0" * 10 * MB, 2),
    ],
    ids=["nul", "only nul", "not utf-8", "surrogate", "half a pair", "10 MB", "10 MB of nul"],
)
def test_any_prompt_is_continued_or_refused(
    here: Path, warm: Warm, prompt: str | None, stdin: bytes, code: int
) -> None:
    given = () if prompt is None else ("--prompt", prompt)
    arguments = ("generate", "model", *given, "--greedy", "--max-new-tokens", "2", "--json", "--quiet")
    done = warm(*arguments, cwd=here, stdin=stdin, seconds=60)
    assert done.code == code, done.err
    assert "Traceback" not in done.err and len(done.err.splitlines()) <= 8
    if code == 0:
        assert json.loads(done.out)["prompt"] == stdin.decode("utf-8", "replace")


def test_a_name_of_no_utf8_is_told_by_the_real_command(tmp_path: Path, run_cli: Cli) -> None:
    for name in ("\udcff.yaml", "\x1b]0;owned\x07.yaml"):
        (tmp_path / name).write_text("{")
        done: Any = run_cli("pretrain", name, cwd=tmp_path)
        assert done.code == 2
        assert "Traceback" not in done.err and "\x1b" not in done.err
        shown = run_cli("recipes", "validate", name, cwd=tmp_path)
        assert shown.code == 2 and "\x1b" not in shown.err
