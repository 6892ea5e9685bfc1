"""The rows of a task: what the model is asked, and what is right, from the columns of files.

Rows are those of files with columns, or of plain text files that go line by line together. What is wrong
with a row ends the reading, or with `data.on_bad_row: skip` is counted; images and sounds are decoded to know that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from gptcli.data.columns import Maps, mapped, missing_text, text_of, what_of
from gptcli.data.formats import RowFormat, filled_prompt, media_columns
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium
from gptcli.data.named_rows import named_rows
from gptcli.data.readers import BadRow
from gptcli.data.reading.row import listed
from gptcli.errors import DataError, UsageError
from gptcli.generation.media_prompt import shown_prompt

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.data.media.reader import MediaReader
    from gptcli.evaluation.corpus import Corpus
    from gptcli.reporting import Reporter

_NAME_IT = "Name the columns there are in eval.prompt, for example eval.prompt: '{{hint}}'"
_MEND = "Mend it, or leave such rows out: data.on_bad_row: skip (they are counted)."


@dataclass(frozen=True)
class Asked:
    """Which columns are read, and what they must hold.

    Attributes:
        row: its `prompt` is what the model is asked; which columns hold media, and what these may name.
        references: the column of what is right; None: nothing is compared.
        check: what is wrong with the references of a row, if anything is.
        reader: of media; without one a row has none.
    """

    row: RowFormat
    references: str | None
    check: Callable[[tuple[str, ...]], str | None] = lambda references: None
    reader: MediaReader | None = None

    @property
    def column(self) -> str:
        """One that every file has to have."""
        texts = self.row.columns or (() if self.references is None else (self.references,))
        return (*texts, *self.row.media_columns)[0]


@dataclass(frozen=True)
class Example:
    """A row.

    Attributes:
        where: its file and line.
        prompt: what is asked, for people; `[image cat.png]` where an image stands.
        references: what is right, at least one where any is asked for.
        text: what is asked, for the tokenizer: with the placeholders of media.
        media: what these stand for, in their order.
    """

    where: str
    prompt: str
    references: tuple[str, ...]
    text: str
    media: tuple[Medium, ...] = ()


def read_examples(corpus: Corpus, asked: Asked, reporter: Reporter) -> list[Example]:
    """The rows of a corpus, at most as many as its limit.

    Raises:
        UsageError: the corpus has no rows: it is what a recipe holds out of its training data.
        DataError: no row at all, or one that does not have what is asked for, by file and line.
    """
    if not corpus.sources:
        raise UsageError(
            "tasks are measured on rows of files, and the recipe names none",
            remedy="Name a file: eval.data: {path: test.jsonl}, or gptcli eval MODEL RECIPE --data FILE",
        )
    skipped: list[str] = []
    found = list(islice(_examples(corpus, asked, skipped), corpus.limit))
    if skipped:
        reporter.warn(f"{len(skipped):,} rows were left out (data.on_bad_row: skip); the first: {skipped[0]}")
    if not found:
        raise DataError(f"no row to score in {corpus.name}", remedy="Give a file with rows.")
    return found


def _examples(corpus: Corpus, asked: Asked, skipped: list[str]) -> Iterator[Example]:
    for source, where in corpus.sources:
        for at, row, file in islice(named_rows(source, asked.column, _NAME_IT, where), source.limit):
            if isinstance(row, BadRow):
                made: Example | str = row.reason
            else:
                made = _example(at, row.values or {}, source.map or {}, asked, file)
            if isinstance(made, Example):
                yield made
            elif corpus.on_bad_row == "skip":
                skipped.append(f"{at} {made}")
            else:
                raise DataError(made, where=at, remedy=_MEND)


def _example(place: str, row: dict[str, Any], maps: Maps, asked: Asked, file: Path) -> Example | str:
    """The example of a row of a file, or the sentence that says what is wrong with it."""
    values = mapped(row, maps)
    if isinstance(values, str):
        return values
    if (wrong := missing_text(values, asked.row.columns)) is not None:
        return wrong
    references: tuple[str, ...] = ()
    if asked.references is not None:
        if asked.references not in values:
            return f"has no column {asked.references!r}, only {listed(row)}"
        given = values[asked.references]
        texts = [text_of(each) for each in (given if isinstance(given, list) else [given])]
        if not texts or None in texts:
            return f"column {asked.references!r} holds {what_of(given)}, no reference"
        references = tuple(text for text in texts if text is not None)
        if (wrong := asked.check(references)) is not None:
            return f"column {asked.references!r}: {wrong}"
    try:
        media = media_columns(values, asked.row, asked.row.reach(file))
        prompt, placed = filled_prompt(asked.row.prompt, values, asked.row.media, media)
        text = prompt
        if asked.reader is not None:
            text = asked.reader.filled(prompt, iter(asked.reader.texts(placed)))
    except MediaFault as fault:
        return str(fault)
    shown = shown_prompt(prompt, placed) if placed else prompt
    return Example(place, shown, references, text, placed)
