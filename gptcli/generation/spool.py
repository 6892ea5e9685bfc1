"""The prompts of a file job on disk: rows as lines of JSON, and their tokens, found by number.

Read and encoded once, before any model is loaded, so that what is wrong with a file is said first and a file of any
format, compressed or not, is as good as another. In memory: where each prompt ends among the tokens, and while it is
read the line on which it begins: 16 bytes a prompt. On disk: the rows once more, and four bytes a token.
"""

from __future__ import annotations

import array
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gptcli.data.readers import BadRow, Layout, read_records, shown, split_suffix
from gptcli.errors import CheckpointError, DataError, UsageError
from gptcli.files import fsync_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETIONS = "completions"
ROWS, TOKENS, LINES, TOKEN_ENDS = "rows.jsonl", "tokens.bin", "lines.npy", "tokens.npy"
SPOOL = (ROWS, LINES, TOKENS, TOKEN_ENDS)
ENCODED_AT_ONCE = 256
_MEND = "Mend the row, or leave it out, and run the same command again."
_NAME_IT = "Name the column that holds the prompts: --prompt-column {hint}"


@dataclass(frozen=True)
class Spool:
    """The prompts of a file by their number, from 0."""

    folder: Path
    token_ends: NDArray[np.int64]

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
        return ids

    def rows(self) -> Iterator[str]:
        """The rows in the order of the file."""
        with (self.folder / ROWS).open("rb") as file:
            for line in file:
                yield line[:-1].decode()


def write_rows(source: Path, column: str, folder: Path, on_bytes: Callable[[int], None]) -> tuple[int, int]:
    """Write `ROWS` and `LINES` of a file; return (rows, blank lines of a plain text, which are left out).

    Raises:
        DataError: a row that is no prompt, by file and line; no row at all; a column named `completions`.
    """
    lines = array.array("q")
    blank = 0
    plain = split_suffix(source.name)[0] == ".txt"
    with (folder / ROWS).open("wb") as file:
        for record in read_records(source, Layout("line", column, remedy=_NAME_IT), on_position=on_bytes):
            where = f"{shown(source)}:{record.number}"
            if isinstance(record, BadRow):
                remedy = _NAME_IT.replace("{hint}", "NAME") if record.kind == "wrong columns" else _MEND
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
    column: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    on_rows: Callable[[int], None],
) -> None:
    """Write `TOKENS` and `TOKEN_ENDS` of the rows; make all files of the spool durable.

    Raises:
        DataError: prompts that leave no room for a new token in the context, the first of them by file and line.
    """
    from gptcli.generation.text import check_characters, encode_prompts

    lines = np.load(folder / LINES)
    ends = array.array("q")
    position = 0
    overlong: list[tuple[int, int]] = []  # of the first ones: line, tokens
    count = 0
    with (folder / ROWS).open("rb") as rows, (folder / TOKENS).open("wb") as file:
        while chunk := list(islice(rows, ENCODED_AT_ONCE)):
            texts = [json.loads(row)[column] for row in chunk]
            try:
                for text in texts:
                    check_characters(text, context)
                encoded = encode_prompts(tokenizer, texts)
            except UsageError:
                _refuse_first(source, texts, lines[len(ends) :].tolist(), tokenizer, context)
                raise
            for ids in encoded:
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
    for name in SPOOL:
        fsync_file(folder / name)


def _refuse_first(
    source: Path, texts: list[str], lines: list[int], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> None:
    from gptcli.generation.text import check_characters, encode_prompts

    for text, line in zip(texts, lines, strict=False):
        try:
            check_characters(text, context)
            encode_prompts(tokenizer, [text])
        except UsageError as error:
            raise DataError(error.what, where=f"{shown(source)}:{line}", remedy=_MEND) from None


def sizes(folder: Path) -> list[int]:
    """The bytes of the files of a spool, by which `open_spool` knows that they are whole."""
    return [(folder / name).stat().st_size for name in SPOOL]


def open_spool(folder: Path, expected: list[int]) -> Spool:
    """The spool that was written to a folder; raises `CheckpointError` where it is not that."""
    try:
        if sizes(folder) == expected:
            return Spool(folder, np.load(folder / TOKEN_ENDS))
    except (OSError, ValueError, EOFError):
        pass
    raise CheckpointError(
        "the prompts that were kept of this job are damaged", where=str(folder), remedy="Start anew with --overwrite."
    )
