from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptcli.data.executor import FAST_BYTES, SLOW_BYTES, process_count, run
from gptcli.data.pieces import Chain, Piece, Stream
from gptcli.data.sources import reading_of
from gptcli.data.split import Split
from gptcli.data.work import Task
from gptcli.errors import DataError, OutOfMemoryError
from gptcli.recipe.schema import Source

READING = reading_of(Source.model_validate({"path": "-"}), "line", "error")
PROCESSES = [1, 2, 3]


def chains_of(*sizes: list[int], limit: int | None = None) -> list[Chain]:
    """Chains of pieces of these sizes; only a first one of several has the limit."""
    index = iter(range(10_000))
    return [
        [Piece(next(index), at, Stream(READING, limit if len(chain) > 1 else None, False), (), size) for size in chain]
        for at, chain in enumerate(sizes)
    ]


def counted(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """A document for each ten bytes."""
    on_bytes(piece.size // 2)
    documents = piece.size // 10
    return {"documents": documents if left is None else min(left, documents), "left": left}


def failing(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    if piece.index == 3:
        raise DataError("is wrong", where="file:3", remedy="Mend it.")
    return {"documents": 1}


def in_another_process(on_bytes: Callable[[int], None]) -> None:
    """Return in another process; in the first one, which works too, wait for what that one does."""
    while multiprocessing.parent_process() is None:
        on_bytes(0)
        time.sleep(0.01)


def unexpected(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    in_another_process(on_bytes)
    raise ZeroDivisionError("never")


def dying(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    in_another_process(on_bytes)
    os.kill(os.getpid(), signal.SIGKILL)
    return {"documents": 1}


def leaving(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    in_another_process(on_bytes)
    os._exit(9)


def killing(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """The first piece says that it is done, the second one then kills the process that did it and has nothing to do."""
    mark = task.folder / "first"
    if piece.index == 0:
        mark.write_text(str(os.getpid()))
    elif piece.index == 1:
        while not (mark.is_file() and mark.read_text()):
            pass
        os.kill(int(mark.read_text()), signal.SIGKILL)
        with contextlib.suppress(OSError):
            while Path(f"/proc/{mark.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                pass
    return {"documents": 1}


def interrupted(piece: Piece, task: Task, left: int | None, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    in_another_process(on_bytes)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)  # until the parent ends it
    return {"documents": 1}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path, Split())


def children() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize("processes", PROCESSES)
def test_every_piece_is_done_once_and_a_chain_ends_at_its_limit(task: Task, processes: int) -> None:
    chains = chains_of([100], [100, 100, 100, 100], [50], [70], limit=25)
    done = [(piece.index, result) for piece, result in run(counted, chains, task, processes=processes)]
    assert dict(sorted(done)) == {
        0: {"documents": 10, "left": None},
        1: {"documents": 10, "left": 25},
        2: {"documents": 10, "left": 15},
        3: {"documents": 5, "left": 5},
        5: {"documents": 5, "left": None},
        6: {"documents": 7, "left": None},
    }
    assert len(done) == 6


def test_a_chain_that_reaches_its_limit_with_its_last_piece_or_not_at_all_is_done_to_its_end(task: Task) -> None:
    for limit, last in ((20, 10), (200, 190)):
        results = dict(run(counted, chains_of([100, 100], limit=limit), task, processes=1))
        assert [result["left"] for result in results.values()] == [limit, last]


@pytest.mark.parametrize("processes", PROCESSES)
def test_the_bytes_that_are_done_grow_to_the_total_also_when_pieces_are_left_out(task: Task, processes: int) -> None:
    chains = chains_of([100], [100, 100, 100, 100], [50], limit=10)
    told: list[int] = []
    list(run(counted, chains, task, processes=processes, on_bytes=told.append))
    assert told[-1] == 550
    assert all(0 <= value <= 550 for value in told)
    assert told == sorted(told)


@pytest.mark.parametrize("processes", PROCESSES)
def test_an_error_of_a_piece_is_raised_as_itself_with_all_that_it_says(task: Task, processes: int) -> None:
    with pytest.raises(DataError, match="is wrong") as caught:
        list(run(failing, chains_of(*([10] for _ in range(8))), task, processes=processes))
    assert caught.value.lines() == ["file:3: is wrong", "Mend it."]
    assert caught.value.exit_code == 3


def test_an_error_of_another_process_brings_its_traceback(task: Task) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(run(unexpected, chains_of([10], [10]), task, processes=2))
    assert any("in unexpected" in note for note in caught.value.__notes__)


def test_a_process_that_is_killed_is_code_6_with_the_key_to_change(task: Task) -> None:
    with pytest.raises(OutOfMemoryError, match="memory ran out") as caught:
        list(run(dying, chains_of(*([10] for _ in range(8))), task, processes=2))
    assert "tokenize.processes" in str(caught.value.remedy)
    assert caught.value.exit_code == 6


def test_a_process_that_is_killed_while_it_has_nothing_to_do_is_code_6_too(task: Task) -> None:
    with pytest.raises(OutOfMemoryError):
        list(run(killing, chains_of([10], [10, 10, 10], limit=100), task, processes=2))


def test_a_process_that_ends_by_itself_is_an_error_with_its_code(task: Task) -> None:
    with pytest.raises(RuntimeError, match="ended with 9"):
        list(run(leaving, chains_of([10], [10]), task, processes=2))


def test_an_interruption_ends_the_processes_at_once(task: Task) -> None:
    results = run(interrupted, chains_of([10], [10]), task, processes=2)
    with pytest.raises(KeyboardInterrupt):
        list(results)
    assert not children()


def test_results_that_nobody_asks_for_any_more_end_the_processes(task: Task) -> None:
    results = run(counted, chains_of(*([10] for _ in range(50))), task, processes=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not children()


def test_there_are_as_many_processes_as_have_enough_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    small, large = chains_of([SLOW_BYTES // 2], [SLOW_BYTES // 2]), chains_of(*([FAST_BYTES] for _ in range(9)))
    assert process_count("auto", small, fast=True) == 1
    assert process_count("auto", large, fast=True) == process_count("auto", large, fast=False) == 4
    assert process_count("auto", chains_of([SLOW_BYTES], [SLOW_BYTES]), fast=False) == 2
    assert process_count("auto", chains_of([FAST_BYTES, FAST_BYTES, FAST_BYTES], limit=9), fast=True) == 1
    assert process_count(7, large, fast=True) == 7
    assert process_count(70, large, fast=True) == 9
    assert process_count("auto", [], fast=True) == process_count(3, [], fast=True) == 1
