"""What will be trained on, in numbers: counted while the shards are written, stored beside them, printed as lines.

Lengths are counted exactly in a histogram up to 65,535 tokens; of longer documents each length is kept, so memory is at
most a number for every 65,536 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.dataset import row_count
from gptcli.data.encode import Encoded
from gptcli.data.shards import Shards
from gptcli.data.sources import Tally

EXACT_LENGTHS = 1 << 16
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Lengths:
    """The distribution of document lengths, in tokens."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(EXACT_LENGTHS, dtype=np.int64))
    longer: list[int] = field(default_factory=list)

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count documents."""
        self.counts += np.bincount(lengths[lengths < EXACT_LENGTHS], minlength=EXACT_LENGTHS)
        self.longer += lengths[lengths >= EXACT_LENGTHS].tolist()

    def quantiles(self) -> dict[str, int]:
        """The length of the document at each of `QUANTILES`, documents ordered by length (nearest rank, from below)."""
        ends = np.cumsum(self.counts)
        exact = int(ends[-1])
        total = exact + len(self.longer)
        if not total:
            return {}
        longer = sorted(self.longer)
        ranks = {name: int(share * (total - 1)) for name, share in QUANTILES.items()}
        return {
            name: int(np.searchsorted(ends, rank, side="right")) if rank < exact else longer[rank - exact]
            for name, rank in ranks.items()
        }


@dataclass
class Counts:
    """What is counted of one source on one side, besides what the shards' manifest has."""

    lengths: Lengths = field(default_factory=Lengths)
    with_nul: int = 0
    specials_in_text: int = 0

    def add(self, texts: Sequence[str], encoded: Encoded, specials: set[int], expected: int) -> None:
        """Count a batch; `expected`: the special tokens that were put at the documents' ends."""
        self.lengths.add(encoded.lengths)
        self.with_nul += sum("\0" in text for text in texts)
        found = sum(int(np.count_nonzero(encoded.tokens == special)) for special in specials)
        self.specials_in_text += found - expected


def make_report(
    train: Shards, validation: Shards | None, sides: list[list[Counts]], tallies: list[Tally]
) -> dict[str, Any]:
    """The part of the report that does not depend on `sequence_length`: what is stored as report.json."""
    dropped = sum((tally.dropped for tally in tallies), Counter[str]())
    return {
        "tokenizer": {"fingerprint": train.manifest["tokenizer"], "vocab_size": train.vocab_size},
        "train": _side(train, sides[0]),
        "validation": _side(validation, sides[1]) if validation is not None else None,
        "dropped": dict(sorted(dropped.items())),
        "dropped_examples": [example for tally in tallies for example in tally.examples][:10],
    }


def with_rows(report: dict[str, Any], sequence_length: int) -> dict[str, Any]:
    """The report with the rows of this `sequence_length`, and the tokens at the sources' ends that fill none."""
    rows = [row_count(source["tokens"], sequence_length) for source in report["train"]["sources"]]
    used = sum(count * sequence_length + 1 for count in rows if count)
    return {
        **report,
        "sequence_length": sequence_length,
        "rows": sum(rows),
        "rows_by_source": rows,
        "unused_tail_tokens": report["train"]["tokens"] - used,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report of `with_rows` as lines to print."""
    lines = [_side_line("training", report["train"])]
    if len(report["train"]["sources"]) > 1:
        lines += [_side_line(f"  {source['name']}", source) for source in report["train"]["sources"]]
    validation = report["validation"]
    lines.append(_side_line("validation", validation) if validation else "validation: none is held out")
    lengths = report["train"]["document_tokens"]
    lines.append("document lengths in tokens: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()))
    tail = report["unused_tail_tokens"]
    lines.append(
        f"rows of {report['sequence_length']:,} tokens: {report['rows']:,} "
        f"({tail:,} tokens at the end of a source fill none)"
    )
    if report["dropped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        lines.append(f"dropped: {reasons}; first: {report['dropped_examples'][0]}")
    for key, text in (
        ("with_nul", "documents hold NUL characters"),
        ("specials_in_text", "special tokens stand in texts"),
    ):
        if count := report["train"][key]:
            lines.append(f"note: {count:,} {text} (kept)")
    return lines


def _side(shards: Shards, counts: list[Counts]) -> dict[str, Any]:
    every = Lengths()
    for count in counts:
        every.counts += count.lengths.counts
        every.longer += count.lengths.longer
    sources = [
        {"name": source["name"], **_numbers(source, count.lengths, [count])}
        for source, count in zip(shards.manifest["sources"], counts, strict=True)
    ]
    return {**_numbers(shards.manifest, every, counts), "sources": sources}


def _numbers(manifest: dict[str, Any], lengths: Lengths, counts: list[Counts]) -> dict[str, Any]:
    tokens = manifest["tokens"]
    return {
        "documents": manifest["documents"],
        "bytes": manifest["bytes"],
        "tokens": tokens,
        "bytes_per_token": round(manifest["bytes"] / tokens, 4) if tokens else None,
        "document_tokens": lengths.quantiles(),
        "with_nul": sum(count.with_nul for count in counts),
        "specials_in_text": sum(count.specials_in_text for count in counts),
    }


def _side_line(name: str, numbers: dict[str, Any]) -> str:
    ratio = f", {numbers['bytes_per_token']:.2f} bytes a token" if numbers["tokens"] else ""
    return (
        f"{name}: {numbers['documents']:,} documents, {numbers['tokens']:,} tokens, {numbers['bytes']:,} bytes{ratio}"
    )
