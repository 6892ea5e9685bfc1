"""Sources of tokens made before (`tokens:`): nanoGPT's .bin, a .npy, or a folder of our shards.

A document ends with the tokenizer's end of text; BOS and EOS are put where our own shards have them, so that what is
read back is the same whoever made it. Files are memory-mapped: memory is some million tokens, whatever their size.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import decoders

from gptcli.data.readers import shown
from gptcli.data.reading.row import Mark
from gptcli.data.shards import MANIFEST, Shards
from gptcli.data.tokenizer import Specials, bytes_of, load_fast
from gptcli.errors import DataError

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source

DEFAULT_DTYPE = "uint16"
CHUNK = 1 << 22
_KINDS = "tokens: takes a .bin (dtype: uint16 or uint32), a .npy, or the folder of prepared data."


class TokenDocument(NamedTuple):
    """A document of ids: the `number`-th of the `part`-th input, from 1 and 0."""

    ids: NDArray[Any]
    part: int
    number: int

    @property
    def raw(self) -> bytes:
        """What tells equal documents."""
        return self.ids.astype("<u4").tobytes()

    def mark(self) -> Mark:
        """Where it stands."""
        return Mark(self.part, self.number, "", "")


@dataclass(frozen=True)
class TokensInput:
    """Files that hold one stream of tokens, one after the other.

    `dtype` is that of a .bin or of our shards, "" for a .npy, which says its own; `tokenizer` the fingerprint of the
    one that made our shards, "" when it is not known.
    """

    path: Path
    files: tuple[Path, ...]
    dtype: str = DEFAULT_DTYPE
    tokenizer: str = ""


def find_tokens(source: Source, *, where: str | None = None) -> list[TokensInput]:
    """The files of a `tokens:` source, checked for their kind. Raises `DataError` when there is nothing to read."""
    name = os.path.expanduser(str(source.tokens))
    path = Path(name)
    dtype = source.dtype or DEFAULT_DTYPE
    if path.is_dir():
        return _of_shards(path, where)
    paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    if not paths:
        raise DataError(f"there is no file {shown(path)}", where=where, remedy="Check the path.")
    for each in paths:
        if each.suffix not in {".bin", ".npy"} or not each.is_file():
            raise DataError(f"{shown(each)} is no file of tokens", where=where, remedy=_KINDS)
        _mapped(each, dtype)
    return [TokensInput(each, (each,), dtype if each.suffix == ".bin" else "") for each in paths]


def read_tokens(part: TokensInput, specials: Specials) -> Iterator[NDArray[Any]]:
    """The documents of a stream without BOS and EOS, in order, empty ones too; each has to fit in memory.

    Where BOS is EOS, one that stands where a document would begin is its BOS.
    """
    rest: list[NDArray[Any]] = []
    alike = specials.adds_bos and specials.bos == specials.eos
    begun = False
    for array in (_mapped(path, part.dtype) for path in part.files):
        for begin in range(0, len(array), CHUNK):
            chunk = array[begin : begin + CHUNK]
            at = 0
            for end in np.flatnonzero(chunk == specials.eos).tolist():
                begun = alike and not begun and not rest and at == end
                if not begun:
                    yield _document([*rest, chunk[at:end]], specials)
                rest, at = [], end + 1
            if at < len(chunk):
                rest.append(chunk[at:])
    if rest:
        yield _document(rest, specials)


def token_bytes(tokenizer: Path) -> NDArray[np.int64] | None:
    """How many bytes each id stands for, by id; None where that depends on its neighbours."""
    loaded = load_fast(tokenizer)
    if not isinstance(loaded.decoder, decoders.ByteLevel):  # words of ASCII look like byte-level entries
        return None
    added = {number: len(token.content.encode("utf-8")) for number, token in loaded.get_added_tokens_decoder().items()}
    vocabulary = loaded.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for entry, number in vocabulary.items():
        raw = bytes_of(entry)
        if number not in added and raw is None:
            return None
        sizes[number] = added[number] if number in added else len(raw or b"")
    return sizes


def check_ids(ids: NDArray[Any], vocab_size: int, part: TokensInput, document: int) -> None:
    """Raise `DataError` for an id that the tokenizer does not have."""
    if len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        wrong = int(ids[(ids >= vocab_size) | (ids < 0)][0])
        raise DataError(
            f"token {wrong} is none of the tokenizer's {vocab_size:,}",
            where=f"{shown(part.path)}:{document}",
            remedy="Name the tokenizer that made these tokens (tokenizer.from), and their dtype.",
        )


def size_of(part: TokensInput) -> int:
    """The bytes of the files."""
    return sum(path.stat().st_size for path in part.files)


def _document(parts: Sequence[NDArray[Any]], specials: Specials) -> NDArray[Any]:
    ids = np.concatenate(parts) if len(parts) > 1 else np.array(parts[0])
    if specials.adds_bos and len(ids) and ids[0] == specials.bos:
        return ids[1:]
    return ids


def _of_shards(folder: Path, where: str | None) -> list[TokensInput]:
    if not (folder / MANIFEST).is_file() and (folder / "train" / MANIFEST).is_file():
        folder = folder / "train"
    if not (folder / MANIFEST).is_file():
        remedy = "Give the folder of prepared data, as `gptcli tokenize` prints it, or its train/ or validation/."
        raise DataError(f"the folder {shown(folder)} holds no token shards", where=where, remedy=remedy)
    shards = Shards.open(folder)
    if shards.has_supervision:
        raise DataError(
            f"{shown(folder)} is rows of which some tokens are not trained on, and a source of tokens trains on all",
            where=where,
            remedy="Give the rows themselves: path, with data.format.",
        )
    sources = shards.manifest["sources"]
    files = [tuple(folder / shard["files"]["tokens"]["name"] for shard in source["shards"]) for source in sources]
    tokenizer = str(shards.manifest["tokenizer"])
    return [TokensInput(folder, each, shards.dtype.name, tokenizer) for each in files if each]


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    try:
        if path.suffix == ".npy":
            array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not a row of whole numbers")
            return array
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    except (OSError, ValueError, EOFError, TokenError) as error:
        raise DataError(f"is no file of tokens: {error}", where=shown(path), remedy=_KINDS) from None
