"""A text whose pieces are coloured by their nats, as HTML: what a model finds hard, or finds harder than another does.

The scale is fixed, so that pages can be laid side by side. Hues are blue and orange, which colour-blind people can
tell, and a colour is never all there is: the exact value is the title of each piece, and the hardest are in a table.
"""

from __future__ import annotations

import heapq
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from gptcli.evaluation.surprise import Change, Piece
from gptcli.reporting import one_line, visible
from gptcli.runs.html import steady, table

# Where the colours of nats begin (probabilities of 90%, 61%, 37%, 14%, 5%, 1.8%, 0.25%, 0.03%), and of a difference.
NATS = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
DIFFERENCES = (0.1, 0.5, 1.0, 2.0, 4.0)
HARDEST = 20
BEFORE = 48
MAX_SHOWN = 60


def heat_map(documents: Sequence[Sequence[Piece]]) -> str:
    """The text, coloured by nats from white to orange."""
    return _text([_piece(each) for each in document] for document in documents)


def heat_legend() -> str:
    """What the colours of nats are."""
    return _legend([(f"h{step}", name) for step, name in enumerate(_ranges(NATS, "{:g}"))], "nats")


def change_map(documents: Sequence[Sequence[Change]]) -> str:
    """The text, coloured by how many nats more (orange) or fewer (blue) the model needs than the first one."""
    return _text([_change(each) for each in document] for document in documents)


def change_legend() -> str:
    """What the colours of a difference are."""
    steps = range(len(DIFFERENCES), 0, -1)
    fewer = [(f"d{step}", f"-{DIFFERENCES[step - 1]:g}") for step in steps]
    more = [(f"u{step}", f"+{DIFFERENCES[step - 1]:g}") for step in reversed(steps)]
    return _legend([*fewer, ("u0", "0"), *more], "nats fewer or more, from")


def hardest(documents: Sequence[Sequence[Piece]]) -> str:
    """The pieces with the most nats, with what stands in front of them, as a table."""
    flat = [(piece, document, number) for document in documents for number, piece in enumerate(document)]
    found = heapq.nlargest(HARDEST, (each for each in flat if math.isfinite(each[0].total)), lambda each: each[0].total)
    rows = []
    for piece, document, number in found:
        before = "".join(each.text for each in document[max(0, number - BEFORE) : number])[-BEFORE:]
        guess = f"{_quoted(piece.guess)} {_percent(piece.confidence)}" if len(piece.nats) == 1 else "-"
        rows.append([f"{piece.total:.2f}", _quoted(piece.text), f"… {_shown(before)}" if number else "-", guess])
    return table(["nats", "text", "after", "likeliest"], rows)


def _ranges(edges: Sequence[float], form: str) -> list[str]:
    ends = [form.format(edge) for edge in edges]
    return [f"below {ends[0]}", *(f"{a} to {b}" for a, b in pairwise(ends)), f"{ends[-1]} and more"]


def _legend(steps: Iterable[tuple[str, str]], unit: str) -> str:
    keys = "".join(f'<i class="{style}">{escape(name)}</i>' for style, name in steps)
    return f'<p class="scale"><span>{unit}</span>{keys}</p>'


def _text(documents: Iterable[Iterable[str]]) -> str:
    shown = "".join(f"<p>{''.join(document)}</p>" for document in documents)
    return f'<div class="text" tabindex="0">{shown}</div>'


def _piece(piece: Piece) -> str:
    if not math.isfinite(piece.total):
        return _span("bad", piece.text, "no finite loss")
    if len(piece.nats) > 1:
        title = (
            f"{piece.total:.2f} nats: {len(piece.nats)} tokens of {' + '.join(f'{each:.2f}' for each in piece.nats)}"
        )
    else:
        guess = "the likeliest" if piece.guessed else f"likeliest {_quoted(piece.guess)} {_percent(piece.confidence)}"
        title = f"{piece.total:.2f} nats, {_percent(math.exp(-piece.total))}; {guess}"
    return _span(f"h{bisect_right(NATS, piece.total)}", piece.text, title)


def _change(change: Change) -> str:
    difference = change.after - change.before
    if not math.isfinite(difference):
        return _span("bad", change.text, "no finite loss")
    step = bisect_right(DIFFERENCES, abs(difference))
    title = f"{change.before:.2f} → {change.after:.2f} nats: {difference:+.2f}"
    return _span(f"{'d' if difference < 0 else 'u'}{step}", change.text, title)


def _span(style: str, text: str, title: str) -> str:
    ends = " n" if text.startswith("\n") else ""  # a new line alone is nothing to see
    return f'<i class="{style}{ends}" title="{escape(title)}">{escape(_shown(text))}</i>'


def _shown(text: str) -> str:
    """A text as it can be looked at: what turns the text around it, or is nothing to see by itself, as its code."""
    if text and all(unicodedata.category(character) == "Cf" for character in text):
        return "".join(f"[U+{ord(character):04X}]" for character in text)
    return steady(visible(text))


def _quoted(text: str) -> str:
    shown = one_line(_shown(text))
    return f"“{shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + '…'}”"


def _percent(share: float) -> str:
    return f"{share:.3g}" if share < 1e-3 else f"{share:.1%}"
