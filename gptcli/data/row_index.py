"""The rows of `data.packing: isolated` and `none` as an index on disk: which pieces of which documents are in each row.

It lies in the folder of the prepared data, under a key of all that decides it, and is committed by one rename, so that
a second run makes nothing. 12 bytes a row and 12 a piece, memory-mapped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.packing import DROPPED, TRUNCATED, WITHOUT_LABEL, Overlong, Packing, stored, windows
from gptcli.data.tokenizer import load_fast
from gptcli.data.verify import Expected, check
from gptcli.data.writer import HEADER_BYTES, NpyWriter, npy_header
from gptcli.errors import DataError
from gptcli.files import committed_folder, fingerprint, locked, read_json, remove_uncommitted, write_json
from gptcli.reporting import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptcli.data.shards import Shards

VERSION = 1
MANIFEST = "index.json"
_DTYPES: dict[str, np.dtype[Any]] = {
    "pieces": np.dtype(np.int32),
    "begins": np.dtype(np.int64),
    "lengths": np.dtype(np.int32),
    "tokens": np.dtype(np.int32),
    "labels": np.dtype(np.int32),
}
SHOWN_TOKENS = 16


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source: row r has the pieces `offsets[r]` to `offsets[r + 1]`.

    Attributes:
        offsets: int64 [rows + 1].
        begins: int64 [pieces], the first token of each in the source's stream.
        lengths: int32 [pieces], tokens of each: one more than its inputs.
        tokens: int32 [rows], inputs of each row.
        labels: int32 [rows], those that count.
        total_tokens: of all rows.
        total_labels: of all rows.
    """

    offsets: NDArray[np.int64]
    begins: NDArray[np.int64]
    lengths: NDArray[np.int32]
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    total_tokens: int
    total_labels: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RowIndex:
    """The rows of all sources.

    Attributes:
        packing: how they were made.
        sources: each one's rows.
        left_out: documents and pieces that are in no row, or not whole, by reason.
    """

    packing: Packing
    sources: tuple[SourceRows, ...]
    left_out: dict[str, int]

    @property
    def rows(self) -> list[int]:
        """How many rows each source has."""
        return [len(source) for source in self.sources]

    @property
    def tokens(self) -> int:
        """Inputs of all rows."""
        return sum(source.total_tokens for source in self.sources)

    @property
    def labels(self) -> int:
        """Labels of all rows that count."""
        return sum(source.total_labels for source in self.sources)

    def longest(self) -> int:
        """Inputs of the longest row."""
        return max((int(source.tokens.max()) for source in self.sources if len(source)), default=0)


def row_index(
    shards: Shards, packing: Packing, tokenizer: Path, on_wait: Callable[[], None], on_broken: Callable[[str], None]
) -> tuple[RowIndex, bool]:
    """(the index of the rows of training shards, whether it was there): opened and checked, else made now.

    `tokenizer` shows a document that is too long; `on_broken` hears of an index that is damaged and made again.

    Raises:
        DataError: a document is too long and that is an error, or nothing is left to learn.
    """
    supervised = shards.has_supervision and not packing.every_label
    key = [VERSION, packing.sequence_length, packing.packing, packing.overlong, supervised, shards.fingerprint]
    folder = shards.folder.parent / f"rows-{fingerprint(key)}"
    if folder.is_dir():
        try:
            return _opened(folder, packing, verify=None), True
        except DataError as error:
            on_broken(f"{error.where}: {error.what}; the rows are packed again")
    with locked(f"{folder.parent.name}-{folder.name}", on_wait):
        try:
            return _opened(folder, packing, verify=None), True  # another process may have made it meanwhile
        except DataError:
            remove_uncommitted(folder)
        with committed_folder(folder) as work:
            _write(shards, packing, tokenizer, work)
        return _opened(folder, packing, verify=False), False


def check_held_out(shards: Shards, packing: Packing, tokenizer: Path) -> None:
    """Raise `DataError` where validation data has a document too long for `data.overlong`, or nothing to score."""
    labels = 0
    for number, stream in enumerate(shards.streams):
        try:
            for window in windows(stream, shards.document_offsets(number), replace(packing, packing="none")):
                labels += int(window.labels.sum(dtype=np.int64))
        except Overlong as error:
            raise _overlong(shards, number, error, packing, tokenizer) from None
    if not labels:
        raise DataError(
            f"nothing in the {shards.documents:,} documents of the validation data is to be learnt, so none is scored",
            where=shards.streams[0].name,
            remedy="Give other data.validation, or none: data.validation: 0.",
        )


def _write(shards: Shards, packing: Packing, tokenizer: Path, work: Path) -> None:
    sources = []
    left_out: dict[str, int] = {}
    for number, stream in enumerate(shards.streams):
        writers = {name: NpyWriter(work / f"source-{number:03}.{name}.npy", dtype) for name, dtype in _DTYPES.items()}
        tokens = labels = 0
        try:
            for window in windows(stream, shards.document_offsets(number), packing):
                for name, values in stored(window).items():
                    writers[name].write(values)
                tokens += int(window.tokens.sum(dtype=np.int64))
                labels += int(window.labels.sum(dtype=np.int64))
                for reason, count in window.left_out.items():
                    left_out[reason] = left_out.get(reason, 0) + count
        except Overlong as error:
            raise _overlong(shards, number, error, packing, tokenizer) from None
        finally:
            entries = {name: {"count": writer.count, **writer.close()} for name, writer in writers.items()}
        sources.append({"name": stream.name, "tokens": tokens, "labels": labels, "files": entries})
    if not any(source["tokens"] for source in sources):
        raise _nothing(shards, left_out, packing)
    write_json(work / MANIFEST, {"version": VERSION, **vars(packing), "left_out": left_out, "sources": sources})


def _opened(folder: Path, packing: Packing, *, verify: bool | None) -> RowIndex:
    """The index of a folder. Raises `DataError` where it is not what was written."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = [
            Expected(folder / entry["name"], name, npy_header(dtype, entry["count"]), entry["size"], entry["blocks"])
            for source in manifest["sources"]
            for name, dtype in _DTYPES.items()
            for entry in (source["files"][name],)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(folder / MANIFEST)) from None
    check(files, verify)
    sources = []
    for source in manifest["sources"]:
        arrays = {name: _map(folder / source["files"][name]["name"]) for name in _DTYPES}
        counts = arrays.pop("pieces")
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        sources.append(SourceRows(offsets, **arrays, total_tokens=source["tokens"], total_labels=source["labels"]))
    return RowIndex(packing, tuple(sources), manifest["left_out"])


def _map(path: Path) -> NDArray[Any]:
    if path.stat().st_size == HEADER_BYTES:
        return np.load(path)  # type: ignore[no-any-return]  # an empty file cannot be mapped
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _overlong(shards: Shards, source: int, error: Overlong, packing: Packing, tokenizer: Path) -> DataError:
    begin = int(shards.document_offsets(source)[error.document])
    ids = shards.streams[source].read(begin, begin + SHOWN_TOKENS).tolist()
    text = load_fast(tokenizer).decode(ids, skip_special_tokens=True)
    why, others = (
        ("one with media is never cut", "") if shards.has_media else ("data.overlong: error", "split, truncate or ")
    )
    return DataError(
        f"document {error.document + 1:,} has {error.tokens:,} tokens, and a row takes "
        f"{packing.sequence_length:,} + 1 ({why}); it begins with {visible(text)!r}",
        where=shards.streams[source].name,
        remedy=f"Set data.overlong to {others}drop, or a larger data.sequence_length.",
    )


def _nothing(shards: Shards, left_out: dict[str, int], packing: Packing) -> DataError:
    told = left_out_text(left_out)
    remedy = "Give text with something to learn in data.train."
    if left_out.get(DROPPED):
        remedy = "Set data.overlong: split, or a larger data.sequence_length."
    elif shards.has_supervision and not packing.every_label:
        remedy = (
            "A completion is all that is learnt: is there one, and is it in the part that data.overlong leaves?\n"
            "finetune.train_on: all learns prompts too."
        )
    return DataError(
        f"nothing is left to learn of {shards.documents:,} documents{f' ({told})' if told else ''}",
        where=str(shards.streams[0].name),
        remedy=remedy,
    )


def left_out_text(left_out: dict[str, int]) -> str:
    """What is in no row, or not whole, for people; empty when that is nothing."""
    words = {
        TRUNCATED: "documents cut at the length of a row",
        DROPPED: "documents longer than a row dropped",
        WITHOUT_LABEL: "pieces without anything to learn left out",
    }
    return ", ".join(f"{left_out[reason]:,} {text}" for reason, text in words.items() if left_out.get(reason))
