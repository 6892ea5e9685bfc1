"""The files of tokens: written as a stream, checked before use, readable with numpy alone.

A folder holds manifest.json and, for every source, shards of at most `shard_tokens` tokens. A shard is three .npy:
`tokens`; `offsets` (int64: where the documents that begin in it begin, in tokens from the shard's start); `bytes`
(int64: UTF-8 bytes of each of these documents). A document runs to where the next begins, over the end of its shard if
need be; the stream of a source is its shards one after the other. Memory when writing: what is handed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.encode import Encoded
from gptcli.data.tokenizer import Specials
from gptcli.errors import DataError
from gptcli.files import fingerprint, read_json, sha256_file, write_json

FORMAT = "gptcli token shards"
VERSION = 1
MANIFEST = "manifest.json"
HEADER_BYTES = 128
PARTS = ("tokens", "offsets", "bytes")


class NpyWriter:
    """A one-dimensional .npy written piece by piece: the header has a fixed size and is completed by `close`."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.count = 0
        self._file = path.open("wb")
        self._file.write(npy_header(self.dtype, 0))

    def write(self, array: NDArray[Any]) -> None:
        """Append an array."""
        self._file.write(np.ascontiguousarray(array, dtype=self.dtype).data)
        self.count += len(array)

    def abandon(self) -> None:
        """Close the file as it is, incomplete."""
        self._file.close()

    def close(self) -> dict[str, Any]:
        """Complete the file; return its name, size and sha256."""
        self._file.seek(0)
        self._file.write(npy_header(self.dtype, self.count))
        self._file.close()
        return {"name": self.path.name, "size": self.path.stat().st_size, "sha256": sha256_file(self.path)}


def npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """The first 128 bytes of a version 1.0 .npy of `count` values (numpy.lib.format)."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(HEADER_BYTES - 11).encode()
        + b"\n"
    )


class ShardWriter:
    """Writes the sources of one side (training or validation), one after the other, then the manifest.

    As a context manager it leaves no file open, whatever happens.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.sources: list[dict[str, Any]] = []
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._open: list[NpyWriter] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *args: object) -> None:
        for writer in self._open:
            writer.abandon()

    def begin_source(self, name: str) -> None:
        """Let what follows belong to a source, in shard files of its own."""
        self._close_shard()
        self.sources.append({"name": name, "documents": 0, "bytes": 0, "tokens": 0, "shards": []})

    def add(self, encoded: Encoded) -> None:
        """Append documents to the present source."""
        source = self.sources[-1]
        source["documents"] += len(encoded.lengths)
        source["bytes"] += int(encoded.bytes.sum())
        source["tokens"] += len(encoded.tokens)
        begins = np.cumsum(encoded.lengths) - encoded.lengths
        done = document = 0
        while done < len(encoded.tokens):
            tokens, offsets, sizes = self._shard()
            end = min(len(encoded.tokens), done + self._shard_tokens - tokens.count)
            until = int(np.searchsorted(begins, end))
            offsets.write(begins[document:until] - done + tokens.count)
            sizes.write(encoded.bytes[document:until])
            tokens.write(encoded.tokens[done:end])
            done, document = end, until

    def finish(self, **about: Any) -> dict[str, Any]:
        """Close the files, write and return the manifest, `about` in it."""
        self._close_shard()
        totals = {key: sum(source[key] for source in self.sources) for key in ("documents", "bytes", "tokens")}
        shards = [
            [shard["files"][part]["sha256"] for part in PARTS] for source in self.sources for shard in source["shards"]
        ]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.name,
            **about,
            **totals,
            "fingerprint": fingerprint(
                [about.get("tokenizer"), [len(source["shards"]) for source in self.sources], shards]
            ),
            "sources": self.sources,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _shard(self) -> list[NpyWriter]:
        if self._open and self._open[0].count >= self._shard_tokens:
            self._close_shard()
        if not self._open:
            stem = f"source-{len(self.sources) - 1:03}-shard-{len(self.sources[-1]['shards']):05}"
            dtypes = (self._dtype, np.dtype(np.int64), np.dtype(np.int64))
            pairs = zip(PARTS, dtypes, strict=True)
            self._open = [NpyWriter(self.folder / f"{stem}.{part}.npy", dtype) for part, dtype in pairs]
        return self._open

    def _close_shard(self) -> None:
        if self._open:
            counts = {"tokens": self._open[0].count, "documents": self._open[1].count}
            files = {part: writer.close() for part, writer in zip(PARTS, self._open, strict=True)}
            self.sources[-1]["shards"].append({**counts, "files": files})
            self._open = []


@dataclass(frozen=True)
class Stream:
    """The tokens of one source: memory-mapped shards, one after the other."""

    name: str
    shards: tuple[NDArray[Any], ...]
    starts: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """The tokens [begin, end), copied, over shard ends."""
        parts = []
        for index in range(int(np.searchsorted(self.starts, begin, side="right")) - 1, len(self.shards)):
            start = int(self.starts[index])
            if start >= end:
                break
            parts.append(self.shards[index][max(begin - start, 0) : end - start])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def rows(self, begins: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Rows of `length` tokens that begin at `begins`: int64 of shape [len(begins), length]."""
        result = np.empty((len(begins), length), dtype=np.int64)
        homes = np.searchsorted(self.starts, begins, side="right") - 1
        whole = begins + length <= self.starts[homes + 1]
        for home in np.unique(homes[whole]):
            chosen = np.flatnonzero(whole & (homes == home))
            windows = np.lib.stride_tricks.sliding_window_view(self.shards[home], length)
            result[chosen] = windows[begins[chosen] - self.starts[home]]
        for index in np.flatnonzero(~whole):
            result[index] = self.read(int(begins[index]), int(begins[index]) + length)
        return result


class Shards:
    """The token files of one side. Open with `Shards.open`, which checks them."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokens = int(manifest["tokens"])
        self.documents = int(manifest["documents"])
        self.bytes: int | None = manifest.get("bytes")
        self.vocab_size = int(manifest["vocab_size"])
        self.dtype = np.dtype(manifest["dtype"])
        self.fingerprint = str(manifest["fingerprint"])
        self.specials = Specials(**manifest["specials"])
        self.streams = [self._stream(source) for source in manifest["sources"]]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Shards:
        """Open a folder of shards; sizes and headers are always checked, every sha256 with `verify`.

        Raises `DataError` that names the file which is missing, cut short, changed or of another kind.
        """
        manifest = _read_manifest(folder)
        dtypes = {"tokens": np.dtype(manifest["dtype"]), "offsets": np.dtype(np.int64), "bytes": np.dtype(np.int64)}
        for source in manifest["sources"]:
            for shard in source["shards"]:
                for part in PARTS:
                    count = shard["tokens" if part == "tokens" else "documents"]
                    _check_file(folder, shard["files"][part], dtypes[part], count, verify)
        return cls(folder, manifest)

    def evaluation_documents(self) -> Iterator[tuple[NDArray[np.int64], int | None]]:
        """(ids without BOS and EOS, UTF-8 bytes) of each document, in order; memory is one document."""
        first = 1 if self.specials.adds_bos else 0
        for stream, source in zip(self.streams, self.manifest["sources"], strict=True):
            pending: tuple[int, int] | None = None
            for index, shard in enumerate(source["shards"]):
                base = int(stream.starts[index])
                offsets = self._map(shard, "offsets")
                sizes = self._map(shard, "bytes")
                for offset, size in zip(offsets, sizes, strict=True):
                    if pending is not None:
                        yield self._document(stream, pending[0], base + int(offset), first), pending[1]
                    pending = (base + int(offset), int(size))
            if pending is not None:
                yield self._document(stream, pending[0], len(stream), first), pending[1]

    def _document(self, stream: Stream, begin: int, end: int, first: int) -> NDArray[np.int64]:
        return stream.read(begin + first, end - 1).astype(np.int64)

    def _stream(self, source: dict[str, Any]) -> Stream:
        counts = [shard["tokens"] for shard in source["shards"]]
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
        return Stream(source["name"], tuple(self._map(shard, "tokens") for shard in source["shards"]), starts)

    def _map(self, shard: dict[str, Any], part: str) -> NDArray[Any]:
        path = self.folder / shard["files"][part]["name"]
        if path.stat().st_size == HEADER_BYTES:
            return np.load(path)  # type: ignore[no-any-return]  # an empty file cannot be mapped
        return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ValueError(f"written in another format ({manifest['format']}, version {manifest['version']})")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"is not the manifest of token shards ({error})") from None
    return dict(manifest)


def _check_file(folder: Path, entry: dict[str, Any], dtype: np.dtype[Any], count: int, verify: bool) -> None:
    path = folder / entry["name"]
    if not path.is_file():
        raise _broken(path, "is missing")
    size = path.stat().st_size
    expected = HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise _broken(path, f"has {size:,} bytes, not {expected:,}")
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if header != npy_header(dtype.newbyteorder("<"), count):
        raise _broken(path, f"does not begin as a .npy of {count:,} {dtype.name}")
    if verify and sha256_file(path) != entry["sha256"]:
        raise _broken(path, "has other content than its manifest says")


def _broken(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), remedy=f"Delete the folder and run again: rm -r {path.parent.parent}")
