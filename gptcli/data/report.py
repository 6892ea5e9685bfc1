"""What will be trained on, in numbers: counted while the shards are written, stored beside them, printed as lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gptcli.data.counts import Counts, Notable
from gptcli.data.dataset import proportions
from gptcli.data.media.counted import media_lines, media_numbers
from gptcli.data.packed import padding
from gptcli.data.row_index import left_out_text
from gptcli.data.writer import MEDIA, SUPERVISED

if TYPE_CHECKING:
    from gptcli.data.packed import PackedRows


def make_report(
    manifests: dict[str, dict[str, Any]], counts: dict[str, list[Counts]], place: Callable[[Sequence[Any]], str]
) -> dict[str, Any]:
    """The part of the report that does not depend on `sequence_length`: what is stored as report.json.

    `counts` are those of each side's sources; `place` names the document that a mark of them stands for.
    """
    train = manifests["train"]
    sides = {side: _side(manifests[side], counts[side], place) for side in manifests}
    return {
        "tokenizer": {"fingerprint": train["tokenizer"], "vocab_size": train["vocab_size"]},
        "train": sides["train"],
        "validation": sides.get("validation"),
    }


def with_rows(
    report: dict[str, Any],
    sequence_length: int,
    weights: Sequence[float] | None = None,
    *,
    where: str | None = None,
    packed: PackedRows | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """The report with what depends on `sequence_length`, on packing and on the sources' `weights`.

    Adds the rows, the tokens at the sources' ends that fill none, the share of padding, what was left out of rows of
    documents, and to each source of train its `weight` (its share of the rows) and its `epochs` (how often it is gone
    through in one epoch of the data).

    Args:
        report: what is stored.
        sequence_length: inputs of a row.
        weights: of the sources.
        where: the place of the length, for errors.
        packed: the rows, where they are of whole documents.
        batch: rows of a step; those of `none` are filled up to the longest of so many.

    Raises:
        DataError: no source has tokens for one row, or one with a weight has none.
    """
    sources = report["train"]["sources"]
    about: dict[str, Any]
    if packed is None:
        mixed = proportions(
            [(source["name"], source["tokens"]) for source in sources], sequence_length, weights, where=where
        )
        used = sum(count * sequence_length + 1 for count in mixed.rows if count)
        about = {
            "packing": "concat",
            "row_tokens": sum(mixed.rows) * sequence_length,
            "labels": sum(mixed.rows) * sequence_length,
            "unused_tail_tokens": report["train"]["tokens"] - used,
            "padding": 0.0,  # rows of one stream are full
            "left_out": {},
        }
    else:
        mixed = packed.proportions
        about = {
            "packing": packed.index.packing.packing,
            "row_tokens": packed.index.tokens,
            "labels": packed.index.labels,
            "unused_tail_tokens": 0,
            "padding": round(padding(packed, batch), 6),
            "left_out": packed.index.left_out,
        }
    told = [
        {**source, "weight": share, "epochs": round(epochs, 4)}
        for source, share, epochs in zip(sources, mixed.shares, mixed.epochs(sum(mixed.rows)), strict=True)
    ]
    return {
        **report,
        "train": {**report["train"], "sources": told},
        "sequence_length": sequence_length,
        "rows": sum(mixed.rows),
        "rows_by_source": list(mixed.rows),
        **about,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report of `with_rows` as lines to print."""
    lines = [_side_line("training", report["train"])]
    if len(report["train"]["sources"]) > 1:
        for source in report["train"]["sources"]:
            lines.append(_side_line(f"  {source['name']}", source))
            lines.append(f"    {mixing_text(source['weight'], source['epochs'])} in each epoch of the data")
    lines += _media_lines(report, "train")
    validation = report["validation"]
    lines.append(_side_line("validation", validation) if validation else "validation: none is held out")
    lines += _media_lines(report, "validation")
    lengths = report["train"]["document_tokens"]
    lines.append("document lengths in tokens: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()))
    lines += _row_lines(report)
    if report["dropped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        lines.append(f"dropped: {reasons}; first: {report['dropped_examples'][0]}")
    if report["duplicates"]:
        kept = "" if report["dropped"].get("duplicate") else " (kept; data.deduplicate: exact leaves them out)"
        lines.append(f"repeated documents: {report['duplicates']:,}{kept}")
    for name, unit in (("longest", "tokens"), ("strangest", "tokens_per_byte")):
        if found := report["train"][name]:
            shown = ", ".join(f"{each['document']} ({each[unit]:,g})" for each in found)
            lines.append(f"{name} documents ({unit.replace('_', ' ')}): {shown}")
    for key, text in (
        ("with_nul", "documents hold NUL characters"),
        ("specials_in_text", "special tokens stand in texts"),
    ):
        if count := report["train"][key]:
            lines.append(f"note: {count:,} {text} (kept)")
    return lines


def _media_lines(report: dict[str, Any], side: str) -> list[str]:
    numbers = report[side]
    if not numbers or "media" not in numbers:
        return []
    length = report["sequence_length"] if side == "train" else None
    return [f"  {line}" for line in media_lines(numbers["media"], numbers["documents"], length)]


def _row_lines(report: dict[str, Any]) -> list[str]:
    length, rows, share = f"{report['sequence_length']:,}", report["rows"], f"{100 * report['padding']:.2g}%"
    if report["packing"] == "concat":
        tail = report["unused_tail_tokens"]
        return [f"rows of {length} tokens: {rows:,} ({tail:,} tokens at the end of a source fill none)"]
    if report["packing"] == "isolated":
        lines = [f"rows of {length} tokens: {rows:,}, several documents in each ({share} of them padding)"]
    else:
        mean = report["row_tokens"] / rows
        lines = [
            f"rows of at most {length} tokens: {rows:,}, a document each, {mean:,.1f} tokens on average "
            f"({share} padding where a step is one batch)"
        ]
    if left_out := left_out_text(report["left_out"]):
        lines.append(f"data.overlong: {left_out}")
    return lines


def mixing_text(share: float, epochs: float) -> str:
    """A source's share of the rows and its epochs, for people."""
    return f"{100 * share:.3g}% of the rows, {epochs:.2f} epochs"


def _side(manifest: dict[str, Any], counts: list[Counts], place: Callable[[Sequence[Any]], str]) -> dict[str, Any]:
    every = Counts()
    for count in counts:
        every.merge(count)
    sources = [
        {"name": source["name"], **_numbers(source, count)}
        for source, count in zip(manifest["sources"], counts, strict=True)
    ]
    return {
        **_numbers(manifest, every),
        "longest": _notable(every.longest, "tokens", place),
        "strangest": _notable(every.strangest, "tokens_per_byte", place),
        "sources": sources,
    }


def _numbers(manifest: dict[str, Any], counts: Counts) -> dict[str, Any]:
    tokens = manifest["tokens"]
    of_text = tokens - sum(each.tokens for each in counts.counted_media.values())
    return {
        "documents": manifest["documents"],
        "bytes": manifest["bytes"],
        "tokens": tokens,
        **_supervision(manifest),
        "bytes_per_token": round(manifest["bytes"] / of_text, 4) if of_text else None,
        "document_tokens": counts.quantiles(),
        "with_nul": counts.with_nul,
        "specials_in_text": counts.specials_in_text,
        **({"media": media_numbers(counts.counted_media, tokens)} if MEDIA in manifest else {}),
    }


def _supervision(manifest: dict[str, Any]) -> dict[str, Any]:
    """How many tokens are trained on, where the data says it, and their share of all."""
    if SUPERVISED not in manifest:
        return {}
    count, tokens = manifest[SUPERVISED], manifest["tokens"]
    return {"supervised_tokens": count, "supervised_share": round(count / tokens, 4) if tokens else None}


def _notable(kept: list[Notable], unit: str, place: Callable[[Sequence[Any]], str]) -> list[dict[str, Any]]:
    best = sorted((entry for entry in kept if entry[0] > 0), reverse=True)
    return [{unit: round(score, 3), "document": place(mark), "begins": text} for score, mark, text in best]


def _side_line(name: str, numbers: dict[str, Any]) -> str:
    ratio = f", {numbers['bytes_per_token']:.2f} bytes a token" if numbers["tokens"] else ""
    ratio += " of text" if ratio and numbers.get("media") else ""
    supervised = ""
    if numbers.get("supervised_share") is not None:
        share = 100 * numbers["supervised_share"]
        supervised = f" ({numbers['supervised_tokens']:,} supervised, {share:.1f}%)"
    what = "rows" if "supervised_tokens" in numbers else "documents"
    return (
        f"{name}: {numbers['documents']:,} {what}, {numbers['tokens']:,} tokens{supervised}, "
        f"{numbers['bytes']:,} bytes{ratio}"
    )
