from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gptcli.generation.batches import Units
from gptcli.generation.journal import Done, Journal, read_blocks

# Six prompts in three units.
UNITS = Units(np.array([4, 0, 5, 1, 2, 3]), np.array([0, 2, 4, 6]))


def lines(unit: int) -> list[str]:
    return [json.dumps([{"text": f"世界\u2028 {prompt}"}], ensure_ascii=False) for prompt in UNITS.prompts(unit)]


def append(folder: Path, rank: int, *units: int) -> Path:
    journal = Journal(folder, rank)
    for unit in units:
        journal.append(unit, lines(unit), tokens=7, made_on="fp32 on cpu")
    journal.close()
    return journal.path


def test_completions_of_several_journals_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    append(tmp_path, 1, 2, 0)
    append(tmp_path, 0, 1)
    done = Done(tmp_path, UNITS)
    assert [json.loads(line)[0]["text"][-1] for line in done.completions()] == list("012345")
    assert (done.prompts, done.tokens, done.made_on) == (6, 21, ["fp32 on cpu"])


def test_a_journal_that_ends_anywhere_keeps_its_whole_units_and_goes_on_after_them(tmp_path: Path) -> None:
    whole = append(tmp_path, 0, 0, 1).read_bytes()
    first = whole.index(b'{"unit": 1')
    for size in range(len(whole)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "done-0.jsonl").write_bytes(whole[:size])
        assert [block.unit for block in read_blocks(folder / "done-0.jsonl")] == ([0] if size >= first else [])
        if size % 50 == 0:
            append(folder, 0, 2)
            assert set(Done(folder, UNITS).blocks) == ({0, 2} if size >= first else {2})


def test_a_damaged_unit_is_not_taken(tmp_path: Path) -> None:
    path = append(tmp_path, 0, 0, 1, 2)
    whole = path.read_bytes()
    second, third = whole.index(b'{"unit": 1'), whole.index(b'{"unit": 2')
    for at in range(second, third, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert [block.unit for block in read_blocks(path)] == [0]


def test_a_unit_that_was_done_twice_counts_once(tmp_path: Path) -> None:
    append(tmp_path, 0, 0, 1)
    append(tmp_path, 1, 1, 2)
    done = Done(tmp_path, UNITS)
    assert (done.prompts, done.tokens) == (6, 21)
    assert len(list(done.completions())) == 6
