"""What a row is: `data.format: prompt` or `chat`. A row with columns becomes an example, its parts tokenized apart.

Everything about a row that needs no tokenizer is decided here, so that what is wrong with it is told with its file and
line. Held out and deduplicated is by what an example says (`raw`): the same prompt and completion, or the same
messages and tools, whatever other columns a row has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from gptcli.data.columns import filled, mapped, missing_text
from gptcli.data.conversation import ALPACA, columns_of, messages_of, text_of_messages
from gptcli.data.reading.row import BadRow, Layout, Row
from gptcli.recipe.template import Template, parse_template

if TYPE_CHECKING:
    from gptcli.recipe.schema import Data, Source

_NONE = Template(())


@dataclass(frozen=True)
class RowFormat:
    """What makes examples of a source's rows; plain values, so that it can be sent to another process.

    Attributes:
        kind: prompt or chat.
        prompt: the template of the prompt.
        completion: the template of what is to be learnt.
        column: of the messages.
        shape: how they are laid out.
        maps: new values of columns.
    """

    kind: Literal["prompt", "chat"]
    prompt: Template = _NONE
    completion: Template = _NONE
    column: str = ""
    shape: str = "openai"
    maps: tuple[tuple[str, dict[str, Any]], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row has to have, in their order."""
        if self.kind == "prompt":
            return tuple(dict.fromkeys((*self.prompt.columns, *self.completion.columns)))
        return ALPACA[::2] if self.shape == "alpaca" else (self.column,)


class Pair(NamedTuple):
    """A prompt and its completion."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """What a tokenizer is trained on."""
        return self.prompt + self.completion

    @property
    def raw(self) -> bytes:
        """What tells equal examples."""
        return f"{self.prompt}\0{self.completion}".encode()


class Conversation(NamedTuple):
    """Checked messages, as transformers' templates take them, and the tools that the model may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    @property
    def text(self) -> str:
        """What a tokenizer is trained on."""
        return text_of_messages(self.messages)

    @property
    def raw(self) -> bytes:
        """What tells equal examples."""
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True).encode()


Example: TypeAlias = Pair | Conversation


def format_of(data: Data, source: Source) -> RowFormat | None:
    """The format of a source's rows; None: they are texts."""
    maps = tuple((source.map or {}).items())
    if data.format == "prompt":
        assert data.prompt is not None and data.completion is not None  # the schema asks for them
        return RowFormat("prompt", parse_template(data.prompt), parse_template(data.completion), maps=maps)
    if data.format == "chat":
        shape = data.messages.shape if data.messages is not None else "openai"
        column = data.messages.column if data.messages is not None else None
        return RowFormat("chat", column=column or columns_of(shape)[0], shape=shape, maps=maps)
    return None


def row_layout(row_format: RowFormat, columns: tuple[str, ...] | None) -> Layout:
    """How files are read for a format; `columns` are the names for a file without a header."""
    needed = (*row_format.columns, *(column for column, _ in row_format.maps))
    if row_format.kind == "chat":
        needed = (*needed, *columns_of(row_format.shape), "tools")
        remedy = "Name the column of the messages: data.messages: {hint}"
    else:
        remedy = "Name the columns there are in data.prompt and data.completion, for example '{{hint}}'."
    return Layout("line", row_format.columns[0], columns, remedy, whole=True, needed=tuple(dict.fromkeys(needed)))


def format_row(row: Row, row_format: RowFormat) -> Row | BadRow:
    """The row with its example, or what is wrong with it."""
    values = mapped(row.values or {}, dict(row_format.maps))
    if isinstance(values, str):
        return BadRow(row.number, "wrong columns", values, row.member)
    if row_format.kind == "prompt":
        found: Example | BadRow = _pair(row.number, values, row_format)
    else:
        made = messages_of(values, row_format.column, row_format.shape)
        found = BadRow(row.number, made[0], made[1]) if isinstance(made, tuple) else Conversation(**made)
    if isinstance(found, BadRow):
        return replace(found, member=row.member)
    return Row(row.number, found.text, row.identity, row.member, example=found)


def _pair(number: int, values: dict[str, Any], row_format: RowFormat) -> Pair | BadRow:
    if (wrong := missing_text(values, row_format.columns)) is not None:
        kind: Any = "wrong columns" if wrong.startswith("has no column") else "not text"
        return BadRow(number, kind, wrong)
    completion = filled(row_format.completion, values)
    columns = row_format.completion.columns
    if not completion.strip() or all(not str(values[column]).strip() for column in columns):
        named = ", ".join(map(repr, columns))
        return BadRow(number, "no completion", f"has an empty completion (column {named}), so nothing can be learnt")
    return Pair(filled(row_format.prompt, values), completion)
