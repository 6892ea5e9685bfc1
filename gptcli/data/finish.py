"""From the pieces' folders to the prepared data: the shards under their final names, two manifests and the report.

The files are linked, not copied (copied where the file system has no links), so a job that is killed here has lost
nothing and does this part again.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcli.data.counts import Counts
from gptcli.data.duplicates import repeated
from gptcli.data.encode import Encoder
from gptcli.data.job import Job
from gptcli.data.media.item import A_NOUN
from gptcli.data.pieces import Piece
from gptcli.data.reading.row import Mark
from gptcli.data.report import make_report
from gptcli.data.shards import write_manifest
from gptcli.data.sources import place
from gptcli.data.supervise import UNSUPERVISED
from gptcli.data.work import RESULT
from gptcli.data.writer import MEDIA, SUPERVISED
from gptcli.errors import DataError
from gptcli.files import read_json, write_json

EXAMPLES = 10
COUNTED = ("documents", "bytes", "tokens", SUPERVISED, MEDIA)


def finish(job: Job, pieces: Sequence[Piece], work: Path, target: Path, encoder: Encoder, tokenizer: str) -> None:
    """Write both sides and report.json into `target` from the results under `work`; `tokenizer` is its fingerprint.

    Raises `DataError` when a side that the recipe asks for has no document.
    """
    dropped: Counter[str] = Counter()
    examples: list[tuple[list[Any], str]] = []
    digests: list[Path] = []
    manifests: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, list[Counts]] = {}
    for side in job.sides:
        parts = job.validation if side == "validation" and job.validation else job.train
        none = dict.fromkeys(COUNTED[: 3 if job.data.format == "text" else 5 if job.reads_media else 4], 0)
        manifests[side] = [{"name": part.name, **none, "shards": []} for part in parts]
        counts[side] = [Counts() for _ in parts]
        (target / side).mkdir()
    for piece in pieces:
        folder = work / piece.name
        if not folder.is_dir():  # behind the limit of its source
            continue
        result = read_json(folder / RESULT)
        dropped.update(result["dropped"])
        examples += [([piece.index, *mark], reason) for mark, reason in result["examples"]][: EXAMPLES - len(examples)]
        digests.append(folder / "digests.npy")
        for side in job.sides:
            if not job.validation or piece.stream.held_out == (side == "validation"):
                _add(manifests[side][piece.source], result["sides"][side], piece, folder, target / side)
                counts[side][piece.source].merge(Counts.from_json(result["sides"][side], piece.index))
    documents = {side: sum(source["documents"] for source in manifests[side]) for side in job.sides}
    check_sides(job, documents["train"], documents.get("validation"), dropped)
    check_media(job, [each for side in job.sides for each in counts[side]], dropped)
    about = {"tokenizer": tokenizer, "vocab_size": encoder.vocab_size, "specials": vars(encoder.specials)}
    written = {
        side: write_manifest(target / side, manifests[side], encoder.dtype, **about, recipe=job.spec)
        for side in job.sides
    }
    by_index = {piece.index: piece for piece in pieces}

    def named(mark: Sequence[Any]) -> str:
        return _place(by_index[mark[0]], mark[1:])

    again = sum(int(found.sum()) for found in repeated(digests))
    report = make_report(written, counts, named)
    write_json(
        target / "report.json",
        {
            **report,
            "duplicates": again + dropped["duplicate"],
            "dropped": dict(sorted(dropped.items())),
            "dropped_examples": [f"{named(mark)}: {reason}" for mark, reason in examples],
        },
    )


def check_sides(job: Job, train: int, validation: int | None, dropped: Counter[str]) -> None:
    """Raise `DataError` when a side that the recipe asks for has no document; None: the side is not looked at."""
    why = _left_out(dropped)
    where = job.train[0].where
    rule = job.data.validation
    if train + (validation or 0) == 0 or (train == 0 and job.validation):
        names = ", ".join(part.name for part in job.train)
        remedy = "Check that the files hold text, and the keys data.documents and text: (the column)."
        if dropped[UNSUPERVISED]:
            remedy = "No row has a turn of the assistant that is trained on: check data.messages, and train: false."
        elif job.data.format != "text":
            remedy = "Check the rows that were left out, and the columns that the recipe names."
        raise DataError(f"data.train has no documents: {names}{why}", where=where, remedy=remedy)
    if rule == 0 or validation is None:
        return
    if job.validation and validation == 0:
        raise DataError(
            f"data.validation has no documents{why}", where=job.validation[0].where, remedy="Give a file with text."
        )
    if train == 0 or validation == 0:
        side = "training" if train == 0 else "validation"
        share = f"a share of {rule:.4g}" if isinstance(rule, int | float) else "tail"
        count = train if train else validation
        raise DataError(
            f"data.validation: {share} of {count:,} document{'s' if count != 1 else ''} leaves none for {side}",
            where=job.validation_where,
            remedy="Hold out the end of each text instead: data.validation: {tail: 10%}\n"
            "(or a larger share, or smaller documents by data.documents: line | blank-line, or 0 for none)."
            if job.data.format == "text"
            else "Hold out a larger share, or a file of its own: data.validation: {path: FILE}; or 0 for none.",
        )


def check_media(job: Job, counts: Sequence[Counts], dropped: Counter[str]) -> None:
    """Raise `DataError` when the recipe names columns of media, and not one row has one in them.

    A column that is null is a row without a picture: of all rows it is a misspelt key, and nobody would see anything.
    """
    for kind, columns in job.data.media:
        if not any(kind in each.counted_media for each in counts):
            named = " and ".join(map(repr, columns))
            raise DataError(
                f"data.{kind}s: no row has {A_NOUN[kind]} in column {named}{_left_out(dropped)}",
                where=job.train[0].where,
                remedy=f"Check what the rows have there (gptcli tokenize RECIPE --preview 3), or remove data.{kind}s.",
            )


def _left_out(dropped: Counter[str]) -> str:
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    return f" (dropped: {left_out})" if left_out else ""


def _add(source: dict[str, Any], result: dict[str, Any], piece: Piece, folder: Path, target: Path) -> None:
    """Count a piece's part of a source, and link its files under the numbers that follow."""
    for key in source.keys() & COUNTED:
        source[key] += result[key]
    for shard in result["shards"]:
        stem = f"source-{piece.source:03}-shard-{len(source['shards']):05}"
        files = {}
        for part, entry in shard["files"].items():
            name = f"{stem}.{part}.npy"
            _link(folder / entry["name"], target / name)
            files[part] = {**entry, "name": name}
        source["shards"].append({**shard, "files": files})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _place(piece: Piece, mark: Sequence[Any]) -> str:
    found = Mark(*mark)
    return place(piece.inputs[found.part], found, piece.stream.reading.layout)
