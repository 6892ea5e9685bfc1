"""What is done with one piece: survey it, take its part of a sample, or encode it. Runs in any process, on any machine.

Everything a piece gives is a folder (or file) of the job's work folder that is committed by one rename, and a function
of the piece and the task alone: done twice it is the same bytes, and what is there is not done again. Memory: a batch
of a million characters, or one document.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.chat_template import template_file
from gptcli.data.counts import Counts
from gptcli.data.encode import Encoded, Encoder, batches, make_encoder, utf8_size
from gptcli.data.infill import Infill, infilled
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.reader import open_reader
from gptcli.data.pieces import Piece
from gptcli.data.readers import BadRow
from gptcli.data.sources import Document, Tally, bad_row, read_documents
from gptcli.data.split import DIGEST_BYTES, SIDES, Split, digest_of, sample_bucket
from gptcli.data.supervise import UNSUPERVISED, Parts, encode_parts, parts_of, templater_of
from gptcli.data.templater import TemplateFault
from gptcli.data.tokenizer import load_fast
from gptcli.data.tokens import TokenDocument, TokensInput, check_ids, read_tokens, size_of, token_bytes
from gptcli.data.writer import ShardWriter
from gptcli.files import committed_folder, read_json, write_json

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
        infill: which training texts are cut for objective fim, and the ids of the three tokens; None: none.
    """

    folder: Path
    split: Split
    repeated: Path | None = None
    tokenizer: Path | None = None
    fast: bool = True
    shard_tokens: int = 0
    buckets: int = 0
    infill: tuple[Infill, tuple[int, ...]] | None = None

    @property
    def encoder(self) -> tuple[Path, bool]:
        """What `encoder_of` makes the encoder from."""
        if self.tokenizer is None:
            raise ValueError("this work needs a tokenizer")
        return self.tokenizer, self.fast


Work = Callable[[Piece, Task, int | None, OnBytes], Any]


def survey(piece: Piece, task: Task, left: int | None, on_bytes: OnBytes) -> dict[str, Any]:
    """Write digest (uint8, [documents, 16]), bytes and side of every document; return how many there are."""
    target = task.folder / piece.name
    if (target / RESULT).is_file():
        return dict(read_json(target / RESULT))
    digests = bytearray()
    sizes: list[int] = []
    held_out: list[bool] = []
    tally = Tally()
    for document in _read(piece, task, left, tally, on_bytes):
        raw = document.raw
        digests += digest_of(raw)
        sizes.append(len(raw))
        held_out.append(piece.stream.held_out or task.split.holds_out(raw))
    with committed_folder(target) as work:
        _save_digests(work, digests)
        np.save(work / "bytes.npy", np.array(sizes, dtype=np.int64))
        np.save(work / "held_out.npy", np.array(held_out, dtype=np.bool_))
        result = {"documents": len(sizes), "dropped": dict(tally.dropped)}
        write_json(work / RESULT, result)
    return result


def sample(piece: Piece, task: Task, left: int | None, on_bytes: OnBytes) -> dict[str, Any]:
    """The training parts of the documents in the first `task.buckets` buckets, in order."""
    texts = []
    count = 0
    for document in _documents(piece, task, left, Tally(), on_bytes):
        count += 1
        assert isinstance(document, Document)  # a tokenizer is not trained on tokens
        raw = document.raw
        if sample_bucket(digest_of(raw)) < task.buckets:
            text = document.text if piece.stream.held_out else task.split(document.text, raw)[0]
            if text is not None:
                texts.append(text)
    return {"documents": count, "texts": texts}


def encode(piece: Piece, task: Task, left: int | None, on_bytes: OnBytes) -> dict[str, Any]:
    """Write the piece's shards of both sides, its digests and `RESULT`; return how many documents it has.

    Raises `gptcli.data.fast.Unequal` when the fast encoder differs from `tokenizers` on a sampled text.
    """
    target = task.folder / piece.name
    if (target / RESULT).is_file():
        return {"documents": read_json(target / RESULT)["documents"]}
    encoder = encoder_of(*task.encoder)
    tally = Tally()
    digests = bytearray()
    with committed_folder(target) as work:
        with contextlib.ExitStack() as stack:
            row_format = piece.stream.reading.format
            supervised = row_format is not None
            parts = {"supervised": supervised, "media": row_format is not None and row_format.reads}
            writers = [
                stack.enter_context(ShardWriter(work, side, encoder.dtype, task.shard_tokens, **parts))
                for side in SIDES
            ]
            sides = [_Side(writer, encoder, Counts()) for writer in writers]
            # Of one kind: a source has texts or tokens.
            found: Iterator[Any] = _documents(piece, task, left, tally, on_bytes)
            for batch in batches(found, size=_length):
                raws = [document.raw for document in batch]
                digests += b"".join(map(digest_of, raws))
                if isinstance(batch[0], TokenDocument):
                    _add_tokens(piece, task, sides, batch, raws)
                elif supervised:
                    _add_examples(piece, task, sides, batch, raws, tally)
                else:
                    _add_texts(piece, task, sides, batch, raws)
        _save_digests(work, digests)
        result = {
            "documents": len(digests) // DIGEST_BYTES + tally.dropped["duplicate"],
            "dropped": dict(tally.dropped),
            "examples": [[list(mark), reason] for mark, reason in tally.examples],
            "sides": {
                name: {**side.writer.written, **side.counts.to_json()} for name, side in zip(SIDES, sides, strict=True)
            },
        }
        write_json(work / RESULT, result)
    return {"documents": result["documents"]}


@dataclass
class _Side:
    """Training or validation while a piece is encoded."""

    writer: ShardWriter
    encoder: Encoder
    counts: Counts

    def add(self, texts: Sequence[str], encoded: Encoded, documents: Sequence[Document | TokenDocument]) -> None:
        self.writer.add(encoded)
        specials = self.encoder.specials
        ids = {value for value in (specials.bos, specials.eos) if value is not None}
        if encoded.supervised is not None:  # a chat template puts them anywhere
            self.counts.add(texts, encoded, set(), 0, lambda at: documents[at].mark())
            return
        self.counts.add(texts, encoded, ids, 2 if specials.adds_bos else 1, lambda at: documents[at].mark())


def _add_texts(piece: Piece, task: Task, sides: list[_Side], batch: list[Document], raws: list[bytes]) -> None:
    texts = [document.text for document in batch]
    encoder = sides[0].encoder
    # The fast encoder was proven for its tokenizer; that it holds for these texts is seen again here.
    encoder.check([texts[len(raws[0]) % len(texts)][:CHECKED_CHARACTERS]])
    if piece.stream.held_out:
        parts: list[tuple[str | None, str | None]] = [(None, text) for text in texts]
    else:
        parts = [task.split(text, raw) for text, raw in zip(texts, raws, strict=True)]
    for number, side in enumerate(sides):
        kept = [(text, at) for part, at in zip(parts, batch, strict=True) if (text := part[number])]
        if kept:
            chosen = [text for text, _ in kept]
            if task.infill is not None and not number:
                encoded = infilled(encoder, chosen, *task.infill)
            else:
                encoded = encoder(chosen)
            side.add(chosen, encoded, [at for _, at in kept])


def _add_examples(
    piece: Piece, task: Task, sides: list[_Side], batch: list[Document], raws: list[bytes], tally: Tally
) -> None:
    folder, _ = task.encoder
    encoder, reading = sides[0].encoder, piece.stream.reading
    assert reading.format is not None
    templater = templater_of(folder) if reading.format.kind == "chat" else None
    reader = open_reader(folder) if reading.format.reads else None
    kept: list[list[tuple[Parts, Document]]] = [[], []]
    for document, raw in zip(batch, raws, strict=True):
        try:
            parts = parts_of(document.row.example, templater, reader)
        except (TemplateFault, MediaFault) as error:
            fault = BadRow(document.row.number, "not in the template", f"{error} ({template_file(folder)})")
            if isinstance(error, MediaFault):
                fault = BadRow(document.row.number, error.kind, str(error))
            bad_row(fault, piece.inputs[document.part], document.mark(), reading, tally)
            continue
        if parts.is_supervised:
            kept[piece.stream.held_out or task.split.holds_out(raw)].append((parts, document))
        else:
            tally.drop(UNSUPERVISED, document.mark)
    if checked := [text for some in kept for parts, _ in some[:1] for text in parts.texts]:
        encoder.check([text[:CHECKED_CHARACTERS] for text in checked[:3]])
    for side, chosen in zip(sides, kept, strict=True):
        if chosen:
            encoded = encode_parts([parts for parts, _ in chosen], encoder, folder, prompts=templater is None)
            side.add([document.text for _, document in chosen], encoded, [document for _, document in chosen])


def _add_tokens(piece: Piece, task: Task, sides: list[_Side], batch: list[TokenDocument], raws: list[bytes]) -> None:
    encoder = sides[0].encoder
    for number, side in enumerate(sides):
        kept: list[tuple[NDArray[Any], TokenDocument]] = []
        for document, raw in zip(batch, raws, strict=True):
            part = piece.inputs[document.part]
            assert isinstance(part, TokensInput)
            check_ids(document.ids, encoder.vocab_size, part, document.number)
            if task.split.tail and not piece.stream.held_out:
                at = task.split.cut(len(document.ids))
                ids = document.ids[at:] if number else document.ids[:at]
            else:
                held_out = piece.stream.held_out or task.split.holds_out(raw)
                ids = document.ids if held_out == bool(number) else document.ids[:0]
            if len(ids):
                kept.append((ids, document))
        if kept:
            arrays = [ids for ids, _ in kept]
            sizes = np.array([*map(_utf8_sizer(task.encoder[0]), arrays)], dtype=np.int64)
            encoded = encoder.joined(arrays, np.ones(len(arrays), dtype=np.int64), sizes)
            side.add([""] * len(kept), encoded, [document for _, document in kept])


def _documents(
    piece: Piece, task: Task, left: int | None, tally: Tally, on_bytes: OnBytes
) -> Iterator[Document | TokenDocument]:
    """The documents of a piece, without those that are repetitions where these are left out."""
    found = _read(piece, task, left, tally, on_bytes)
    if task.repeated is None:
        yield from found
        return
    repeated: NDArray[np.bool_] = np.load(task.repeated / f"{piece.name}.npy")
    for document, again in zip(found, repeated.tolist(), strict=True):
        if again:
            tally.drop("duplicate", document.mark)
        else:
            yield document


def _read(
    piece: Piece, task: Task, left: int | None, tally: Tally, on_bytes: OnBytes
) -> Iterator[Document | TokenDocument]:
    if not isinstance(piece.inputs[0], TokensInput):
        yield from read_documents(piece.inputs, piece.stream.reading, limit=left, tally=tally, on_bytes=on_bytes)
        return
    specials = encoder_of(*task.encoder).specials
    done = read = 0
    for index, part in enumerate(piece.inputs):
        assert isinstance(part, TokensInput)
        for number, ids in enumerate(read_tokens(part, specials), start=1):
            document = TokenDocument(ids, index, number)
            if not len(ids):
                tally.drop("empty", document.mark)
                continue
            if read == left:
                return
            read += 1
            yield document
        done += size_of(part)
        on_bytes(done)


def _length(document: Document | TokenDocument) -> int:
    return len(document.ids) if isinstance(document, TokenDocument) else len(document.text)


def _save_digests(folder: Path, digests: bytearray) -> None:
    np.save(folder / "digests.npy", np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES))


@functools.lru_cache(maxsize=1)
def _utf8_sizer(tokenizer: Path) -> Callable[[NDArray[Any]], int]:
    """How many bytes of text ids stand for; the tokenizer is read once a process."""
    sizes = token_bytes(tokenizer)
    if sizes is not None:
        return lambda ids: int(sizes[ids].sum())
    loaded = load_fast(tokenizer)
    return lambda ids: utf8_size(loaded.decode(ids.tolist(), skip_special_tokens=False))


@functools.lru_cache(maxsize=1)
def encoder_of(folder: Path, fast: bool) -> Encoder:
    """The encoder of a tokenizer's folder, made once a process."""
    return make_encoder(folder, fast=fast)
