"""The first documents of a recipe as tokens, for people who want to see what the model will see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gptcli.data.encode import make_encoder
from gptcli.data.job import Job
from gptcli.data.sources import place, read_documents
from gptcli.data.tokenizer import bytes_of, load_fast

SHOWN_TOKENS = 200


@dataclass(frozen=True)
class Shown:
    """A document as tokens: (id, text, whether it is a special token) of the first `SHOWN_TOKENS`, and how many it has.

    Bytes that are only a part of a character are written as <0xE4>.
    """

    document: str
    tokens: list[tuple[int, str, bool]]
    total: int


def preview(job: Job, tokenizer: Path, count: int) -> list[Shown]:
    """The first `count` documents, one of each training source in turn."""
    encoder = make_encoder(tokenizer)
    loaded = load_fast(tokenizer)
    specials = {number for number, token in loaded.get_added_tokens_decoder().items() if token.special}
    shown = []
    for at, text in islice(_in_turn(job), count):
        ids = encoder([text]).tokens
        tokens = [
            (number, _text(loaded.id_to_token(number)), number in specials) for number in ids[:SHOWN_TOKENS].tolist()
        ]
        shown.append(Shown(at, tokens, len(ids)))
    return shown


def _in_turn(job: Job) -> Iterator[tuple[str, str]]:
    readers = [(part, read_documents(part.inputs, part.stream.reading, limit=part.stream.limit)) for part in job.train]
    while readers:
        for reader in list(readers):
            part, documents = reader
            document = next(documents, None)
            if document is None:
                readers.remove(reader)
            else:
                layout = part.stream.reading.layout
                yield place(part.inputs[document.part], document.mark(), layout), document.text


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
