"""The rows of a task: what the model is asked, and what is right, from the columns of files.

Rows are those of files with columns, or of plain text files that go line by line together. What is wrong
with a row ends the reading, or with `data.on_bad_row: skip` is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from gptcli.data.columns import Maps, filled, mapped, missing_text, text_of, what_of
from gptcli.data.named_rows import named_rows
from gptcli.data.readers import BadRow
from gptcli.data.reading.row import listed
from gptcli.errors import DataError, UsageError
from gptcli.recipe.template import Template

if TYPE_CHECKING:
    from gptcli.evaluation.corpus import Corpus
    from gptcli.reporting import Reporter

_NAME_IT = "Name the columns there are in eval.prompt, for example eval.prompt: '{{hint}}'"
_MEND = "Mend it, or leave such rows out: data.on_bad_row: skip (they are counted)."


@dataclass(frozen=True)
class Asked:
    """Which columns are read, and what they must hold.

    Attributes:
        prompt: the template of what the model is asked.
        references: the column of what is right; None: nothing is compared.
        check: what is wrong with the references of a row, if anything is.
    """

    prompt: Template
    references: str | None
    check: Callable[[tuple[str, ...]], str | None] = lambda references: None


@dataclass(frozen=True)
class Example:
    """A row: `where` is its file and line, `references` what is right, at least one where any is asked for."""

    where: str
    prompt: str
    references: tuple[str, ...]


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
        for at, row in islice(named_rows(source, asked.prompt.columns[0], _NAME_IT, where), source.limit):
            made = row.reason if isinstance(row, BadRow) else _example(at, row.values or {}, source.map or {}, asked)
            if isinstance(made, Example):
                yield made
            elif corpus.on_bad_row == "skip":
                skipped.append(f"{at} {made}")
            else:
                raise DataError(made, where=at, remedy=_MEND)


def _example(place: str, row: dict[str, Any], maps: Maps, asked: Asked) -> Example | str:
    """The example of a row, or the sentence that says what is wrong with it."""
    values = mapped(row, maps)
    if isinstance(values, str):
        return values
    if (wrong := missing_text(values, asked.prompt.columns)) is not None:
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
    return Example(place, filled(asked.prompt, values), references)
