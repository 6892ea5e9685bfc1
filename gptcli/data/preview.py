"""The first documents of a recipe as tokens, for people who want to see what the model will see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.chat_template import template_file
from gptcli.data.encode import Encoded, Encoder, make_encoder
from gptcli.data.job import Job, Part
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium
from gptcli.data.media.reader import MediaReader, open_reader
from gptcli.data.readers import shown as shown_path
from gptcli.data.sources import Document, place, read_documents
from gptcli.data.supervise import encode_parts, parts_of, templater_of
from gptcli.data.templater import TemplateFault, Templater
from gptcli.data.tokenizer import bytes_of, load_fast
from gptcli.data.tokens import TokensInput, read_tokens
from gptcli.errors import DataError

SHOWN_TOKENS = 200
SHOWN_OF_ROWS = 1000  # what is trained on comes last


@dataclass(frozen=True)
class Shown:
    """A document as tokens: (id, text, whether it is a special token) of the first ones, and how many it has.

    Bytes that are only a part of a character are written as <0xE4>. `supervised`: which of them are trained on, where
    the format says it. `media`: the document's images and sounds.
    """

    document: str
    tokens: list[tuple[int, str, bool]]
    total: int
    supervised: list[bool] | None = None
    media: Sequence[Medium] = ()


def preview(job: Job, tokenizer: Path, count: int) -> list[Shown]:
    """The first `count` documents, one of each training source in turn."""
    encoder = make_encoder(tokenizer)
    loaded = load_fast(tokenizer)
    specials = {number for number, token in loaded.get_added_tokens_decoder().items() if token.special}
    shown = []
    templater = templater_of(tokenizer) if job.data.format == "chat" else None
    reader = open_reader(tokenizer) if job.reads_media else None
    for at, document in islice(_in_turn(job, encoder), count):
        supervised, most = None, SHOWN_TOKENS
        media: Sequence[Sequence[Medium]] = [()]
        if isinstance(document, np.ndarray):
            ids = document
        elif document.row.example is None:
            ids = encoder([document.text]).tokens
        else:
            encoded = _encoded(document.row.example, templater, reader, encoder, tokenizer, at)
            assert encoded.supervised is not None
            ids, most = encoded.tokens, SHOWN_OF_ROWS
            media = encoded.media or [()]
            supervised = encoded.supervised[:most].astype(bool).tolist()
        first = ids[:most].tolist()
        tokens = [(number, _text(loaded.id_to_token(number)), number in specials) for number in first]
        shown.append(Shown(at, tokens, len(ids), supervised, media[0]))
    return shown


def _encoded(
    example: Any, templater: Templater | None, reader: MediaReader | None, encoder: Encoder, tokenizer: Path, at: str
) -> Encoded:
    try:
        parts = parts_of(example, templater, reader)
    except MediaFault as error:
        raise DataError(str(error), where=at) from None
    except TemplateFault as error:
        raise DataError(f"{error} ({template_file(tokenizer)})", where=at) from None
    return encode_parts([parts], encoder, tokenizer, prompts=templater is None)


def _in_turn(job: Job, encoder: Encoder) -> Iterator[tuple[str, Document | NDArray[Any]]]:
    readers = [_documents(part, encoder) for part in job.train]
    while readers:
        for reader in list(readers):
            if (document := next(reader, None)) is None:
                readers.remove(reader)
            else:
                yield document


def _documents(part: Part, encoder: Encoder) -> Iterator[tuple[str, Document | NDArray[Any]]]:
    """(where it stands, document or ids) of a source's documents."""
    tokens = [each for each in part.inputs if isinstance(each, TokensInput)]
    for each in tokens:
        for number, ids in enumerate(read_tokens(each, encoder.specials), start=1):
            if len(ids):
                yield f"{shown_path(each.path)}:{number}", ids
    if not tokens:
        reading = part.stream.reading
        for document in read_documents(part.inputs, reading, limit=part.stream.limit):
            yield place(part.inputs[document.part], document.mark(), reading.layout), document


def _text(entry: str | None) -> str:
    if entry is None:
        return "?"
    raw = bytes_of(entry)
    if raw is None:
        return entry
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)
