"""The prompts of a file job on disk: rows as lines of JSON, and their tokens, found by number.

Read and encoded once, before any model is loaded, so that what is wrong with a file is said first and a file of any
format, compressed or not, is as good as another. In memory: where each prompt ends among the tokens, and while it is
read the line on which it begins: 16 bytes a prompt. On disk: the rows once more, and four bytes a token.
"""

from __future__ import annotations

import array
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, kept, restored
from gptcli.data.media.reference import Reach
from gptcli.data.readers import BadRow, Layout, read_records, shown, split_suffix
from gptcli.errors import CheckpointError, DataError, UsageError
from gptcli.files import fsync_file
from gptcli.generation.file_prompts import PromptForm, prompt_of
from gptcli.generation.media_prompt import MediaPrompt, media_of
from gptcli.generation.text import check_characters, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader

COMPLETIONS = "completions"
ROWS, TOKENS, LINES, TOKEN_ENDS = "rows.jsonl", "tokens.bin", "lines.npy", "tokens.npy"
SPOOL = (ROWS, LINES, TOKENS, TOKEN_ENDS)
MEDIA, MEDIA_ENDS = OF_MEDIA = ("media.bin", "media.npy")  # of prompts that have some
ENCODED_AT_ONCE = 256
_MEND = "Mend the row, or leave it out, and run the same command again."
_NAME_IT = "Name the column that holds the prompts: --prompt-column {hint}"
_NAME_THEM = "Name the columns that there are in --template."


@dataclass(frozen=True)
class Spool:
    """The prompts of a file by their number, from 0."""

    folder: Path
    token_ends: NDArray[np.int64]
    media_ends: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.token_ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each prompt."""
        return np.diff(self.token_ends, prepend=0)

    def tokens(self, file: BinaryIO, number: int) -> list[int]:
        """The ids of a prompt, from the open `TOKENS` file."""
        begin = int(self.token_ends[number - 1]) if number else 0
        file.seek(4 * begin)
        ids: list[int] = np.frombuffer(file.read(4 * (int(self.token_ends[number]) - begin)), np.int32).tolist()
        return ids if self.media_ends is None else MediaPrompt(ids, self._media(number))

    def _media(self, number: int) -> list[Medium]:
        assert self.media_ends is not None
        begin = int(self.media_ends[number - 1]) if number else 0
        with (self.folder / MEDIA).open("rb") as file:
            file.seek(begin)
            return restored(file.read(int(self.media_ends[number]) - begin))

    def rows(self) -> Iterator[str]:
        """The rows in the order of the file."""
        with (self.folder / ROWS).open("rb") as file:
            for line in file:
                yield line[:-1].decode()


def write_rows(source: Path, form: PromptForm, folder: Path, on_bytes: Callable[[int], None]) -> tuple[int, int]:
    """Write `ROWS` and `LINES` of a file; return (rows, blank lines of a plain text, which are left out).

    Raises:
        DataError: a row that is no prompt, by file and line; no row at all; a column named `completions`.
    """
    lines = array.array("q")
    blank = 0
    layout = Layout("line", form.column, remedy=_NAME_IT if form.template is None else _NAME_THEM)
    plain = split_suffix(source.name)[0] == ".txt"
    with (folder / ROWS).open("wb") as file:
        for record in read_records(source, layout, on_position=on_bytes):
            where = f"{shown(source)}:{record.number}"
            if isinstance(record, BadRow):
                remedy = layout.remedy.replace("{hint}", "NAME") if record.kind == "wrong columns" else _MEND
                raise DataError(record.reason, where=where, remedy=remedy)
            if plain and not record.text.strip():
                blank += 1
                continue
            if f'"{COMPLETIONS}"' in record.line and COMPLETIONS in json.loads(record.line):
                raise DataError(
                    f"has a column {COMPLETIONS!r} already, which the output adds",
                    where=where,
                    remedy="Give it another name in the file.",
                )
            file.write(record.line.encode() + b"\n")
            lines.append(record.number)
    if not lines:
        raise DataError("there is no prompt in it", where=shown(source), remedy="Give a file with prompts.")
    np.save(folder / LINES, np.frombuffer(lines, np.int64))
    return len(lines), blank


def write_tokens(
    source: Path,
    form: PromptForm,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    on_rows: Callable[[int], None],
    reader: MediaReader | None = None,
) -> None:
    """Write `TOKENS` and `TOKEN_ENDS` of the rows; make all files of the spool durable.

    With a `reader` rows may have images and sounds, which are read once here; `OF_MEDIA` says where they are.

    Raises:
        DataError: a row that gives no prompt, or prompts that leave no room for a new token in the context, the first
            of them by file and line.
    """
    lines = np.load(folder / LINES)
    ends = array.array("q")
    position = 0
    media_position, media_ends = 0, array.array("q")
    overlong: list[tuple[int, int]] = []  # of the first ones: line, tokens
    count = 0
    with contextlib.ExitStack() as stack:
        rows, file = stack.enter_context((folder / ROWS).open("rb")), stack.enter_context((folder / TOKENS).open("wb"))
        if reader is not None:
            media_file = stack.enter_context((folder / MEDIA).open("wb"))
        while chunk := list(islice(rows, ENCODED_AT_ONCE)):
            values = [json.loads(row) for row in chunk]
            numbers = lines[len(ends) :].tolist()
            if form.is_plain:
                encoded = _encoded(source, [each[form.column] for each in values], numbers, tokenizer, context)
            else:
                encoded = _formed(source, values, numbers, form, reader, tokenizer, context)
            for ids in encoded:
                if reader is not None:
                    media_position += media_file.write(kept(media_of(ids)))
                    media_ends.append(media_position)
                if context is not None and len(ids) + 1 > context:
                    count += 1
                    overlong = overlong or [(int(lines[len(ends)]), len(ids))]
                position += len(ids)
                file.write(np.array(ids, np.int32).tobytes())
                ends.append(position)
            on_rows(len(ends))
    if overlong and context is not None:
        line, length = overlong[0]
        others = f" ({count - 1:,} more are too long)" if count > 1 else ""
        raise DataError(
            f"the prompt has {length:,} tokens, and with one new token that is more than the model's "
            f"context of {context:,}{others}",
            where=f"{shown(source)}:{line}",
            remedy=f"Shorten it to at most {context - 1:,} tokens, leave it out, or use a model with a longer context.",
        )
    np.save(folder / TOKEN_ENDS, np.frombuffer(ends, np.int64))
    if reader is not None:
        np.save(folder / MEDIA_ENDS, np.frombuffer(media_ends, np.int64))
    for name in _of(folder):
        fsync_file(folder / name)


def _formed(
    source: Path,
    values: list[dict[str, Any]],
    lines: list[int],
    form: PromptForm,
    reader: MediaReader | None,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> list[list[int]]:
    reach = Reach.of(source, allow_outside=True, allow_urls=form.allow_urls, urls_by="--allow-urls is given")
    found = []
    for row, line in zip(values, lines, strict=False):
        try:
            found.append(prompt_of(row, form, reach, reader, tokenizer, context))
        except (MediaFault, DataError, UsageError) as error:
            what = str(error) if isinstance(error, MediaFault) else error.what
            raise DataError(what, where=f"{shown(source)}:{line}", remedy=_MEND) from None
    return found


def _encoded(
    source: Path, texts: list[str], lines: list[int], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[list[int]]:
    try:
        for text in texts:
            check_characters(text, context)
        return encode_prompts(tokenizer, texts)
    except UsageError:
        _refuse_first(source, texts, lines, tokenizer, context)
        raise


def _refuse_first(
    source: Path, texts: list[str], lines: list[int], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> None:
    for text, line in zip(texts, lines, strict=False):
        try:
            check_characters(text, context)
            encode_prompts(tokenizer, [text])
        except UsageError as error:
            raise DataError(error.what, where=f"{shown(source)}:{line}", remedy=_MEND) from None


def sizes(folder: Path) -> list[int]:
    """The bytes of the files of a spool, by which `open_spool` knows that they are whole."""
    return [(folder / name).stat().st_size for name in _of(folder)]


def _of(folder: Path) -> tuple[str, ...]:
    return (*SPOOL, *OF_MEDIA) if (folder / MEDIA).exists() else SPOOL


def open_spool(folder: Path, expected: list[int]) -> Spool:
    """The spool that was written to a folder; raises `CheckpointError` where it is not that."""
    try:
        if sizes(folder) == expected:
            media_ends = np.load(folder / MEDIA_ENDS) if (folder / MEDIA).exists() else None
            return Spool(folder, np.load(folder / TOKEN_ENDS), media_ends)
    except (OSError, ValueError, EOFError):
        pass
    raise CheckpointError(
        "the prompts that were kept of this job are damaged", where=str(folder), remedy="Start anew with --overwrite."
    )
