"""A chat as data: its turns, its commands, its settings, and the file that it is saved in.

A turn is a message with its answer, so a chat has no other order than that. Nothing here reads keys, prints, or needs
a model; what a model sees of a chat is `gptcli.generation.window`'s.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.media.item import PLACE, Medium, check_places
from gptcli.data.media.parts import extracted
from gptcli.data.media.reference import Media, Reach, Url
from gptcli.errors import DataError, UsageError, first_line
from gptcli.generation.media_prompt import media_errors
from gptcli.generation.settings import Settings

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_FILE_BYTES = 64 << 20
BY = "the chat is begun with --allow-urls"

# Each command with its argument and what it does, in the order of /help.
COMMANDS = {
    "help": ("", "show this"),
    "system": ("[TEXT]", 'set the system prompt ("": none); without TEXT: show it'),
    "set": ("[KEY=VALUE]", "set how answers are generated, as temperature=0.5; without: show the settings"),
    "image": ("FILE", "show the model a picture, with the next message"),
    "audio": ("FILE", "let it hear a sound"),
    "video": ("FILE", "show it a video"),
    "undo": ("", "take the last message and its answer back"),
    "retry": ("", "answer the last message anew"),
    "reset": ("", "forget all messages; the system prompt and the settings stay"),
    "save": ("FILE", "write the chat to a JSON file"),
    "load": ("FILE", "go on with the chat of such a file"),
    "quit": ("", "end (Ctrl+D too)"),
}
ALONE = ("help", "undo", "retry", "reset", "quit")


@dataclass(frozen=True)
class Turn:
    """What was said to the model, and its answer; in what was said there is a place for each of the media."""

    said: str
    answer: str
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class Chat:
    """A chat so far; `answers` counts all that were drawn, so that each draws other random numbers."""

    settings: Settings
    system: str = ""
    turns: tuple[Turn, ...] = ()
    answers: int = 0

    def answered(self, said: str, answer: str, media: tuple[Medium, ...] = ()) -> Chat:
        """The chat with one more turn."""
        return replace(self, turns=(*self.turns, Turn(said, answer, media)))

    def undone(self) -> Chat:
        """The chat without its last turn. Raises `UsageError` when there is none."""
        if not self.turns:
            raise UsageError("there is no message to take back")
        return replace(self, turns=self.turns[:-1])

    def drawn(self) -> tuple[Chat, Settings]:
        """The chat that has drawn one more answer, and the settings of that one: with a seed of its own."""
        settings = replace(self.settings, seed=(self.settings.seed + self.answers) % 2**63)
        return replace(self, answers=self.answers + 1), settings


def messages(system: str, turns: Sequence[Turn], said: str | None = None) -> list[dict[str, str]]:
    """A chat as templates and files have it; `said` is a message without an answer yet."""
    found = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        found += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
    return found if said is None else [*found, {"role": "user", "content": said}]


def command_of(text: str) -> tuple[str, str] | None:
    """The name and the argument of a command; None: a message for the model.

    Several lines are a command only when they begin with one that exists: pasted code may begin with a slash.

    Raises:
        UsageError: one line that begins with a slash, and no command is called so.
    """
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, *rest = text[1:].split(maxsplit=1)[:2] or [""]
    name, argument = {"exit": "quit", "regenerate": "retry"}.get(name, name), rest[0].strip() if rest else ""
    if name in COMMANDS:
        if argument and name in ALONE:
            raise UsageError(f"/{name} takes nothing behind it")
        return name, argument
    if "\n" in text:
        return None
    import difflib

    near = difflib.get_close_matches(name.lower(), list(COMMANDS), n=1)
    known = f"did you mean /{near[0]}?" if near else "/help shows the commands."
    raise UsageError(f"there is no command /{name[:60]}", remedy=f"{known} A message may begin with // for a slash.")


def message_of(text: str) -> str:
    """What a line says to the model: one slash for two at its beginning, and no half characters."""
    text = text[1:] if text.startswith("//") else text
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# Settings


@functools.cache
def _schema() -> type[BaseModel]:
    """The recipe's generation settings that a chat can change, with its types and bounds, and those beside them."""
    from pydantic import create_model

    from gptcli.recipe.fields import CountOrZero, Section
    from gptcli.recipe.schema import Generate

    ours = {field.name for field in fields(Settings)} - {"num_return_sequences"}
    given: dict[str, Any] = {
        name: (field.annotation, field) for name, field in Generate.model_fields.items() if name in ours
    }
    return create_model("ChatSettings", __base__=Section, **given, seed=(CountOrZero, 0), greedy=(bool, False))


def with_setting(settings: Settings, assignment: str) -> Settings:
    """The settings with one changed by `KEY=VALUE`, the value as an override of a recipe gives it.

    Raises:
        RecipeError: an unknown key (the nearest is named), or a value of the wrong type.
        UsageError: not KEY=VALUE, or a value that makes no sense beside the others.
    """
    from gptcli.recipe.tree import parse_inline

    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not equals or not key:
        raise UsageError(f"{assignment[:60]!r} is not KEY=VALUE", remedy="for example /set temperature=0.5")
    if key == "num_return_sequences":
        raise UsageError("a chat has one answer at a time: num_return_sequences stays 1")
    changed = _with_value(settings, key, parse_inline(text, "/set", Path()), "/set")
    changed.check()
    return changed


def _with_value(settings: Settings, key: str, value: Any, where: str) -> Settings:
    """The settings with `key` set to what a node of a recipe's tree holds."""
    from pydantic import ValidationError

    from gptcli.recipe import problems
    from gptcli.recipe.layers import nested
    from gptcli.recipe.tree import plain

    schema = _schema()
    root = nested((key,), value)
    problems.raise_problems(problems.unknown_keys(root, [schema], schema))
    try:
        checked = getattr(schema.model_validate(plain(root)), key)
    except ValidationError as error:
        problems.raise_problems(problems.from_validation(error, root, where, schema))
        raise
    change: dict[str, Any] = {key: tuple(checked) if isinstance(checked, list) else checked}
    return replace(settings, **change)


def shown_settings(settings: Settings) -> dict[str, Any]:
    """The settings that `with_setting` takes, by name."""
    known = _schema().model_fields
    values = {field.name: getattr(settings, field.name) for field in fields(Settings) if field.name in known}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


# The file


def saved(chat: Chat, model: str) -> dict[str, Any]:
    """A chat as /save writes it; an image or a sound by where it lies."""
    written: list[dict[str, Any]] = [*messages(chat.system, [])]
    for turn in chat.turns:
        written += [{"role": "user", "content": _written(turn)}, {"role": "assistant", "content": turn.answer}]
    return {"model": model, "messages": written, "settings": shown_settings(chat.settings)}


def _written(turn: Turn) -> Any:
    """What was said as parts, where there are media in it, else as text."""
    if not turn.media:
        return turn.said
    waiting = iter(turn.media)
    texts = PLACE.split(turn.said)
    parts = [{"type": text, **_where(next(waiting))} if at % 2 else _text_part(text) for at, text in enumerate(texts)]
    return [part for part in parts if part.get("text") != ""]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _where(medium: Medium) -> dict[str, str]:
    source = medium.value.source if isinstance(medium.value, Media) else None
    if isinstance(source, Path):
        return {"path": str(source)}
    if isinstance(source, Url):
        return {"url": source.address}
    assert isinstance(source, bytes)  # of a data URL: nothing else can be written in a chat
    return {"url": f"data:;base64,{base64.b64encode(source).decode()}"}


def read_saved(path: Path, settings: Settings, *, allow_urls: bool = False) -> Chat:
    """The chat of a file; settings that it does not name stay as given. A path of a medium is relative to the file.

    Raises:
        DataError: there is no such file, or it is no saved chat.
        RecipeError, UsageError: its settings are wrong.
    """
    where = str(path)
    try:
        if not path.is_file():
            raise DataError("there is no such file", where=where)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"has more than {MAX_FILE_BYTES >> 20} MiB, which no saved chat has", where=where)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=where) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {first_line(error)}", where=where) from None
    reach = Reach.of(path, allow_outside=True, allow_urls=allow_urls, urls_by=BY)
    return _checked(value, settings, where, reach)


def _checked(value: Any, settings: Settings, where: str, reach: Reach) -> Chat:
    from gptcli.recipe.tree import parse_inline

    found = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(
            "is no saved chat", where=where, remedy='It has to be {"messages": [{"role": ..., "content": ...}, ...]}.'
        )
    found, media = _without_parts(found, reach, where)
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"message {number} has no role and content that are texts", where=where)
        if message["content"] != message_of(f" {message['content']}")[1:]:
            raise DataError(f"message {number} is not valid Unicode", where=where)
    system = found[0]["content"] if found and found[0]["role"] == "system" else ""
    rest = found[1:] if found and found[0]["role"] == "system" else found
    for number, message in enumerate(rest, 1 + len(found) - len(rest)):
        wanted = "user" if (number - len(found) + len(rest)) % 2 else "assistant"
        if message["role"] != wanted:
            raise DataError(
                f"message {number} is of {message['role'][:60]!r} where {wanted!r} has to follow", where=where
            )
    if len(rest) % 2:
        raise DataError("the last message has no answer", where=where)
    given = value.get("settings", {})
    if not isinstance(given, dict):
        raise DataError("its settings are no keys and values", where=where)
    for key, item in given.items():
        if key == "seed" and item is None:
            continue
        settings = _with_value(settings, key, parse_inline(json.dumps(item), where, Path()), where)
    settings.check()
    waiting = iter(media)
    turns = []
    for said, answer in zip(rest[::2], rest[1::2], strict=True):
        places = PLACE.findall(said["content"])
        turns.append(Turn(said["content"], answer["content"], tuple(islice(waiting, len(places)))))
        if check_places(said["content"], turns[-1].media) or check_places(answer["content"] + system, []):
            raise DataError("its media are not those of what the user said", where=where)
    return Chat(settings, system, tuple(turns), len(turns))


def _without_parts(found: list[Any], reach: Reach, where: str) -> tuple[list[Any], list[Medium]]:
    """Messages whose contents are texts, with a place for each of their media, and these."""
    if not any(isinstance(message, dict) and isinstance(message.get("content"), list) for message in found):
        return found, []
    with media_errors(where):
        row, media = extracted({"messages": found}, "messages", {}, reach)
    return [_joined(message) for message in row["messages"]], media


def _joined(message: Any) -> Any:
    parts = message.get("content") if isinstance(message, dict) else None
    texts = isinstance(parts, list) and all(isinstance(each, dict) and {*each} == {"type", "text"} for each in parts)
    if not isinstance(parts, list) or not texts:
        return message
    return {**message, "content": "".join(str(each["text"]) for each in parts)}
