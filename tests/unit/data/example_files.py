"""Files of every format, compression and archive for the tests of the readers, and short ways to read them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from gptcli.data.readers import (
    BadRow,
    Layout,
    Row,
    read_rows,
    split_suffix,
)

TEXTS = ['one, "two"\nthree', "中文 文本", "emoji 🙂\0nul", "x" * 700_000]
LINE, BLANK = Layout("line"), Layout("blank-line")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda raw: gzip.compress(raw[:7]) + gzip.compress(raw[7:]),
    ".zst": lambda raw: zstandard.compress(raw[:7]) + zstandard.compress(raw[7:]),
    ".xz": lambda raw: lzma.compress(raw[:7]) + lzma.compress(raw[7:]),
    ".bz2": lambda raw: bz2.compress(raw[:7]) + bz2.compress(raw[7:]),
}

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".TAR.BZ2")
FORMATS = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
LONG = b"".join(b"line %d of text\n" % number for number in range(40_000))


def written(suffix: str, texts: list[str] = TEXTS) -> bytes:
    """The texts as a file of one kind."""
    buffer = io.BytesIO()
    table = pa.table({"n": [1] * len(texts), "text": texts})
    if suffix == ".json":
        return json.dumps([{"n": 1, "text": text} for text in texts], indent=1).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()
    if suffix == ".csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows([["n", "text"], *(["1", text] for text in texts)])
        return out.getvalue().encode()
    if suffix == ".tsv":
        return "".join(f"{n}\t{text}\n" for n, text in [("n", "text"), *(("1", flat(t)) for t in texts)]).encode()
    if suffix == ".parquet":
        pq.write_table(table, buffer, row_group_size=2)
        return buffer.getvalue()
    if suffix == ".arrow":
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return buffer.getvalue()
    return "\n\n".join(texts).encode()


def flat(text: str) -> str:
    return text.replace("\n", " ")


def read(path: Path, layout: Layout = BLANK, **options: Any) -> list[Row | BadRow]:
    return list(read_rows(path, layout, **options))


def texts_of(rows: list[Row | BadRow]) -> list[str]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.text for row in rows if isinstance(row, Row)]


def bad(rows: list[Row | BadRow]) -> list[tuple[int, str]]:
    return [(row.number, row.kind) for row in rows if isinstance(row, BadRow)]


def put(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def archive(folder: Path, suffix: str, members: dict[str, bytes]) -> Path:
    path = folder / f"archive{suffix}"
    if suffix == ".zip":
        return zipped(path, members)
    return put(path, COMPRESS[split_suffix(path.name)[1]](tarred(members)))
