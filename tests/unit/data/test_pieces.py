from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.data import pieces
from gptcli.data.job import Job, find_job
from gptcli.data.pieces import Chain, Piece
from gptcli.data.shards import Shards
from gptcli.data.sources import read_documents
from gptcli.data.tokenize import Prepared
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent

TARGET = 20_000
LINES = [f"line {number} of some text that is long enough to fill pieces" for number in range(4_000)]
FILES = ("a.txt", "b.jsonl", "c.parquet", "d/e.txt", "d/f.txt", "d/g.csv")


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": lines}), path, row_group_size=100, compression="none")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        path.write_text("\n".join(["text"] * (path.suffix == ".csv") + lines) + "\n")


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Job]:
    """The job of a data section over six files, whose pieces are some 20 KB."""
    monkeypatch.setattr(pieces, "SMALLEST", TARGET)
    for name, part in zip(FILES, parts(700), strict=True):
        write(tmp_path / name, part)
    recipe = tmp_path / "recipe.yaml"

    def found(data: str) -> Job:
        recipe.write_text(f"tokenizer: {{train: {{algorithm: bytes}}}}\ndata: {{{data}, sequence_length: 8}}\n")
        return find_job(load_recipe(str(recipe)), Silent())

    return found


def parts(size: int) -> list[list[str]]:
    return [LINES[at : at + size] for at in range(0, len(LINES), size)]


def texts(chains: list[Chain]) -> list[str]:
    inputs = [piece for chain in chains for piece in chain]
    return [document.text for piece in inputs for document in read_documents(piece.inputs, piece.stream.reading)]


ALL = "[a.txt, b.jsonl, c.parquet, d]"


def test_every_document_is_in_one_piece_and_in_order(find: Callable[[str], Job]) -> None:
    chains = find(f"train: {ALL}, documents: line").chains
    assert texts(chains) == LINES
    flat = [piece for chain in chains for piece in chain]
    assert [piece.index for piece in flat] == list(range(len(flat)))
    assert [piece.source for piece in flat] == sorted(piece.source for piece in flat)
    assert {piece.source for piece in flat} == {0, 1, 2, 3}
    assert len({piece.name for piece in flat}) == len(flat)


def test_pieces_have_about_the_size_that_is_wanted_and_add_up(find: Callable[[str], Job], tmp_path: Path) -> None:
    flat: list[Piece] = [piece for chain in find(f"train: {ALL}, documents: line").chains for piece in chain]
    last = {piece.source: piece.index for piece in flat}
    # A span is at most a line longer than wanted, and a group ends half a part before or after it.
    assert all(
        TARGET // 2 <= piece.size <= TARGET * 3 // 2 + 200 for piece in flat if piece.index != last[piece.source]
    )
    for source, names in enumerate([FILES[:1], FILES[1:2], FILES[2:3], FILES[3:]]):
        size = sum((tmp_path / name).stat().st_size for name in names)
        assert sum(piece.size for piece in flat if piece.source == source) == pytest.approx(size, rel=0.01)


def test_the_division_is_the_same_for_the_same_inputs_and_does_not_look_at_the_machine(
    find: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find(f"train: {ALL}, documents: line").chains
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert find(f"train: {ALL}, documents: line").chains == first


def test_a_source_with_a_limit_is_a_chain_and_any_other_piece_is_one_of_its_own(find: Callable[[str], Job]) -> None:
    job = find(
        "train: [a.txt, {path: b.jsonl, limit: 10}, d], documents: line, validation: {path: c.parquet, limit: 5}"
    )
    chained = {chain[0].source for chain in job.chains if len(chain) > 1 and not chain[0].stream.held_out}
    assert chained == {1}
    assert all(len({(piece.source, piece.stream.held_out) for piece in chain}) == 1 for chain in job.chains)
    held_out = [chain for chain in job.chains if chain[0].stream.held_out]
    assert len(held_out) == 1 and len(held_out[0]) > 1
    assert held_out[0][0].source == 0
    assert [chain[0].stream.limit for chain in job.chains if len(chain) > 1] == [10, 5]


def test_a_large_job_has_some_hundred_pieces_and_no_piece_is_larger_than_the_largest(
    find: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SMALLEST", 1)
    assert 80 <= len(find("train: a.txt, documents: line").chains) <= 120
    monkeypatch.setattr(pieces, "LARGEST", 300)
    assert len(find("train: a.txt, documents: line").chains) > pieces.PIECES
    assert texts(find("train: a.txt, documents: line").chains) == LINES[:700]


def test_empty_files_are_part_of_a_piece_wherever_they_stand(find: Callable[[str], Job], tmp_path: Path) -> None:
    for name in ("d/a.txt", "d/ee.txt", "d/z.txt", "empty.txt"):
        (tmp_path / name).write_bytes(b"")
    job = find("train: [empty.txt, d], documents: line, validation: a.txt")
    assert texts([chain for chain in job.chains if not chain[0].stream.held_out]) == LINES[2100:]
    assert [part.path.name for part in job.chains[0][0].inputs] == ["empty.txt"]


@pytest.mark.parametrize("limit", [1, 349, 350, 351, 1_500, 99_999])
@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_a_limit_over_files_and_pieces_takes_the_first_documents_before_duplicates_are_left_out(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, deduplicate: str
) -> None:
    monkeypatch.setattr(pieces, "SMALLEST", TARGET)
    folder = tmp_path / "limited"
    lines = [LINES[number % 1_100] for number in range(1_800)]
    for name, part in zip(("a.txt", "b.jsonl", "c.csv"), (lines[:600], lines[600:1200], lines[1200:]), strict=True):
        write(folder / name, part)
    write(tmp_path / "other.txt", LINES[2_000:2_010])
    train = f"[{{path: limited, limit: {limit}}}, other.txt]"
    result = prepared(
        f"{{train: {train}, documents: line, validation: 0, sequence_length: 8, deduplicate: {deduplicate}}}"
    )
    kept = lines[:limit] if deduplicate == "none" else list(dict.fromkeys(lines[:limit]))
    assert decoded(result.train) == kept + LINES[2_000:2_010]
    assert result.report["duplicates"] == len(lines[:limit]) - len(set(lines[:limit]))


def decoded(shards: Shards) -> list[str]:
    return [bytes(ids.astype(np.uint8)).decode() for ids, _ in shards.evaluation_documents()]
