"""Writes the shards of one source, as a stream: memory is what is handed over.

The files of a shard are .npy whose header has a fixed size, so that it can be completed at the end. What is in them
says `gptcli.data.shards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.encode import Encoded
from gptcli.data.media.item import Medium, kept
from gptcli.data.verify import file_hashes
from gptcli.files import fingerprint

HEADER_BYTES = 128
PARTS = ("tokens", "offsets", "bytes")
SUPERVISED = "supervised"  # a fourth part, of data that says which of its tokens are trained on
# Three more, of data with images and sounds: the bytes of what is kept of each document's media, how many bytes that
# are, and a hash of the content of its media.
MEDIA, MEDIA_BYTES, MEDIA_HASH = "media", "media_bytes", "media_hash"


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
        """Complete the file; return its name, size, sha256 and the checksum of each MiB."""
        self._file.seek(0)
        self._file.write(npy_header(self.dtype, self.count))
        self._file.close()
        sha256, blocks = file_hashes(self.path)
        return {"name": self.path.name, "size": self.path.stat().st_size, "sha256": sha256, "blocks": blocks}


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
    """Writes `stem`-00000.tokens.npy and so on into a folder, a shard of at most `shard_tokens` after the other.

    As a context manager it completes the last shard, or after an error leaves no file open; `written` then has the
    documents, bytes, tokens and shards for the manifest. `supervised`, `media`: with these parts.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        dtype: np.dtype[Any],
        shard_tokens: int,
        *,
        supervised: bool = False,
        media: bool = False,
    ) -> None:
        self.written: dict[str, Any] = {"documents": 0, "bytes": 0, "tokens": 0, "shards": []}
        self._dtypes = {"tokens": dtype, "offsets": np.dtype(np.int64), "bytes": np.dtype(np.int64)}
        if supervised:
            self._dtypes[SUPERVISED] = np.dtype(np.uint8)
            self.written[SUPERVISED] = 0
        if media:
            self._dtypes |= {MEDIA: np.dtype(np.uint8), MEDIA_BYTES: np.dtype(np.int64), MEDIA_HASH: np.dtype(np.int64)}
            self.written[MEDIA] = 0
        self._folder = folder
        self._stem = stem
        self._shard_tokens = shard_tokens
        self._open: dict[str, NpyWriter] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *others: object) -> None:
        if kind is None:
            self._close_shard()
        else:
            for writer in self._open.values():
                writer.abandon()

    def add(self, encoded: Encoded) -> None:
        """Append documents; the part `supervised` needs theirs."""
        self.written["documents"] += len(encoded.lengths)
        self.written["bytes"] += int(encoded.bytes.sum())
        self.written["tokens"] += len(encoded.tokens)
        if SUPERVISED in self._dtypes:
            assert encoded.supervised is not None
            self.written[SUPERVISED] += int(np.count_nonzero(encoded.supervised))
        begins = np.cumsum(encoded.lengths) - encoded.lengths
        done = document = 0
        while done < len(encoded.tokens):
            parts = self._shard()
            end = min(len(encoded.tokens), done + self._shard_tokens - parts["tokens"].count)
            until = int(np.searchsorted(begins, end))
            parts["offsets"].write(begins[document:until] - done + parts["tokens"].count)
            parts["bytes"].write(encoded.bytes[document:until])
            parts["tokens"].write(encoded.tokens[done:end])
            if SUPERVISED in parts:
                assert encoded.supervised is not None
                parts[SUPERVISED].write(encoded.supervised[done:end])
            if MEDIA in parts:
                assert encoded.media is not None
                self._add_media(parts, encoded.media[document:until])
            done, document = end, until

    def _add_media(self, parts: dict[str, NpyWriter], media: Sequence[Sequence[Medium]]) -> None:
        saved = [kept(each) for each in media]
        self.written[MEDIA] += sum(map(len, media))
        parts[MEDIA].write(np.frombuffer(b"".join(saved), dtype=np.uint8))
        parts[MEDIA_BYTES].write(np.fromiter(map(len, saved), dtype=np.int64, count=len(saved)))
        hashes = (int(fingerprint([medium.hash for medium in each]), 16) % (1 << 62) if each else 0 for each in media)
        parts[MEDIA_HASH].write(np.fromiter(hashes, dtype=np.int64, count=len(saved)))

    def _shard(self) -> dict[str, NpyWriter]:
        if self._open and self._open["tokens"].count >= self._shard_tokens:
            self._close_shard()
        if not self._open:
            stem = f"{self._stem}-{len(self.written['shards']):05}"
            self._open = {
                part: NpyWriter(self._folder / f"{stem}.{part}.npy", dtype) for part, dtype in self._dtypes.items()
            }
        return self._open

    def _close_shard(self) -> None:
        if self._open:
            counts = {"tokens": self._open["tokens"].count, "documents": self._open["offsets"].count}
            if MEDIA in self._open:
                counts[MEDIA_BYTES] = self._open[MEDIA].count
            files = {part: writer.close() for part, writer in self._open.items()}
            self.written["shards"].append({**counts, "files": files})
            self._open = {}
