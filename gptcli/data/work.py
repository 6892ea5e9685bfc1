"""What is done with one piece: survey it, take its part of a sample, or encode it. Runs in any process, on any machine.

Everything a piece gives is a folder (or file) of the job's work folder that is committed by one rename, and a function
of the piece and the task alone: done twice it is the same bytes, and what is there is not done again. Memory: a batch
of a million characters, or one document.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.counts import Counts
from gptcli.data.encode import Encoder, make_encoder
from gptcli.data.pieces import Piece
from gptcli.data.sources import Document, Tally, read_documents
from gptcli.data.split import DIGEST_BYTES, SIDES, Split, digest_of, sample_bucket
from gptcli.data.writer import ShardWriter
from gptcli.files import committed_folder, read_json, write_json

BATCH_CHARACTERS = 1_000_000
CHECKED_CHARACTERS = 1_000
RESULT = "piece.json"

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """What a job asks of every piece.

    Attributes:
        folder: where the results of pieces go, which every process can reach.
        split: the rule that holds training documents out.
        repeated: a folder that marks the documents to leave out (bool a document, a .npy a piece); None leaves none.
        tokenizer: the tokenizer's folder; None while one is to be trained.
        fast: whether the fast encoder may be used.
        shard_tokens: tokens of a shard, at most.
        buckets: how many buckets a tokenizer's sample takes (see `gptcli.data.split`).
    """

    folder: Path
    split: Split
    repeated: Path | None = None
    tokenizer: Path | None = None
    fast: bool = True
    shard_tokens: int = 0
    buckets: int = 0


Work = Callable[[Piece, Task, int | None, OnBytes], Any]


def survey(piece: Piece, task: Task, left: int | None, on_bytes: OnBytes) -> dict[str, Any]:
    """Write digest (uint8, [documents, 16]), bytes and side of every document; return how many there are."""
    target = task.folder / piece.name
    if (target / RESULT).is_file():
        return dict(read_json(target / RESULT))
    digests = bytearray()
    sizes: list[int] = []
    tally = Tally()
    for document in read_documents(piece.inputs, piece.stream.reading, limit=left, tally=tally, on_bytes=on_bytes):
        raw = document.text.encode("utf-8")
        digests += digest_of(raw)
        sizes.append(len(raw))
    with committed_folder(target) as work:
        np.save(work / "digests.npy", np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES))
        np.save(work / "bytes.npy", np.array(sizes, dtype=np.int64))
        result = {"documents": len(sizes), "dropped": dict(tally.dropped)}
        write_json(work / RESULT, result)
    return result


def sample(piece: Piece, task: Task, left: int | None, on_bytes: OnBytes) -> dict[str, Any]:
    """The training parts of the documents in the first `task.buckets` buckets, in order."""
    texts = []
    count = 0
    for document in _documents(piece, task, left, Tally(), on_bytes):
        count += 1
        digest = digest_of(document.text.encode("utf-8"))
        if sample_bucket(digest) < task.buckets:
            text = document.text if piece.stream.held_out else task.split(document.text, digest)[0]
            if text is not None:
                texts.append(text)
    return {"documents": count, "texts": texts}


def encode(piece: Piece, task: Task, left: int | None, on_bytes: OnBytes) -> dict[str, Any]:
    """Write the piece's shards of both sides, its digests and `RESULT`; return the latter.

    Raises `gptcli.data.fast.Unequal` when the fast encoder differs from `tokenizers` on a sampled text.
    """
    target = task.folder / piece.name
    if (target / RESULT).is_file():
        return dict(read_json(target / RESULT))
    if task.tokenizer is None:
        raise ValueError("encoding needs a tokenizer")
    encoder = encoder_of(task.tokenizer, task.fast)
    tally = Tally()
    digests = bytearray()
    documents = 0
    with committed_folder(target) as work:
        with contextlib.ExitStack() as stack:
            sides = [
                _Side(stack.enter_context(ShardWriter(work, side, encoder.dtype, task.shard_tokens)), encoder, Counts())
                for side in SIDES
            ]
            for batch in _batches(_documents(piece, task, left, tally, on_bytes)):
                texts = [document.text for document in batch]
                keys = [digest_of(text.encode("utf-8")) for text in texts]
                # The fast encoder was proven for its tokenizer; that it holds for these texts is seen again here.
                encoder.check([texts[keys.index(min(keys))][:CHECKED_CHARACTERS]])
                documents += len(texts)
                digests += b"".join(keys)
                if piece.stream.held_out:
                    sides[1].add(texts, batch)
                    continue
                parts = [task.split(text, key) for text, key in zip(texts, keys, strict=True)]
                for number, side in enumerate(sides):
                    kept = [(text, at) for part, at in zip(parts, batch, strict=True) if (text := part[number])]
                    side.add([text for text, _ in kept], [at for _, at in kept])
        np.save(work / "digests.npy", np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES))
        result = {
            "documents": documents,
            "dropped": dict(tally.dropped),
            "examples": [[list(mark), reason] for mark, reason in tally.examples],
            "sides": {
                name: {**side.writer.written, **side.counts.to_json()} for name, side in zip(SIDES, sides, strict=True)
            },
        }
        write_json(work / RESULT, result)
    return result


@dataclass
class _Side:
    """Training or validation while a piece is encoded."""

    writer: ShardWriter
    encoder: Encoder
    counts: Counts

    def add(self, texts: list[str], documents: list[Document]) -> None:
        if not texts:
            return
        encoded = self.encoder(texts)
        self.writer.add(encoded)
        specials = self.encoder.specials
        ids = {value for value in (specials.bos, specials.eos) if value is not None}
        added = 2 if specials.adds_bos else 1
        self.counts.add(texts, encoded, ids, added, lambda index: documents[index].mark)


def _documents(piece: Piece, task: Task, left: int | None, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    """The documents of a piece, without those that are repetitions where these are left out."""
    found = read_documents(piece.inputs, piece.stream.reading, limit=left, tally=tally, on_bytes=on_bytes)
    if task.repeated is None:
        yield from found
        return
    repeated: NDArray[np.bool_] = np.load(task.repeated / f"{piece.name}.npy")
    for document, again in zip(found, repeated.tolist(), strict=True):
        if again:
            tally.drop("duplicate", document.mark)
        else:
            yield document


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and size + len(document.text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def encoder_of(folder: Path, fast: bool) -> Encoder:
    """The encoder of a tokenizer's folder, made once a process."""
    return make_encoder(folder, fast=fast)
