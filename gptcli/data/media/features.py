"""What a frozen tower made of media, kept on disk: found by the hash of a medium's content, read through memory maps.

A folder of safetensors files, each written whole or not at all. A file holds the media of one shape: `keys` (uint8
[n, 16]), `sizes` (int64 [n, 2]: a picture's width and height, a sound's samples), `counts` (int64 [n, parts]) and
`part0`, `part1`, ...: the rows of all its media, one after the other, `counts` of them each. Media are split by their
rows, so that the parts of a batch are those of its media in order. What the folder belongs to says its name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.media.item import Medium, Modality
from gptcli.errors import writing
from gptcli.files import write_atomic

if TYPE_CHECKING:
    import torch

    from gptcli.data.media.reader import MediaReader

SUFFIX = ".safetensors"
KEY_BYTES = 16
# Open files of shards, and layouts of batches, of one process.
_OPEN, _LAYOUTS = 64, 64
_KEY = np.dtype(f"S{KEY_BYTES}")


def key_of(medium: Medium) -> bytes:
    """What a medium is found by: the hash of its content."""
    return bytes.fromhex(medium.hash)


def size_of(loaded: Any) -> tuple[int, int]:
    """The size of a decoded picture (width, height) or sound (samples, 0), of which a processor's layout is made."""
    return tuple(loaded.size) if hasattr(loaded, "getbands") else (len(loaded), 0)


@dataclass
class Found:
    """What is kept of the media of a batch: their sizes, and each part of all of them."""

    sizes: list[tuple[int, int]]
    parts: list[torch.Tensor]


class FeatureStore:
    """The features of media in a folder; what is written by others is seen after `look`.

    A file that cannot be read is passed over: what it held is made again. Memory: 32 bytes a medium.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[int, Any] = OrderedDict()
        self.look()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": OrderedDict()}  # maps of files stay in their process

    def look(self) -> None:
        """Read which media there are."""
        self._files.clear()
        self._names: list[str] = []
        # By file: sizes, counts and where the rows of each medium begin.
        self._abouts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
        keys: list[NDArray[Any]] = [np.empty(0, _KEY)]
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name.startswith("."):
                continue
            try:
                with _opened(path) as file:
                    found = np.ascontiguousarray(file.get_tensor("keys").numpy())
                    sizes, counts = (file.get_tensor(name).numpy().astype(np.int64) for name in ("sizes", "counts"))
            except Exception:  # whatever safetensors raises for a damaged file
                continue
            keys.append(found.view(_KEY).reshape(-1))
            self._names.append(path.name)
            self._abouts.append((sizes, counts, np.cumsum(counts, axis=0) - counts))
        lengths = np.array([len(part) for part in keys[1:]], dtype=np.int64)
        every = np.concatenate(keys)
        order = np.argsort(every, kind="stable")
        self._keys = every[order]
        self._homes = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[order]
        self._places = np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths.tolist())]).astype(np.int32)[
            order
        ]

    def __len__(self) -> int:
        return len(self._keys)

    def has(self, key: bytes) -> bool:
        """Whether there is something of a medium."""
        return self._at(key) is not None

    def find(self, media: Sequence[Medium]) -> Found | None:
        """What is kept of the media of a batch, in their order; None where something is missing or has another shape.

        Media whose parts differ in more than their rows are laid out by the model for each batch, and not put together.
        """
        import torch

        places = [self._at(key_of(medium)) for medium in media]
        if not places or None in places:
            return None
        sizes: list[tuple[int, int]] = []
        parts: list[list[torch.Tensor]] = []
        for home, place in [place for place in places if place is not None]:
            about, counts, begins = self._abouts[home]
            file = self._file(home)
            sizes.append((int(about[place, 0]), int(about[place, 1])))
            ends = zip(begins[place].tolist(), counts[place].tolist(), strict=True)
            parts.append([file.get_slice(f"part{n}")[begin : begin + count] for n, (begin, count) in enumerate(ends)])
        columns = [*zip(*parts, strict=True)]
        if any(len({each.shape[1:] for each in column}) > 1 for column in columns):
            return None
        return Found(sizes, [torch.cat(column) for column in columns])

    def _at(self, key: bytes) -> tuple[int, int] | None:
        # numpy drops zeros at the end of its bytes, on both sides.
        wanted = np.array(key, _KEY)
        at = int(np.searchsorted(self._keys, wanted))
        if at == len(self._keys) or self._keys[at] != wanted:
            return None
        return int(self._homes[at]), int(self._places[at])

    def _file(self, home: int) -> Any:
        if home not in self._files:
            if len(self._files) >= _OPEN:
                self._files.popitem(last=False)
            self._files[home] = _opened(self.folder / self._names[home])
        self._files.move_to_end(home)
        return self._files[home]


class FeatureWriter:
    """Writes features into a folder, a file of about `file_bytes` after the other; `close` writes what is left."""

    def __init__(self, folder: Path, file_bytes: int = 64 << 20) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._waiting: dict[Any, list[tuple[bytes, tuple[int, int], list[torch.Tensor]]]] = {}
        self._bytes = 0
        self.written = 0

    def add(self, key: bytes, size: tuple[int, int], parts: list[torch.Tensor]) -> None:
        """Keep the parts of a medium, on the host. Raises `CheckpointError` where they cannot be written."""
        shape = tuple((part.dtype, part.shape[1:]) for part in parts)
        self._waiting.setdefault(shape, []).append((key, size, parts))
        self._bytes += sum(part.numel() * part.element_size() for part in parts)
        if self._bytes >= self._file_bytes:
            self.close()

    def close(self) -> None:
        """Write what is there."""
        for media in self._waiting.values():
            self._write(media)
        self._waiting, self._bytes = {}, 0

    def _write(self, media: list[tuple[bytes, tuple[int, int], list[torch.Tensor]]]) -> None:
        import torch
        import xxhash
        from safetensors.torch import save

        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(key for key, _, _ in media)), dtype=torch.uint8).view(
                -1, KEY_BYTES
            ),
            "sizes": torch.tensor([size for _, size, _ in media], dtype=torch.int64),
            "counts": torch.tensor([[len(part) for part in parts] for _, _, parts in media], dtype=torch.int64),
        }
        for number, column in enumerate(zip(*(parts for _, _, parts in media), strict=True)):
            tensors[f"part{number}"] = torch.cat(column)
        data = save(tensors)
        path = self._folder / f"{xxhash.xxh3_64_hexdigest(data)}{SUFFIX}"
        with writing(path, "the outputs of the tower (data.cache_features)", "Those that are written stay."):
            write_atomic(path, data)
        self.written += len(media)


class Layouts:
    """What a processor makes of media, by their sizes alone, where the numbers of the media are not needed.

    How it lays out a batch (masks, grids, which row has how many) depends on the sizes of its media, so it is asked
    with blank ones, and the last answers are kept. In place of the numbers of pictures or sounds stands one 1.0 that
    is repeated, which takes no memory.
    """

    def __init__(self, reader: MediaReader, modality: Modality) -> None:
        self._reader, self._modality = reader, modality
        self._known: OrderedDict[Any, dict[str, torch.Tensor]] = OrderedDict()

    def of(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, torch.Tensor]:
        """The inputs for media of these sizes, by rows; see `MediaReader.inputs`."""
        wanted = tuple(tuple(row) for row in rows if row)
        if wanted not in self._known:
            if len(self._known) >= _LAYOUTS:
                self._known.popitem(last=False)
            self._known[wanted] = self._made(wanted)
        self._known.move_to_end(wanted)
        return self._known[wanted]

    def _made(self, rows: Sequence[Sequence[tuple[int, int]]]) -> dict[str, torch.Tensor]:
        import torch

        media = [[self._blank(size) for size in row] for row in rows]
        made = self._reader.inputs_of(media, self._modality)
        ones = torch.ones(())
        return {
            name: ones.to(value.dtype).expand(value.shape) if value.is_floating_point() and value.ndim > 1 else value
            for name, value in made.items()
        }

    def _blank(self, size: tuple[int, int]) -> Any:
        if self._modality == "audio":
            return np.zeros(size[0], dtype=np.float32)
        from PIL import Image

        return Image.new("RGB", size, (255, 255, 255))


def by_rows(sizes: Sequence[tuple[int, int]], rows: Sequence[Sequence[Medium]]) -> list[list[tuple[int, int]]]:
    """Sizes of all media of some rows, one after the other, in rows again."""
    ends = [*accumulate(map(len, rows))]
    return [[*sizes[end - len(row) : end]] for row, end in zip(rows, ends, strict=True)]


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), framework="pt")
