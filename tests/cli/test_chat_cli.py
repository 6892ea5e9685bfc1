"""The chat in a terminal, where a person types, and from a pipe, where a script does."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import Forks
from tests.terminal import Terminal
from tests.tiny import save_model

TEMPLATE = (
    "{{ raise_exception('only user and assistant') if messages[0].role == 'system' }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
READY = "\x1b[?2004h"  # the terminal is asked to mark pastes: a message can be typed
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
ENDLESS = b"/set max_new_tokens=90000\r", b"/set min_new_tokens=90000\r"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of random weights: one with a chat template, and one without."""
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "base", context=100_000)
    save_model(folder / "model", context=100_000)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    save_model(folder / "any", context=100_000)
    (folder / "any" / "chat_template.jinja").write_text(TEMPLATE.partition("}}")[2])
    save_model(folder / "short", context=64)
    (folder / "short" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def chatting(here: Path, forks: Forks, model: str, *arguments: str) -> Iterator[Terminal]:
    with Terminal(("generate", model, "--chat", "--greedy", *arguments), here, forks.environment, forks) as screen:
        screen.until(READY)
        yield screen


def say(screen: Terminal, keys: bytes) -> str:
    """Type a message or a command; all that is shown until the next can be typed, without what a terminal acts on."""
    screen.type(keys)
    shown = CONTROLS.sub("", screen.until("\x1b[?2004l") and screen.until(READY))
    return shown.replace("\r\n", "\n").strip("\n")


def test_answer_interrupt_undo_quit(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "12") as screen:
        first = say(screen, b"hello\r")
        assert first.endswith("\n[cut at 12 tokens; /set max_new_tokens=24]")
        for setting in ENDLESS:
            say(screen, setting)
        screen.type(b"never end\r")
        screen.until("world")  # of the answer, which has begun
        screen.type(b"\x03\x03")
        screen.until("\n[interrupted]")
        screen.until(READY)
        assert say(screen, b"/save kept.json\r") == "saved 2 messages and their answers to kept.json"
        kept = json.loads((here / "kept.json").read_text())["messages"]
        assert [message["role"] for message in kept] == ["user", "assistant"] * 2
        assert "world" in kept[3]["content"], "what was said until then"
        assert say(screen, b"/undo\r") == "[taken back: never end]"
        assert say(screen, b"/undo\r") == "[taken back: hello]"
        assert "nothing" not in say(screen, b"/undo\r")
        say(screen, b"/set min_new_tokens=0\r")
        say(screen, b"/set max_new_tokens=12\r")
        assert say(screen, b"hello\r") == first, "as if nothing had been said before"
        screen.type(b"/quit\r")
        code, text = screen.finish()
    assert code == 0, text
    assert "Traceback" not in text


def test_ctrl_c_with_nothing_typed_tells_how_to_quit_and_ctrl_d_does(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "3") as screen:
        assert "Ctrl+D or /quit ends the chat" in say(screen, b"\x03")
        assert "Ctrl+D" not in say(screen, b"half a li\x03"), "the line is taken back"
        assert "[cut at 3 tokens" in say(screen, b"hello\r")
        screen.type(b"\x04")
        code, text = screen.finish()
    assert code == 0, text


def test_no_number_of_ctrl_c_ends_the_program(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "90000", "--min-new-tokens", "90000") as screen:
        for _ in range(3):
            screen.type(b"hello\r")
            screen.until("world")
            for _ in range(40):
                screen.type(b"\x03")
            screen.until("[interrupted]")
        screen.type(b"/quit\r")
        code, text = screen.finish()
    assert code == 0, text
    assert "Traceback" not in text and "Exception" not in text


def test_a_paste_of_several_lines_is_one_message(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "3") as screen:
        say(screen, b"\x1b[200~one\n/quit\n\xe4\xb8\x96\xe7\x95\x8c\x1b[201~\r")
        say(screen, b"new\x1b\rline\r")
        say(screen, b"/save pasted.json\r")
        screen.type(b"\x04")
        assert screen.finish()[0] == 0
    said = [m["content"] for m in json.loads((here / "pasted.json").read_text())["messages"][::2]]
    assert said == ["one\n/quit\n世界", "new\nline"]


def test_what_is_typed_while_an_answer_is_shown_waits_for_its_end(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "400", "--min-new-tokens", "400") as screen:
        screen.type(b"hello\r")
        screen.until("world")
        screen.type(b"/undo\r/quit\r")
        shown = screen.until("[cut at 400 tokens")
        code, text = screen.finish()
    assert code == 0 and "/undo" not in shown
    assert "[taken back: hello]" in text


@pytest.mark.parametrize("answering", [False, True])
def test_sigterm_ends_the_chat_and_leaves_the_terminal_as_it_was(here: Path, forks: Forks, answering: bool) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "90000", "--min-new-tokens", "90000") as screen:
        if answering:
            screen.type(b"hello\r")
            screen.until("world")
        screen.process.send_signal(signal.SIGTERM)
        code, text = screen.finish()
        assert screen.echoes()
    assert code == 130, text
    assert text.rindex("\x1b[?2004l") > text.rindex("\x1b[?2004h")
    assert "Traceback" not in text


def test_a_base_model_says_that_it_has_no_template_and_goes_on(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "base", "--max-new-tokens", "6") as screen:
        say(screen, b"hello\r")
        shown = say(screen, b"\r")
        assert shown.endswith("[cut at 6 tokens; Enter: go on; /set max_new_tokens=12]")
        say(screen, b"/save base.json\r")
        assert "no chat template" in say(screen, b"/system be brief\r")
        screen.type(b"\x04")
        code, text = screen.finish()
    assert code == 0
    kept = json.loads((here / "base.json").read_text())["messages"]
    assert [message["content"] for message in kept[::2]] == ["hello", ""], "an empty message lets it go on"
    assert not any(message["content"].endswith("\ufffd") for message in kept), "a character that was cut is no text"
    assert "this model has no chat template: it continues the text so far" in text


def test_every_command_does_what_help_says(here: Path, forks: Forks, tmp_path: Path) -> None:
    with chatting(here, forks, "model", "--max-new-tokens", "4") as screen:
        for name in ("/system", "/set", "/undo", "/retry", "/reset", "/save", "/load", "/quit"):
            assert name in say(screen, b"/help\r")
        answer = say(screen, b"hello\r")
        assert say(screen, b"/retry\r") == answer, "greedy"
        assert "temperature=0.5" in say(screen, b"/set temperature=0.5\r")
        assert "did you mean temperature?" in say(screen, b"/set temprature=1\r")
        assert "temperature=0.5" in say(screen, b"/set\r")
        assert "only user and assistant" in say(screen, b"/system be brief\r")
        assert say(screen, b"/system\r") == "there is no system prompt"
        file = tmp_path / "new folder" / "chat.json"
        say(screen, f"/save {file}\r".encode())
        saved = file.read_bytes()
        assert say(screen, b"/reset\r") == "[all messages are forgotten]"
        assert "there is no message" in say(screen, b"/undo\r")
        assert "there is no message" in say(screen, b"/retry\r")
        assert say(screen, f"/load {file}\r".encode()).startswith("loaded 1 messages")
        say(screen, f"/save {file}\r".encode())
        assert file.read_bytes() == saved
        assert say(screen, b"/undo\r") == "[taken back: hello]"
        screen.type(b"/quit\r")
        assert screen.finish()[0] == 0


def test_files_that_cannot_be_read_or_written_are_told_and_the_chat_goes_on(
    here: Path, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text('{"messages": [{"role": "user"')
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    os.mkfifo(tmp_path / "pipe")
    with chatting(here, forks, "model", "--max-new-tokens", "4") as screen:
        say(screen, b"hello\r")
        for command, why in [
            ("/load {}/broken.json", "is no JSON"),
            ("/load {}/missing.json", "no such file"),
            ("/load {}/pipe", "no such file"),
            ("/load {}", "no such file"),
            ("/load", "needs a file"),
            ("/save", "needs a file"),
            ("/save {}/recipe.yaml", "not written over"),
            ("/save {}/pipe", "not written over"),
            ("/save {}", "not written over"),
            ("/save /dev/null", "not written over"),
            ("/save /proc/chat.json", "could not be written"),
            ("/save {}/recipe.yaml/chat.json", "could not be written"),
            ("/save ~nobody-of-that-name/x", "home"),
            ("/nonsense", "no command"),
        ]:
            shown = say(screen, f"{command.format(tmp_path)}\r".encode())
            assert why in shown and "error:" in shown, (command, shown)
        assert say(screen, b"/undo\r") == "[taken back: hello]"
        screen.type(b"/quit\r")
        code, text = screen.finish()
    assert code == 0 and "Traceback" not in text
    assert (tmp_path / "recipe.yaml").read_text() == "name: mine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "pipe", "recipe.yaml"]


def test_nothing_of_a_file_or_of_a_model_reaches_the_terminal_as_a_command(here: Path, forks: Forks) -> None:
    escapes = "\x1b]0;owned\x07\x1b[2J\x9b2J\x08\u2028"
    said, answer = {"role": "user", "content": f"said {escapes}"}, {"role": "assistant", "content": escapes}
    system = {"role": "system", "content": f"system {escapes}"}
    (here / "hostile.json").write_text(json.dumps({"messages": [said, answer], "settings": {"stop": [escapes]}}))
    (here / "worse.json").write_text(json.dumps({"messages": [{"role": escapes, "content": ""}]}))
    (here / "system.json").write_text(json.dumps({"messages": [system, said, answer]}))
    with chatting(here, forks, "any", "--max-new-tokens", "300", "--min-new-tokens", "300") as screen:
        shown = [say(screen, b"/load hostile.json\r"), say(screen, b"/set\r"), say(screen, b"/undo\r")]
        shown += [say(screen, b"/load worse.json\r"), say(screen, b"/load system.json\r"), say(screen, b"/system\r")]
        shown.append(say(screen, b"hello\r"))  # random bytes, those of a terminal's commands among them
        screen.type(b"\x04")
        assert screen.finish()[0] == 0
    assert re.search("[\u2400-\u241f]", shown[-1])
    for text in shown:
        assert not re.search(r"[\x00-\x07\x0b-\x0c\x0e-\x1f\x7f-\x9f]", text), text
    assert "said \u241b]0;owned" in shown[2] and "system \u241b]0;owned" in shown[5]


def test_a_full_context_is_told_and_a_message_that_is_too_long_refused(here: Path, forks: Forks) -> None:
    with chatting(here, forks, "short", "--max-new-tokens", "8") as screen:
        shown = "".join(say(screen, b"hello\r") for _ in range(6))
        assert "the model's context is full: it does not see the oldest 1 turns" in shown
        assert "context of 64" in say(screen, b"x" * 200 + b"\r")
        assert say(screen, b"/undo\r") == "[taken back: hello]"
        screen.type(b"\x04")
        assert screen.finish()[0] == 0


def test_from_a_pipe_each_line_is_answered_and_only_answers_are_on_standard_output(here: Path, forks: Forks) -> None:
    typed = "hello\n\n/set max_new_tokens=6\n世界\r\n//quit\n/save piped.json\n/quit\nnever\n"
    done = forks("generate", "model", "--chat", "--greedy", "--max-new-tokens", "3", cwd=here, stdin=typed)
    assert done.code == 0, done.err
    chat = json.loads((here / "piped.json").read_text())["messages"]
    assert [message["content"] for message in chat[::2]] == ["hello", "世界", "/quit"]
    # Random models cut characters, which is seen, and no part of the chat.
    answers = [line.rstrip("\ufffd") for line in done.out.split("\n")]
    assert "\n".join(answers) == "".join(message["content"] + "\n" for message in chat[1::2])
    assert "\x1b" not in done.err and READY not in done.out
    assert "max_new_tokens=6" in done.err


@pytest.mark.parametrize(
    ("arguments", "typed", "code", "said"),
    [
        (["model", "--chat", "--json"], "", 2, "--json"),
        (["model", "--chat", "--prompt", "x"], "", 2, "--prompt"),
        (["model", "--chat", "-n", "2"], "", 2, "-n"),
        (["model", "--system", "x"], "", 2, "--chat"),
        (["model", "--chat", "--system", "x"], "hello\n", 2, "only user and assistant"),
        (["base", "--chat", "--system", "x"], "hello\n", 2, "no chat template"),
        (["broken", "--chat"], "hello\n", 4, "division by zero"),
        (["model", "--chat"], "/nonsense\n", 2, "/nonsense"),
        (["model", "--chat"], "/load missing.json\nhello\n", 3, "missing.json"),
        (["model", "--chat"], "/set top_p=2\nhello\n", 2, "top_p"),
        (["short", "--chat"], "x" * 100_000 + "\n", 2, "context of 64"),
    ],
)
def test_in_a_script_what_is_wrong_ends_the_command(
    here: Path, forks: Forks, arguments: list[str], typed: str, code: int, said: str
) -> None:
    if arguments[0] == "broken" and not (here / "broken").exists():
        save_model(here / "broken")
        (here / "broken" / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    done = forks("generate", *arguments, cwd=here, stdin=typed)
    assert done.code == code, done.err
    assert said in done.err and done.out == "" and "Traceback" not in done.err
