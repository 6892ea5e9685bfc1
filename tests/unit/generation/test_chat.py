from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import DataError, GptcliError, RecipeError, UsageError
from gptcli.files import write_json
from gptcli.generation.chat import (
    COMMANDS,
    Chat,
    Turn,
    command_of,
    message_of,
    messages,
    read_saved,
    saved,
    shown_settings,
    with_setting,
)
from gptcli.generation.settings import Settings

CHAT = Chat(Settings(seed=7, stop=("END",)), "be brief", (Turn("hi", "hello"), Turn("世界\n👩‍👩‍👧", "")))


def test_every_command_is_read_and_what_is_none_is_a_message() -> None:
    for name in COMMANDS:
        assert command_of(f"/{name}") == (name, "")
    assert command_of("/set  stop=[a, b] ") == ("set", "stop=[a, b]")
    assert command_of("/system one\ntwo") == ("system", "one\ntwo")
    assert command_of("/exit") == ("quit", "") and command_of("/regenerate") == ("retry", "")
    assert command_of("hello /quit") is None and command_of("") is None
    assert command_of("//quit") is None and message_of("//quit") == "/quit"
    assert command_of("/* a comment */\nint main() {}") is None, "pasted code"


@pytest.mark.parametrize(
    ("text", "near"), [("/qit", "/quit"), ("/Undo", "/undo"), ("/usr/bin/env", "//"), ("/", "/help"), ("/undo 2", "")]
)
def test_a_line_that_begins_like_a_command_and_is_none_is_told(text: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        command_of(text)
    assert near in "\n".join(caught.value.lines())


def test_half_characters_never_reach_the_model() -> None:
    assert message_of("a\udcffb\ud83d") == "a\ufffdb\ufffd"


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("temperature=0.5", "temperature", 0.5),
        (" top_k = 7 ", "top_k", 7),
        ("max_new_tokens=1k", "max_new_tokens", 1000),
        ("stop=a b", "stop", ("a b",)),
        ('stop=["\\n", you]', "stop", ("\n", "you")),
        ("greedy=true", "greedy", True),
        ("seed=0", "seed", 0),
    ],
)
def test_a_setting_is_set_by_its_recipe_name(given: str, key: str, value: Any) -> None:
    changed = with_setting(Settings(seed=1), given)
    assert getattr(changed, key) == value
    assert key in shown_settings(changed)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("temprature=1", "did you mean temperature?"),
        ("top-p=0.5", "did you mean top_p?"),
        ("prompts=x", "valid keys here"),
        ("temperature=warm", "expected a number"),
        ("temperature=-1", "at least 0"),
        ("top_k=1.5", "whole number"),
        ("seed=", "whole number"),
        ("greedy=perhaps", "true or false"),
        ("min_new_tokens=200", "more than max_new_tokens"),
        ("num_return_sequences=2", "one answer at a time"),
        ("stop=['']", "stop text is empty"),
        ("stop={a: [}", "/set"),
        ("stop=\ud800", "/set"),
        ("temperature", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("temperature=" + "9" * 400, "400 digits"),
        ("a.b=1", "unknown key"),
    ],
)
def test_a_bad_setting_is_refused_and_says_what_would_do(given: str, said: str) -> None:
    with pytest.raises((UsageError, RecipeError)) as caught:
        with_setting(Settings(seed=1), given)
    assert said in "\n".join(caught.value.lines())


def test_every_answer_draws_other_numbers_and_the_same_chat_the_same() -> None:
    seeds = []
    chat = CHAT
    for _ in range(3):
        chat, settings = chat.drawn()
        seeds.append(settings.seed)
    assert seeds == [7, 8, 9]
    assert chat.settings == CHAT.settings and chat.turns == CHAT.turns
    assert Chat(Settings(seed=2**63 - 1), answers=1).drawn()[1].seed == 0


def test_undo_takes_back_the_last_message_and_its_answer() -> None:
    assert CHAT.undone().turns == CHAT.turns[:1]
    assert CHAT.answered("x", "y").undone() == CHAT
    with pytest.raises(UsageError):
        Chat(Settings()).undone()


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    write_json(path, saved(CHAT, "model"))
    found = read_saved(path, Settings())
    assert (found.settings, found.system, found.turns) == (CHAT.settings, CHAT.system, CHAT.turns)
    assert json.loads(path.read_text())["messages"] == messages(CHAT.system, CHAT.turns)
    empty = Chat(Settings(seed=1, min_new_tokens=150, max_new_tokens=300))
    write_json(path, saved(empty, "model"))
    assert read_saved(path, Settings()) == empty, "settings that only fit together"


def test_messages_of_other_programs_are_read_and_the_settings_stay(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    write_json(
        path, {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}
    )
    assert read_saved(path, CHAT.settings) == Chat(CHAT.settings, "", (Turn("a", "b"),), 1)


USER = '{"role": "user", "content": "x"}'
ANSWER = '{"role": "assistant", "content": "y"}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\xff",
        '{"messages": 1}',
        '{"messages": [1]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        f'{{"messages": [{USER}]}}',
        f'{{"messages": [{ANSWER}, {USER}]}}',
        f'{{"messages": [{USER}, {USER}]}}',
        f'{{"messages": [{USER}, {ANSWER}, {{"role": "system", "content": "x"}}, {ANSWER}]}}',
        '{"messages": [{"role": "user", "content": "\\ud800"}, ' + ANSWER + "]}",
        '{"messages": [], "settings": []}',
        '{"messages": [], "settings": {"temperature": "hot"}}',
        '{"messages": [], "settings": {"temperature": NaN}}',
        '{"messages": [], "settings": {"temprature": 1}}',
        '{"messages": [], "settings": {"stop": [["x"]]}}',
        '{"messages": [], "settings": {"stop": {"x": 1}}}',
        '{"messages": [], "settings": {"min_new_tokens": 1000}}',
        '{"messages": [], "settings": {"max_new_tokens": ' + "9" * 5000 + "}}",
        '{"messages": ' + "[" * 100_000,
    ],
    ids=range(23),
)
def test_a_file_that_is_no_chat_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(GptcliError) as caught:
        read_saved(path, Settings())
    assert isinstance(caught.value, DataError | UsageError | RecipeError)
    assert caught.value.where in (str(path), None)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(DataError):
            read_saved(path, Settings())
