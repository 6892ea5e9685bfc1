"""Asking a model about pictures: on the command line, in a file, and in a chat."""

from __future__ import annotations

import json
from pathlib import Path
from signal import SIGKILL

import pytest

from gptcli.processors import save_processor
from tests.conftest import Cli
from tests.media import TEMPLATE, needs_media, png, random_built
from tests.runs import Forks
from tests.tiny import save_model

pytestmark = needs_media
GREEDY = ("--greedy", "--max-new-tokens", "6", "--json")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models that see (`sees`, `chats`), one of text (`reads`), and pictures a, b, c."""
    folder = tmp_path_factory.mktemp("media")
    for name, template in (("sees", None), ("chats", TEMPLATE)):
        model, processor = random_built(tmp_path_factory.mktemp(name), "llava", template=template)
        model.save_pretrained(folder / name)
        save_processor(processor, folder / name)
    save_model(folder / "reads")
    for seed, name in enumerate("abc"):
        (folder / f"{name}.png").write_bytes(png(seed))
    (folder / "text.png").write_text("no picture")
    return folder


def text_of(run_cli: Cli, here: Path, *arguments: str) -> str:
    done = run_cli("generate", "sees", *arguments, *GREEDY, cwd=here)
    assert done.code == 0, done.err
    return str(json.loads(done.out)["completions"][0]["text"])


def test_a_picture_stands_where_the_prompt_says_and_decides_the_text(here: Path, run_cli: Cli) -> None:
    before = text_of(run_cli, here, "--image", "a.png", "-p", "it is")
    assert before == text_of(run_cli, here, "--image", "a.png", "-p", "{image}\nit is")
    assert before != text_of(run_cli, here, "--image", "b.png", "-p", "it is")
    done = run_cli(
        "generate", "sees", "--image", "a.png", "--image", "b.png", "-p", "{image} or {image}: ", *GREEDY[:3], cwd=here
    )
    assert done.code == 0 and done.out.startswith("[image a.png] or [image b.png]: "), done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("sees", "--image", "none.png"), 3, "none.png does not exist"),
        (("sees", "--image", "text.png"), 3, "text.png is not an image"),
        (("sees", "--image", "."), 3, "is a folder, not a file"),
        (("sees", "--image", "http://127.0.0.1/a.png"), 3, "not fetched unless --allow-urls is given"),
        (("sees", "--audio", "a.png"), 2, "sees reads no audios, only images"),
        (("reads", "--image", "a.png"), 2, "reads is a model of text alone: it reads no images"),
        (("sees", "--image", "a.png", "-p", "{image} {image}"), 2, "has 2 places {image}, and the images are 1"),
        (("sees", "--image", "a.png", "-p", "<image>"), 3, "holds <image>, by which the model knows an image"),
        (("sees", "-p", "a {image}"), 2, "the prompt has a place {image}, and no image is given"),
        (("sees", "-p", "a <image>"), 3, "holds <image>, by which the model knows an image"),
        (("sees", "--image", "a.png", "-p", "x", "--prompt-lookup", "2"), 2, "goes with no images and sounds"),
        (("sees", "--image", "a.png", "--file", "in.jsonl", "--output", "o.jsonl"), 2, "do not go with --file"),
        (("sees", "--image-column", "image"), 2, "--image-column goes with --file"),
    ],
)
def test_what_is_wrong_is_said(here: Path, run_cli: Cli, arguments: tuple[str, ...], code: int, says: str) -> None:
    prompt = () if {"-p", "--file", "--image-column"} & {*arguments} else ("-p", "x")
    done = run_cli("generate", *arguments, *prompt, cwd=here)
    assert done.code == code and says in done.err, done.err
    assert "Traceback" not in done.err and not done.out


def test_a_file_has_its_pictures_in_a_column(here: Path, run_cli: Cli) -> None:
    rows = [
        {"picture": "a.png", "thing": "it is"},
        {"picture": None, "thing": "so"},
        {"picture": "b.png", "thing": "it is"},
    ]
    (here / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--file", "in.jsonl", "--template", "{image}{thing}", "--image-column", "picture", "--output", "out.jsonl")
    done = run_cli("generate", "sees", *asked, *GREEDY[:3], "--save-every", "1", cwd=here)
    assert done.code == 0, done.err
    written = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("picture", "thing")} for row in written] == rows
    texts = [row["completions"][0]["text"] for row in written]
    assert texts[0] == text_of(run_cli, here, "--image", "a.png", "-p", "{image}it is")
    assert texts[1] == text_of(run_cli, here, "-p", "so") and texts[2] != texts[0]
    assert "is finished" in run_cli("generate", "sees", *asked, *GREEDY[:3], "--save-every", "1", cwd=here).out


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        ('"none.png"', "none.png does not exist"),
        ('"text.png"', "text.png is not an image"),
        ("7", "the value is a number: neither a path nor bytes"),
        ('["a.png", "b.png"]', "has 2 images, and the prompt has 1 place {image}"),
    ],
)
def test_a_row_whose_picture_cannot_be_used_is_named(here: Path, run_cli: Cli, picture: str, says: str) -> None:
    (here / "bad.jsonl").write_text(f'{{"p": "x", "image": "a.png"}}\n{{"p": "x", "image": {picture}}}\n')
    asked = ("--file", "bad.jsonl", "--template", "{image} {p}", "--image-column", "image", "--output", "bad-out.jsonl")
    done = run_cli("generate", "sees", *asked, cwd=here)
    assert done.code == 3 and "bad.jsonl:2" in done.err and says in done.err, done.err
    assert not (here / "bad-out.jsonl").exists()


def test_a_killed_job_goes_on_with_the_pictures_that_it_began_with(here: Path, run_cli: Cli, forks: Forks) -> None:
    for name in "def":
        (here / f"{name}.png").write_bytes(png(7))
    rows = [{"prompt": f"{name} " * length, "image": f"{name}.png"} for length, name in enumerate("def", 1)]
    (here / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["generate", "sees", "--file", "jobs.jsonl", "--image-column", "image", "--save-every", "1", *GREEDY[:3]]
    assert run_cli(*asked, "--output", "whole.jsonl", cwd=here).code == 0
    killed = [*asked, "--output", "killed.jsonl"]
    fault = {"at": r"os\.fsync .*/done-0\.jsonl", "then": 1, "do": "SIGKILL"}
    assert forks(*killed, cwd=here, fault=fault).code == -SIGKILL
    for name in "def":
        (here / f"{name}.png").write_bytes(png(8))
    changed = run_cli(*killed, cwd=here)
    assert changed.code == 3 and "is another one" in changed.err, changed.err
    for name in "def":
        (here / f"{name}.png").write_bytes(png(7))
    done = run_cli(*killed, cwd=here)
    assert done.code == 0 and "going on: 2 of 3 prompts" in done.out, done.err
    assert (here / "killed.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_a_chat_is_shown_pictures(here: Path, run_cli: Cli) -> None:
    lines = ["/image a.png", "what?", "/save chat.json", "/undo", "/image b.png", "/undo", "/load chat.json", "and?"]
    done = run_cli("generate", "chats", "--chat", *GREEDY[:3], cwd=here, stdin="\n".join(lines))
    assert done.code == 0, done.err
    assert "[image a.png, 28 x 28]" in done.err and "[taken back: [image a.png]what?]" in done.err
    assert "[taken back: image b.png]" in done.err
    value = json.loads((here / "chat.json").read_text())
    assert value["messages"][0]["content"][0] == {"type": "image", "path": str((here / "a.png").resolve())}
    again = run_cli("generate", "chats", "--chat", "--image", "a.png", *GREEDY[:3], cwd=here, stdin="what?\nand?\n")
    assert again.out == done.out, "the chat that was loaded is the one that was saved"
    other = run_cli("generate", "chats", "--chat", *GREEDY[:3], cwd=here, stdin="/image b.png\nwhat?\n")
    assert other.out and not done.out.startswith(other.out)


@pytest.mark.parametrize(
    ("model", "line", "code", "says"),
    [
        ("chats", "/image none.png", 3, "none.png does not exist"),
        ("chats", "/image", 2, "/image needs a file"),
        ("chats", "/audio a.png", 2, "chats reads no audios"),
        ("chats", "/image http://127.0.0.1/a.png", 3, "not fetched unless the chat is begun with --allow-urls"),
        ("reads", "/image a.png", 2, "reads is a model of text alone"),
    ],
)
def test_what_a_chat_cannot_be_shown_is_said(
    here: Path, run_cli: Cli, model: str, line: str, code: int, says: str
) -> None:
    done = run_cli("generate", model, "--chat", cwd=here, stdin=f"{line}\n")
    assert done.code == code and says in done.err, done.err
