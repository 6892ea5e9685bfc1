"""What a row is: `data.format: prompt` or `chat`. A row with columns becomes an example, its parts tokenized apart.

Everything about a row that needs no tokenizer is decided here, so that what is wrong with it is told with its file and
line. Held out and deduplicated is by what an example says (`raw`): the same prompt and completion, or the same
messages and tools, whatever other columns a row has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from gptcli.data.columns import filled, mapped, missing_text, text_of
from gptcli.data.conversation import ALPACA, columns_of, messages_of, text_of_messages
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import NOUNS, PLACE, Medium, Modality, check_places, counted, identity, media_in, place_of
from gptcli.data.media.parts import extracted
from gptcli.data.media.reference import NAMELESS, Reach
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
        media: the columns that hold media, by their kind.
        reads: whether the model reads media at all: then messages may hold some, too.
        allow_urls: whether they may be fetched.
        allow_outside: whether they may lie elsewhere than below the data file's folder.
    """

    kind: Literal["prompt", "chat"]
    prompt: Template = _NONE
    completion: Template = _NONE
    column: str = ""
    shape: str = "openai"
    maps: tuple[tuple[str, dict[str, Any]], ...] = ()
    media: tuple[tuple[Modality, tuple[str, ...]], ...] = ()
    reads: bool = False
    allow_urls: bool = False
    allow_outside: bool = False

    @property
    def media_columns(self) -> tuple[str, ...]:
        """The columns that hold media; a row without one has none of its media."""
        return tuple(column for _, columns in self.media for column in columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row has to have, in their order."""
        if self.kind == "prompt":
            named = (*self.prompt.columns, *self.completion.columns)
            return tuple(each for each in dict.fromkeys(named) if each not in self._places)
        return ALPACA[::2] if self.shape == "alpaca" else (self.column,)

    @property
    def placed(self) -> tuple[Modality, ...]:
        """The kinds of media that the prompt has places for."""
        named = self.prompt.columns
        return tuple(kind for kind, columns in self.media if any(each in named for each in (kind, *columns)))

    @property
    def _places(self) -> frozenset[str]:
        """What stands in a prompt for media: their columns, and the names of their kinds."""
        return frozenset((*self.media_columns, *(modality for modality, _ in self.media)))

    def reach(self, data_file: Path) -> Reach:
        """What the values of a file's rows may name."""
        return Reach.of(data_file, allow_outside=self.allow_outside, allow_urls=self.allow_urls)


class Pair(NamedTuple):
    """A prompt and its completion; in the prompt a place for each of the media, in their order."""

    prompt: str
    completion: str
    media: tuple[Medium, ...] = ()

    @property
    def text(self) -> str:
        """What a tokenizer is trained on."""
        return PLACE.sub("", self.prompt) + self.completion

    @property
    def raw(self) -> bytes:
        """What tells equal examples."""
        return f"{self.prompt}\0{self.completion}".encode() + identity(self.media)


class Conversation(NamedTuple):
    """Checked messages, as transformers' templates take them, and the tools that the model may call.

    In their texts there is a place for each of the media, in their order.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    media: tuple[Medium, ...] = ()

    @property
    def text(self) -> str:
        """What a tokenizer is trained on."""
        return PLACE.sub("", text_of_messages(self.messages))

    @property
    def raw(self) -> bytes:
        """What tells equal examples."""
        told = json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True)
        return told.encode() + identity(self.media)


Example: TypeAlias = Pair | Conversation


def format_of(data: Data, source: Source, *, reads: bool = False) -> RowFormat | None:
    """The format of a source's rows; None: they are texts. `reads`: the model reads media."""
    about: dict[str, Any] = {
        "maps": tuple((source.map or {}).items()),
        "media": data.media,
        "reads": reads,
        "allow_urls": data.allow_urls,
        "allow_outside": data.allow_outside,
    }
    if data.format == "prompt":
        assert data.prompt is not None and data.completion is not None  # the schema asks for them
        return RowFormat("prompt", parse_template(data.prompt), parse_template(data.completion), **about)
    if data.format == "chat":
        shape = data.messages.shape if data.messages is not None else "openai"
        column = data.messages.column if data.messages is not None else None
        return RowFormat("chat", column=column or columns_of(shape)[0], shape=shape, **about)
    return None


def row_layout(row_format: RowFormat, columns: tuple[str, ...] | None) -> Layout:
    """How files are read for a format; `columns` are the names for a file without a header."""
    needed = (*row_format.columns, *(column for column, _ in row_format.maps), *row_format.media_columns)
    if row_format.kind == "chat":
        needed = (*needed, *columns_of(row_format.shape), "tools")
        remedy = "Name the column of the messages: data.messages: {hint}"
    else:
        remedy = "Name the columns there are in data.prompt and data.completion, for example '{{hint}}'."
    return Layout("line", row_format.columns[0], columns, remedy, whole=True, needed=tuple(dict.fromkeys(needed)))


def format_row(row: Row, row_format: RowFormat, reach: Reach) -> Row | BadRow:
    """The row with its example, or what is wrong with it; `reach` is what its values may name."""
    values = mapped(row.values or {}, dict(row_format.maps))
    if isinstance(values, str):
        return BadRow(row.number, "wrong columns", values, row.member)
    try:
        media = media_columns(values, row_format, reach)
        if row_format.kind == "prompt":
            found: Example | BadRow = _pair(row.number, values, row_format, media)
        else:
            found = _conversation(row.number, values, row_format, media, reach)
    except MediaFault as fault:
        found = BadRow(row.number, fault.kind, str(fault))
    if isinstance(found, BadRow):
        return replace(found, member=row.member)
    return Row(row.number, found.text, row.identity, row.member, example=found)


Columns: TypeAlias = dict[str, list[Medium]]


def media_columns(values: dict[str, Any], row_format: RowFormat, reach: Reach) -> Columns:
    """The media of each of a row's columns that may hold some. Raises `MediaFault`."""
    found: Columns = {}
    for modality, columns in row_format.media:
        for column in columns:
            value = values.get(column)
            if isinstance(value, str) and not value.strip():  # tables of text have no null
                value = None
            found[column] = media_in(value, modality, reach, f"{NAMELESS} of column {column!r}")
    return found


def _pair(number: int, values: dict[str, Any], row_format: RowFormat, media: Columns) -> Pair | BadRow:
    if (wrong := missing_text(values, row_format.columns)) is not None:
        kind: Any = "wrong columns" if wrong.startswith("has no column") else "not text"
        return BadRow(number, kind, wrong)
    completion = filled(row_format.completion, values)
    columns = row_format.completion.columns
    if not completion.strip() or all(not str(values[column]).strip() for column in columns):
        named = ", ".join(map(repr, columns))
        return BadRow(number, "no completion", f"has an empty completion (column {named}), so nothing can be learnt")
    prompt, placed = filled_prompt(row_format.prompt, values, row_format.media, media)
    return Pair(prompt, completion, placed)


def filled_prompt(
    template: Template,
    values: dict[str, Any],
    kinds: Sequence[tuple[Modality, tuple[str, ...]]],
    media: Columns,
) -> tuple[str, tuple[Medium, ...]]:
    """A prompt filled with a row's texts and the places of its media, and these in their order.

    A column's name stands for one medium of the column; `{image}` and the like for one of the columns of that kind that
    are not named. A row whose columns hold none has nothing there.

    Raises:
        MediaFault: there are more places than media, or fewer.
    """
    used = [column for _, column in template.pieces if column is not None]
    places = dict(media)
    for modality, columns in kinds:
        if modality not in columns and modality in used:
            unnamed = [column for column in columns if column not in used]
            places[modality] = [each for column in unnamed for each in places.pop(column)]
    for column, found in places.items():
        if found and (wanted := used.count(column)) != len(found):
            given = counted(len(found), NOUNS[found[0].modality])
            wrong = f"has {given}, and the prompt has {counted(wanted, 'place')} {{{column}}}"
            raise MediaFault("the row", "not media", wrong)
    waiting = {column: iter(found) for column, found in places.items()}
    placed: list[Medium] = []

    def text(column: str) -> str:
        if column not in waiting:
            return text_of(values[column]) or ""
        medium = next(waiting[column], None)
        if medium is None:
            return ""
        placed.append(medium)
        return place_of(medium.modality)

    prompt = template.fill(text)
    # A text of the row may hold the mark of a place itself.
    if kinds and (mismatch := check_places(prompt, placed)) is not None:
        raise MediaFault("the row", "not media", mismatch)
    return prompt, tuple(placed)


def _conversation(
    number: int, values: dict[str, Any], row_format: RowFormat, media: Columns, reach: Reach
) -> Conversation | BadRow:
    found: list[Medium] = []
    if row_format.reads:
        by_kind = {kind: [each for column in columns for each in media[column]] for kind, columns in row_format.media}
        column = None if row_format.shape == "alpaca" else row_format.column
        values, found = extracted(values, column, by_kind, reach)
    made = messages_of(values, row_format.column, row_format.shape)
    if isinstance(made, tuple):
        return BadRow(number, made[0], made[1])
    if row_format.reads:
        for at, message in enumerate(made["messages"], start=1):
            if message["role"] == "assistant" and check_places(message["content"], []) is not None:
                return BadRow(number, "not text", f"message {at} is the assistant's and holds media; models say text")
        if (wrong := check_places(text_of_messages(made["messages"]), found)) is not None:
            return BadRow(number, "not media", wrong)
    return Conversation(**made, media=tuple(found))
