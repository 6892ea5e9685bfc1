"""The first tokens of a corpus as the pieces of text that they stand for, each with its nats.

A character that is spread over several tokens (bytes of a tokenizer) is one piece with the nats of all of them: none of
them alone is anything to look at. Two models are compared on the pieces that end where both tokenizers end a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from tokenizers import Tokenizer

from gptcli.evaluation.curves import ScoredText
from gptcli.generation.stream import INCOMPLETE, TextStream


@dataclass(frozen=True)
class Piece:
    """A piece of text.

    Attributes:
        text: what it reads.
        nats: of each of its tokens.
        guess: the text of the likeliest token in the place of the first.
        confidence: the probability of that one.
        guessed: whether the only token is the likeliest one.
    """

    text: str
    nats: tuple[float, ...]
    guess: str
    confidence: float
    guessed: bool

    @property
    def total(self) -> float:
        """The nats of all its tokens."""
        return sum(self.nats)


@dataclass(frozen=True)
class Change:
    """A piece of text of two models: the nats of the first and those of the other."""

    text: str
    before: float
    after: float


def pieces(text: ScoredText, tokenizer: Tokenizer, most: int | None = None) -> list[list[Piece]]:
    """The pieces of each document, of at most so many tokens."""
    found: list[list[Piece]] = []
    count = len(text.ids) if most is None else min(most, len(text.ids))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    def piece(written: str, begin: int, end: int) -> Piece:
        best = int(text.best[begin])
        guess = decode([best])
        if not guess or INCOMPLETE in guess:  # a part of a character has but a name
            guess = tokenizer.id_to_token(best) or f"token {best}"
        nats = tuple(float(value) for value in text.nats[begin:end])
        alone = end == begin + 1 and best == int(text.ids[begin])
        return Piece(written, nats, guess, float(text.confidence[begin]), alone)

    for _, group in groupby(range(count), key=lambda number: int(text.documents[number])):
        numbers = list(group)
        stream, begin, document = TextStream(decode), numbers[0], []
        for number in numbers:
            if written := stream.push(int(text.ids[number])):
                document.append(piece(written, begin, number + 1))
                begin = number + 1
        # What is left of the last document is a character that was cut in two, and no text.
        if begin <= numbers[-1] and numbers[-1] + 1 < len(text.ids):
            document.append(piece(stream.finish(), begin, numbers[-1] + 1))
        found.append(document)
    return found


def changes(model: list[list[Piece]], baseline: list[list[Piece]]) -> list[list[Change]] | None:
    """What a model makes of the text beside the first one, piece by piece, as far as there are nats of both.

    None where the tokenizers do not give the same text back. White space in front of a document, which some drop, is no
    difference.
    """
    found = []
    for ours, theirs in zip(model, baseline, strict=False):
        mine, base = ("".join(piece.text for piece in each) for each in (ours, theirs))
        text = base.lstrip(" ")
        short = min(len(mine.lstrip(" ")), len(text))
        if mine.lstrip(" ")[:short] != text[:short]:
            return None
        after, before = _sums(ours, len(mine) - len(mine.lstrip(" "))), _sums(theirs, len(base) - len(text))
        ends = sorted(end for end in after.keys() & before.keys() if end > 0)
        document, start, last = [], 0, (0.0, 0.0)
        for end in ends:
            sums = before[end], after[end]
            document.append(Change(text[start:end], sums[0] - last[0], sums[1] - last[1]))
            start, last = end, sums
        found.append(document)
    return found


def _sums(document: list[Piece], left_out: int) -> dict[int, float]:
    """The nats of all text up to the end of each piece, by the characters up to there but those in front."""
    sums, end, total = {}, -left_out, 0.0
    for piece in document:
        end, total = end + len(piece.text), total + piece.total
        sums[end] = total
    return sums
