"""What is counted of media: of pieces put together what it is of the whole."""

from __future__ import annotations

from pathlib import Path

from gptcli.data.media.counted import MediaCounts, count_media, media_lines, media_numbers
from gptcli.data.media.item import Medium, Modality
from gptcli.data.media.reference import Media


def medium(modality: Modality, extent: tuple[float, ...], tokens: int) -> Medium:
    return Medium(modality, Media("m", Path("m")), "", extent, tokens)


ROWS = [
    [medium("image", (28, 28), 16), medium("image", (60, 40), 40)],
    [],
    [medium("audio", (1.5,), 10), medium("image", (10, 90), 16)],
    [medium("audio", (0.25,), 10)],
]


def test_pieces_put_together_are_the_whole() -> None:
    whole: dict[str, MediaCounts] = {}
    assert count_media(whole, ROWS) == [56, 0, 26, 10]
    together: dict[str, MediaCounts] = {}
    for row in ROWS:
        piece: dict[str, MediaCounts] = {}
        count_media(piece, [row])
        for kind, counts in piece.items():
            together.setdefault(kind, MediaCounts()).add(counts)
    assert together == whole


def test_the_lines_say_how_many_how_large_and_what_they_take() -> None:
    counts: dict[str, MediaCounts] = {}
    count_media(counts, ROWS)
    numbers = media_numbers(counts, 200)
    assert media_lines(numbers, len(ROWS), 64) == [
        "3 images in 2 rows (2 without): 28 x 28 to 60 x 40 pixels, 24 tokens each (at most 40 of a row's 64), "
        "36.0% of all tokens",
        "2 sounds in 2 rows (2 without): 1.8 s in all, 0.25 to 1.5 s each, 10 tokens each (of a row's 64), "
        "10.0% of all tokens",
    ]
    assert media_lines(numbers, len(ROWS), None)[1].endswith("1.5 s each, 10 tokens each, 10.0% of all tokens")
