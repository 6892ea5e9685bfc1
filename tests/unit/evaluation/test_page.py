from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from gptcli.errors import CheckpointError
from gptcli.evaluation.curves import Collecting, ScoredText, TokenScores, calibration
from gptcli.evaluation.evaluate import Evaluation
from gptcli.evaluation.page import page, write_page
from gptcli.evaluation.scores import Scores
from gptcli.evaluation.surprise import changes, pieces
from gptcli.evaluation.tasks import TaskResult
from gptcli.evaluation.windows import document_windows
from tests.tiny import byte_tokenizer, fallback_tokenizer

HOSTILE = "<script>alert('x')</script>\"& \u202e"
TEXT = f"the cat\n\nsat on {HOSTILE} 世界 é\t\x00mat"
SHOWN = HOSTILE.replace("\u202e", "[U+202E]")
VOID = {"meta", "br"}


class Reading(HTMLParser):
    """Sees that everything that opens also closes; collects tags, links, the coloured pieces and the tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.pieces: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.pictures: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = dict(attrs)
        assert not any(name.startswith("on") or name in ("src", "href", "srcset", "action") for name in names)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "i":
            self.pieces.append((names.get("class") or "", names.get("title") or "", ""))
        if tag == "svg":
            self.pictures.append(names.get("aria-label"))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "i":
            style, title, text = self.pieces[-1]
            self.pieces[-1] = style, title, text + data
        elif self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def read(content: str) -> Reading:
    found = Reading()
    found.feed(content)
    found.close()
    assert found.open == [] and "script" not in found.tags and found.pictures and all(found.pictures)
    assert not re.search(r"https?:|@import|url\(|<script", content)
    return found


def evaluation(
    folder: Path, tokenizer: Tokenizer, text: str = TEXT, *, name: str = "model", more: float = 0.0, copies: int = 12
) -> Evaluation:
    """One of a model that gives the n-th token of a text n / 10 nats and thinks token 2 likely."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    watch, documents = Collecting(), [(ids, len(text.encode()))] * copies
    for number, (each, _) in enumerate(watch.reading(iter(documents))):
        for window in document_windows(number, each, 0, 16, 16):
            nats = np.arange(window.first, window.first + window.scored) / 10 + more
            best = np.full(window.scored, 2)
            sure = np.linspace(0.05, 0.95, window.scored, dtype=np.float32)
            watch.take(window, TokenScores(nats, best, sure, best == 3))
    total = len(ids) * (len(ids) - 1) / 20 + more * len(ids)
    rng = np.random.default_rng(0)
    scores = Scores(
        total * (1 + rng.normal(0, 0.01, copies)),
        np.full(copies, len(ids), dtype=np.uint32),
        np.full(copies, len(text.encode()), dtype=np.uint64),
        np.full(copies, len(text), dtype=np.uint32),
        (("a", copies - 2), (HOSTILE, 2)),
    )
    return Evaluation(name, f"data {HOSTILE}", scores, watch.curves(), folder)


def task(name: str = "model") -> TaskResult:
    matrix = {"labels": ["no", HOSTILE], "counts": [[7, 3], [0, 1234]]}
    sureness = calibration(np.array([0.5, 0.9, 0.97]), np.array([True, False, True]))
    return TaskResult(name, "rows", 1244, {"accuracy": 0.9976, "confusion_matrix": matrix}, sureness)


def test_the_page_is_self_contained_well_formed_and_escaped(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", [evaluation(tmp_path / "a", byte_tokenizer(), name=f"m {HOSTILE}\ud800")])
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = read(content)
    assert "&lt;script&gt;" in content and "世" in content and "\u202e" not in content and "\x00" not in content
    assert "prefers-color-scheme: dark" in content and "Content-Security-Policy" in content
    assert found.pictures == [
        "Loss by position in context",
        "Calibration of the next token: share right by probability",
    ]
    with pytest.raises(CheckpointError):
        write_page(tmp_path, [], [task()])


def test_the_text_stands_there_as_it_is_with_the_nats_of_each_token(tmp_path: Path) -> None:
    found = read(page([evaluation(tmp_path / "a", byte_tokenizer(), copies=1)]))
    shown = [piece for piece in found.pieces if piece[1]]
    text = "".join(text for _, _, text in shown)
    assert text == TEXT.replace("\u202e", "[U+202E]").replace("\x00", "␀")
    assert shown[3][1].startswith("0.30 nats, 74.1%; likeliest “") and shown[3][0] == "h1 n"
    wide = next(title for _, title, text in shown if text == "世")
    number = len(byte_tokenizer().encode(TEXT[: TEXT.index("世")]).ids)
    nats = [(number + more) / 10 for more in range(3)]
    assert wide == f"{sum(nats):.2f} nats: 3 tokens of {' + '.join(f'{each:.2f}' for each in nats)}"


def test_bytes_of_a_tokenizer_that_falls_back_on_them_are_one_piece() -> None:
    tokenizer = fallback_tokenizer()
    ids = np.array(tokenizer.encode("the 世 mat").ids, dtype=np.int32)
    count = len(ids)
    flat = np.ones(count, dtype=np.float32)
    held = ScoredText(np.zeros(count, dtype=np.int32), ids, flat, np.full(count, 3 + 0xE4, dtype=np.int32), flat)
    [document] = pieces(held, tokenizer)
    assert "".join(piece.text for piece in document) == "the 世 mat"
    wide = next(piece for piece in document if piece.text == "世")
    assert len(wide.nats) == 3 and wide.total == 3 and wide.guess == "<0xE4>"


def test_a_character_that_is_cut_in_two_at_the_end_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer.encode("cat 世").ids[:-1], dtype=np.int32)
    flat = np.ones(len(ids), dtype=np.float32)
    held = ScoredText(np.zeros(len(ids), dtype=np.int32), ids, flat, ids, flat)
    assert "".join(piece.text for piece in pieces(held, tokenizer)[0]) == "cat "


def test_two_tokenizers_are_compared_where_both_end_a_token(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", byte_tokenizer(260), name="bytes", copies=12)
    other = evaluation(tmp_path / "b", byte_tokenizer(300), name="words", copies=12, more=0.5)
    assert first.curves is not None and other.curves is not None
    ours, theirs = pieces(other.curves.text, byte_tokenizer(300)), pieces(first.curves.text, byte_tokenizer(260))
    assert len(ours[0]) < len(theirs[0])
    found = changes(ours, theirs)
    assert found is not None and "".join(each.text for each in found[0]) == TEXT
    assert sum(each.after for each in found[0]) == pytest.approx(sum(piece.total for piece in ours[0]))
    assert sum(each.before for each in found[0]) == pytest.approx(sum(piece.total for piece in theirs[0]))
    content = page([first, other])
    assert "words beside bytes" in content
    upper = evaluation(tmp_path / "c", byte_tokenizer(), TEXT.upper(), name="upper")
    assert "do not give the same text back" in page([first, upper])


def test_the_confusion_matrix_and_the_numbers_below_the_charts_are_those_measured(tmp_path: Path) -> None:
    each = evaluation(tmp_path / "a", byte_tokenizer())
    assert each.curves is not None
    found = read(page([each], [task()]))
    tables = {tuple(rows[0]): rows[1:] for rows in found.tables}
    assert tables["", "no", SHOWN] == [["no", "7", "3"], [SHOWN, "0", "1,234"]]
    positions = tables["tokens of context", "tokens scored", "loss"]
    assert [row[1:] for row in positions] == [[f"{n:,}", f"{loss:.4f}"] for _, _, n, loss in each.curves.positions()]
    labels = tables["probability", "rows", "mean probability", "right"]
    assert labels == [["40% to 50%", "1", "0.5000", "1.0000"], ["80% to 90%", "1", "0.9000", "0.0000"],
                      ["90% to 100%", "1", "0.9700", "1.0000"]]  # fmt: skip
    assert [row[0] for row in tables["source", "loss", "95%", "bits/byte", "bytes", "documents"]] == ["a", SHOWN]


def test_a_comparison_has_interval_p_and_probability(tmp_path: Path) -> None:
    each = evaluation(tmp_path / "a", byte_tokenizer())
    found = read(
        page([each, evaluation(tmp_path / "a", byte_tokenizer(), name="other", more=0.2)], [task(), task("b")])
    )
    columns = ["model", "by", "difference", "95%", "p", "probability", "verdict"]
    [[_, row]] = [rows for rows in found.tables if rows[0] == columns]
    assert row[:2] == ["other", "loss"] and row[2] == "+0.2000" and row[-2:] == ["100.0%", "worse"]


@pytest.mark.parametrize("models", [1, 2, 4])
def test_three_thousand_tokens_of_any_number_of_models_stay_below_a_megabyte(tmp_path: Path, models: int) -> None:
    text = TEXT * 400
    every = [
        evaluation(tmp_path / "a", byte_tokenizer(), text, name=f"m{number}", copies=1) for number in range(models)
    ]
    content = page(every)
    assert len(content.encode()) < 1_000_000
    assert sum(bool(title) for _, title, _ in read(content).pieces) > 2500


def test_a_model_without_a_finite_number_and_results_without_curves_still_give_a_page(tmp_path: Path) -> None:
    each = evaluation(tmp_path / "a", byte_tokenizer(), more=float("nan"))
    found = read(page([each, each]))
    assert {style.split()[0] for style, title, _ in found.pieces if title} == {"bad"}
    bare = Evaluation("model", "data", each.scores)
    content = page([bare], [], [("model", {"results": {"t": {"alias": HOSTILE, "acc,none": 0.5}}, "n-shot": {"t": 0}})])
    assert "0.5000" in content and "<script" not in content
