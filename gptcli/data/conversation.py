"""Conversations as rows hold them, in three shapes, checked and made into the messages that chat templates take.

Shapes: openai: a column of role/content messages; sharegpt: from/value (github.com/hiyouga/LLaMA-Factory, data/README);
alpaca: instruction, input and output as columns (github.com/tatsu-lab/stanford_alpaca). Content that is a list of texts
becomes one text. A message's own `train: false` stays in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gptcli.data.columns import text_of, what_of
from gptcli.data.reading.row import Kind, kind_of, listed

ROLES = ("system", "developer", "user", "assistant", "tool")
ALPACA = ("instruction", "input", "output")
# sharegpt's names; a call of a function is a turn of the assistant.
_FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
Fault = tuple[Kind, str]


class _Bad(Exception):
    def __init__(self, reason: str, kind: Kind = "no conversation") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def columns_of(shape: str) -> tuple[str, ...]:
    """The columns that a shape has unless a recipe names another: the first is that of the messages."""
    return {
        "openai": ("messages",),
        "sharegpt": ("conversations", "system"),
        "alpaca": (*ALPACA, "system", "history"),
    }[shape]


def messages_of(row: dict[str, Any], column: str, shape: str) -> dict[str, Any] | Fault:
    """The `messages` and `tools` of a row, or what is wrong with it."""
    try:
        messages = _alpaca(row) if shape == "alpaca" else _listed(row, column, shape)
        _check(messages)
        return {"messages": messages, "tools": _tools(row.get("tools"))}
    except _Bad as error:
        return error.kind, str(error)


def text_of_messages(messages: Sequence[dict[str, Any]]) -> str:
    """The texts of a conversation, a line each."""
    texts = (message.get("content") or message.get("reasoning_content") or "" for message in messages)
    return "\n".join(text for text in texts if text) or "..."


def _listed(row: dict[str, Any], column: str, shape: str) -> list[dict[str, Any]]:
    if column not in row:
        raise _Bad(f"has no column {column!r}, only {listed(row)}", "wrong columns")
    found = row[column]
    if not isinstance(found, list):
        raise _Bad(f"column {column!r} holds {kind_of(found)}, no list of messages")
    if not found:
        raise _Bad(f"column {column!r} holds no messages")
    make = _openai if shape == "openai" else _sharegpt
    messages = [make(number, message) for number, message in enumerate(found, start=1)]
    if shape == "sharegpt":
        messages = [*_system(row), *messages]
    return messages


def _openai(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _Bad(f"message {number} is {kind_of(message)}, no role and content")
    if "role" not in message:
        hint = "; messages of from and value are shape: sharegpt" if "from" in message else ""
        raise _Bad(f"message {number} has no role, only {listed(message)}{hint}")
    role = message["role"]
    if role not in ROLES:
        raise _Bad(f"message {number} has the unknown role {_quoted(role)}; roles are {', '.join(ROLES)}")
    kept = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in kept and not (kept["tool_calls"] and role == "assistant"):
        if kept["tool_calls"]:
            raise _Bad(f"message {number} has tool_calls, which only the assistant's have")
        del kept["tool_calls"]  # an empty list of a table whose other rows have some
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(number, kept["tool_calls"])
        kept["content"] = _content(number, kept.get("content", ""))
    else:
        kept["content"] = _content(number, message.get("content"))
    for key in ("reasoning_content", "reasoning", "thinking"):
        if key in kept and text_of(kept[key]) is None:
            raise _Bad(f"message {number}: {key} holds {what_of(kept[key])}, not text")
    return kept


def _sharegpt(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _Bad(f"message {number} is {kind_of(message)}, no from and value")
    if "from" not in message:
        hint = "; messages of role and content are shape: openai" if "role" in message else ""
        raise _Bad(f"message {number} has no from, only {listed(message)}{hint}")
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _FROM:
        raise _Bad(f"message {number} is from the unknown {_quoted(speaker)}; known are {', '.join(_FROM)}")
    made: dict[str, Any] = {"role": _FROM[speaker], "content": _content(number, message.get("value"))}
    if message.get("train") is not None:
        made["train"] = message["train"]
    if speaker == "function_call" and (calls := _written_calls(made["content"])):
        return {**made, "content": "", "tool_calls": calls}
    return made


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    for name in ("instruction", "output"):
        if name not in row:
            raise _Bad(f"has no column {name!r}, only {listed(row)}", "wrong columns")
    asked, more = _content(0, row["instruction"], "instruction"), row.get("input")
    if more:
        asked = f"{asked}\n{_content(0, more, 'input')}"
    turns: list[dict[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise _Bad("column 'history' holds no list of pairs of texts")
    for said, answered in [*history, (asked, row["output"])]:
        turns.append({"role": "user", "content": _content(0, said, "history")})
        turns.append({"role": "assistant", "content": _content(0, answered, "output")})
    return [*_system(row), *turns]


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    text = row.get("system")
    return [{"role": "system", "content": _content(0, text, "system")}] if text else []


def _check(messages: list[dict[str, Any]]) -> None:
    """The order of roles, and that there is something to learn."""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role in ("system", "developer") and number > 1:
            again = messages[0]["role"] in ("system", "developer")
            raise _Bad(
                f"message {number} is {'a second' if again else 'a'} system turn; there is one at most, the first"
            )
        train = message.get("train")
        if train is not None and not isinstance(train, bool):
            raise _Bad(f"message {number}: train holds {kind_of(train)}, neither true nor false")
        if train and role != "assistant":
            raise _Bad(f"message {number} is of the {role}, and train: true is for the assistant's")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise _Bad(f"message {number} is an empty turn of the assistant")
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    if not turns:
        raise _Bad("has no turn but the system's")
    if turns[0]["role"] != "user":
        raise _Bad(f"begins with a turn of the {turns[0]['role']}; the user's comes first")


def _content(number: int, value: Any, column: str = "") -> str:
    """Content as a text; `column` names it where it is no message's."""
    name = f"column {column!r}" if column else f"message {number}: content"
    if isinstance(value, str):
        if text_of(value) is None:
            raise _Bad(f"{name} holds a lone surrogate, which no UTF-8 text can", "not UTF-8")
        return value
    if not isinstance(value, list) or column:
        raise _Bad(f"{name} holds {kind_of(value)}, not text", "not text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_content(number, part["text"]))
        elif isinstance(kind, str) and kind != "text":
            what = kind.removesuffix("_url").removeprefix("input_")
            raise _Bad(f"message {number} holds a part of type {what!r}, and the model reads text alone", "not text")
        else:
            raise _Bad(f"{name} holds a list with {kind_of(part)}, which is no part of type text", "not text")
    return "".join(texts)


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """Calls of functions with their arguments as an object, as templates want them; OpenAI has them as JSON text."""
    if not isinstance(calls, list):
        raise _Bad(f"message {number}: tool_calls holds {kind_of(calls)}, no list")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Bad(f"message {number} has a call of a function without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise _Bad(f"message {number}: the arguments of {function['name']!r} are no JSON") from None
        made.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
        if "function" not in call:
            for key in ("name", "arguments"):
                made[-1].pop(key, None)
    return made


def _written_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls that a text of JSON is; None: it is something else, which the assistant says as it is."""
    try:
        value = json.loads(text)
        return _calls(0, value if isinstance(value, list) else [value])
    except (ValueError, RecursionError, _Bad):
        return None


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _Bad("column 'tools' holds a text that is no JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _Bad("column 'tools' holds no list of descriptions of functions")
    return value


def _quoted(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)
