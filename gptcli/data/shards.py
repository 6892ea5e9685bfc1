"""The files of tokens: checked before use, readable with numpy alone.

A folder holds manifest.json and, for every source, shards of at most `shard_tokens` tokens. A shard is three .npy:
`tokens`; `offsets` (int64: where the documents that begin in it begin, in tokens from the shard's start); `bytes`
(int64: UTF-8 bytes of each of these documents). Data of rows (format prompt or chat) has a fourth, `supervised` (uint8:
1 for each token that is to be predicted, else 0); with images and sounds three more, `media` (uint8: what is kept of a
document's media, see `gptcli.data.media.item`), `media_bytes` (int64: how many of these each document has) and
`media_hash` (int64: of what they hold). A document runs to where the next begins, over the end of its shard
if need be; the stream of a source is its shards one after the other. The manifest has every file's size, sha256 and
the checksum of each MiB (see `gptcli.data.verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.media.item import Medium, restored
from gptcli.data.tokenizer import Specials
from gptcli.data.verify import BLOCK_BYTES, DIGITS, Expected, broken, check, unreadable
from gptcli.data.writer import HEADER_BYTES, MEDIA, MEDIA_BYTES, MEDIA_HASH, PARTS, SUPERVISED, npy_header
from gptcli.errors import DataError
from gptcli.files import fingerprint, read_json, write_json

FORMAT = "gptcli token shards"
# 2: a checksum of each MiB beside the sha256.
VERSION = 2
# With the part `supervised`: a release that does not know it would train on all tokens.
VERSION_SUPERVISED = 3
# With media too: a release that does not know them would train on placeholders alone.
VERSION_MEDIA = 4
MANIFEST = "manifest.json"


def write_manifest(folder: Path, sources: list[dict[str, Any]], dtype: np.dtype[Any], **about: Any) -> dict[str, Any]:
    """Write and return the manifest of a folder whose shards are there, `about` in it.

    Sources that count their `supervised` tokens have shards with that part: all of them, or none.
    """
    supervised = bool(sources) and all(SUPERVISED in source for source in sources)
    media = supervised and all(MEDIA in source for source in sources)
    counted = ("documents", "bytes", "tokens", *([SUPERVISED] if supervised else []), *([MEDIA] if media else []))
    totals = {key: sum(source[key] for source in sources) for key in counted}
    manifest = {
        "format": FORMAT,
        "version": VERSION_MEDIA if media else VERSION_SUPERVISED if supervised else VERSION,
        "dtype": dtype.name,
        **about,
        **totals,
        "fingerprint": _fingerprint(about.get("tokenizer"), sources),
        "sources": sources,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


@dataclass(frozen=True)
class Stream:
    """The tokens of one source: memory-mapped shards, one after the other.

    `supervised` has as many shards of uint8, 1 for each token that is to be predicted; None: all are.
    """

    name: str
    shards: tuple[NDArray[Any], ...]
    starts: NDArray[np.int64] = field(repr=False)
    supervised: tuple[NDArray[np.uint8], ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """The tokens [begin, end), copied, over shard ends."""
        return self._read(self.shards, begin, end)

    def read_supervised(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Which of the tokens [begin, end) are to be predicted: bool, all True where the shards do not say it."""
        if self.supervised is None:
            return np.ones(len(range(begin, min(end, len(self)))), dtype=np.bool_)
        return self._read(self.supervised, begin, end).astype(np.bool_)

    def _read(self, shards: tuple[NDArray[Any], ...], begin: int, end: int) -> NDArray[Any]:
        parts = []
        for index in range(int(np.searchsorted(self.starts, begin, side="right")) - 1, len(shards)):
            start = int(self.starts[index])
            if start >= end:
                break
            parts.append(shards[index][max(begin - start, 0) : end - start])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at positions, each by itself: int64 of their shape [n]."""
        return self._gathered(self.shards, positions).astype(np.int64)

    def gather_supervised(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the tokens at positions [n] are supervised."""
        if self.supervised is None:
            return np.ones(len(positions), dtype=bool)
        return self._gathered(self.supervised, positions).astype(bool)

    def _gathered(self, parts: tuple[NDArray[Any], ...], positions: NDArray[np.int64]) -> NDArray[Any]:
        if len(parts) == 1:
            return parts[0][positions]
        homes = np.searchsorted(self.starts, positions, side="right") - 1
        result = np.empty(len(positions), dtype=parts[0].dtype)
        for home in np.unique(homes).tolist():
            chosen = homes == home
            result[chosen] = parts[home][positions[chosen] - self.starts[home]]
        return result

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
        self.has_supervision = manifest["version"] in (VERSION_SUPERVISED, VERSION_MEDIA)
        self.has_media = manifest["version"] == VERSION_MEDIA
        self.specials = Specials(**manifest["specials"])
        self._media: dict[tuple[int, int], tuple[NDArray[Any], ...]] = {}
        self.streams = [self._stream(source) for source in manifest["sources"]]

    @classmethod
    def open(cls, folder: Path, *, verify: bool | None = None) -> Shards:
        """Open a folder of shards; the manifest, sizes and headers are always checked.

        Args:
            folder: of one side, with its manifest.
            verify: True checks every block; None those of a folder of at most 1 GB and of files that changed since
                their last verification; False none (for what this process has just written).

        Raises:
            DataError: names the file which is missing, cut short, changed or of another kind, and the bytes.
        """
        manifest = _read_manifest(folder)
        try:
            if manifest["fingerprint"] != _fingerprint(manifest.get("tokenizer"), manifest["sources"]):
                raise ValueError("its fingerprint is not that of the files it lists")
            files = list(_expected(folder, manifest))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_manifest(folder, error) from None
        check(files, verify)
        try:
            return cls(folder, manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise _no_manifest(folder, error) from None

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

    def document_offsets(self, index: int) -> NDArray[np.int64]:
        """Where each document of source `index` begins in its stream, and the stream's end: int64, [documents + 1]."""
        stream, shards = self.streams[index], self.manifest["sources"][index]["shards"]
        begins = [start + self._map(shard, "offsets") for start, shard in zip(stream.starts, shards, strict=False)]
        return np.concatenate([*begins, stream.starts[-1:]])

    def media(self, index: int, begins: NDArray[np.int64]) -> list[list[Medium]]:
        """The media of the documents of source `index` that begin at `begins` (int64 [n]) in its stream."""
        stream, shards = self.streams[index], self.manifest["sources"][index]["shards"]
        found: list[list[Medium]] = []
        homes = np.searchsorted(stream.starts, begins, side="right") - 1
        for home, begin in zip(homes.tolist(), begins.tolist(), strict=True):
            offsets, ends, data = self._media_of(index, home, shards[home])
            document = int(np.searchsorted(offsets, begin - int(stream.starts[home])))
            first = int(ends[document - 1]) if document else 0
            found.append(restored(data[first : int(ends[document])].tobytes()))
        return found

    def _media_of(self, index: int, home: int, shard: dict[str, Any]) -> tuple[NDArray[Any], ...]:
        """The offsets of a shard's documents, where what is kept of the media of each ends, and that itself."""
        if (index, home) not in self._media:
            sizes = self._map(shard, MEDIA_BYTES)
            self._media[index, home] = self._map(shard, "offsets"), np.cumsum(sizes), self._map(shard, MEDIA)
        return self._media[index, home]

    def _document(self, stream: Stream, begin: int, end: int, first: int) -> NDArray[np.int64]:
        return stream.read(begin + first, end - 1).astype(np.int64)

    def _stream(self, source: dict[str, Any]) -> Stream:
        counts = [shard["tokens"] for shard in source["shards"]]
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
        tokens, supervised = (
            tuple(self._map(shard, part) for shard in source["shards"]) if present else None
            for part, present in (("tokens", True), (SUPERVISED, self.has_supervision))
        )
        assert tokens is not None
        return Stream(source["name"], tokens, starts, supervised)

    def _map(self, shard: dict[str, Any], part: str) -> NDArray[Any]:
        path = self.folder / shard["files"][part]["name"]
        if path.stat().st_size == HEADER_BYTES:
            return np.load(path)  # type: ignore[no-any-return]  # an empty file cannot be mapped
        return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _fingerprint(tokenizer: Any, sources: list[dict[str, Any]]) -> str:
    """What the tokens and media are, whatever the sources are named and wherever the media lie."""
    shards = [
        [shard["files"][part]["sha256"] for part in (*PARTS, SUPERVISED, MEDIA_HASH) if part in shard["files"]]
        for source in sources
        for shard in source["shards"]
    ]
    return fingerprint([tokenizer, [len(source["shards"]) for source in sources], shards])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if manifest["format"] != FORMAT or manifest["version"] not in (VERSION, VERSION_SUPERVISED, VERSION_MEDIA):
            found = f"{manifest['format']}, version {manifest['version']}"
            raise broken(
                path, f"is written in another format ({found}, not {FORMAT}, version {VERSION})", folder.parent
            )
    except FileNotFoundError:
        raise broken(path, "is missing", folder.parent) from None
    except OSError as error:
        raise broken(path, unreadable(error), folder.parent) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _no_manifest(folder, error) from None
    return dict(manifest)


def _no_manifest(folder: Path, error: Exception) -> DataError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return broken(folder / MANIFEST, f"is not the manifest of token shards ({reason})", folder.parent)


def _expected(folder: Path, manifest: dict[str, Any]) -> Iterator[Expected]:
    """What every file should be, by the manifest alone.

    Raises:
        ValueError, KeyError, TypeError or AttributeError: the manifest is damaged.
    """
    dtypes = {"tokens": np.dtype(manifest["dtype"]), "offsets": np.dtype(np.int64), "bytes": np.dtype(np.int64)}
    counted = {"tokens": "tokens", SUPERVISED: "tokens", MEDIA: MEDIA_BYTES}
    if manifest["version"] != VERSION:
        dtypes[SUPERVISED] = np.dtype(np.uint8)
    if manifest["version"] == VERSION_MEDIA:
        dtypes |= {MEDIA: np.dtype(np.uint8), MEDIA_BYTES: np.dtype(np.int64), MEDIA_HASH: np.dtype(np.int64)}
    for source in manifest["sources"]:
        for shard in source["shards"]:
            for part, kind in dtypes.items():
                entry, dtype = shard["files"][part], kind.newbyteorder("<")
                count = int(shard[counted.get(part, "documents")])
                size = HEADER_BYTES + count * dtype.itemsize
                if Path(entry["name"]).name != entry["name"]:
                    raise ValueError(f"{entry['name']} is not a name of a file in its folder")
                if len(entry["blocks"]) != DIGITS * -(-size // BLOCK_BYTES):
                    raise ValueError(f"not a checksum for each MiB of {entry['name']}")
                told = f"{count:,} {dtype.name}"
                yield Expected(folder / entry["name"], told, npy_header(dtype, count), size, entry["blocks"])
