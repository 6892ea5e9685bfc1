from __future__ import annotations

import math
from pathlib import Path

import pytest

from gptcli.errors import CheckpointError
from gptcli.runs import metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_lines_come_back_as_written(path: Path) -> None:
    assert metrics.read(path) == []
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "text": "世界\n\r\u2028 🙂"}]
    for line in lines:
        metrics.append(path, line)
    assert metrics.read(path) == lines


def test_numbers_that_are_not_finite_are_null(path: Path) -> None:
    metrics.append(path, {"step": 1, "loss": math.nan, "validation": {"loss": [math.inf, 1.0]}})
    assert path.read_text() == '{"step": 1, "loss": null, "validation": {"loss": [null, 1.0]}}\n'


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "x" * 200_000])
def test_half_a_line_is_left_out_and_removed_by_the_next(path: Path, torn: str) -> None:
    metrics.append(path, {"step": 1})
    with path.open("a") as file:
        file.write(torn)
    assert metrics.read(path) == [{"step": 1}]
    metrics.append(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_half_a_first_line_is_removed_too(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"st')
    metrics.append(path, {"step": 1})
    assert metrics.read(path) == [{"step": 1}]


@pytest.mark.parametrize("line", ["nonsense", "[1]", "[" * 100_000, "\x00"])
def test_a_damaged_line_in_the_middle_is_named(path: Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(CheckpointError) as caught:
        metrics.read(path)
    assert caught.value.where == f"{path}:2"


def test_truncate_keeps_the_bytes_of_the_steps_so_far(path: Path) -> None:
    metrics.truncate(path, 5)
    assert not path.exists()
    path.parent.mkdir()
    path.write_text('{"step":1 }\n{"step": 2}\n{"step": 2, "validation": {}}\n{"step": 3}\n{"other": 1}\n{"step": 2')
    metrics.truncate(path, 2)
    assert path.read_text() == '{"step":1 }\n{"step": 2}\n{"step": 2, "validation": {}}\n'
