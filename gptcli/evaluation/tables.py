"""The figures of evaluations as texts, for tables on the screen, in Markdown and on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.evaluation.intervals import Ratio
    from gptcli.evaluation.scores import Scores

SOURCES = ["source", "loss", "95%", "bits/byte", "bytes", "documents"]


def source_rows(evaluation: Evaluation) -> list[list[str]]:
    """The figures of each source, by the columns `SOURCES`."""
    return [_row(name, scores) for name, scores in evaluation.scores.by_source()]


def _row(name: str, scores: Scores) -> list[str]:
    result = scores.result
    loss, per_byte = f"{result.loss:.4f}", with_interval(result.bits_per_byte, None)
    return [name, loss, ends(scores.loss_interval), per_byte, f"{result.bytes:,}", f"{result.documents:,}"]


def figures(scores: Scores) -> dict[str, str]:
    """All figures of a model by name."""
    result = scores.result
    perplexity = result.perplexity
    return {
        "loss": with_interval(result.loss, scores.loss_interval),
        "perplexity": f"{perplexity:.4g}" if perplexity >= 1e4 else f"{perplexity:.3f}",
        "bits/byte": with_interval(result.bits_per_byte, scores.byte_interval),
        "bits/character": with_interval(scores.bits_per_character, None),
        "tokens": f"{result.tokens:,}",
        "bytes": "-" if result.bytes is None else f"{result.bytes:,}",
        "characters": "-" if scores.total_characters is None else f"{scores.total_characters:,}",
        "documents": f"{result.documents:,}",
    }


def with_interval(value: float | None, found: Ratio | None) -> str:
    """A figure with its interval, where it has one."""
    if value is None:
        return "-"
    return f"{value:.4f}" if found is None else f"{value:.4f} (95%: {ends(found)})"


def ends(found: Ratio | None) -> str:
    """The ends of an interval."""
    return "-" if found is None else f"{found.low:.4f} to {found.high:.4f}"


def change(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}" if not 0 < abs(value) < 1e-3 else f"{value:+.1e}"
