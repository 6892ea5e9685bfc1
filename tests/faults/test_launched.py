"""Faults 7 and 8 as a user has them: the command that starts its two processes itself, and a terminal."""

from __future__ import annotations

import os
import re
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL
from typing import Any

import pytest

from tests.pairs import SAVING, STEP, TOKENS, UNREADABLE, Pair, codes, faulty, until_signalled, until_stopped, workers
from tests.runs import assert_all_good
from tests.team import free_port
from tests.terminal import Terminal

SLOW = pytest.mark.slow_fault


@pytest.mark.parametrize(
    ("rank", "where"),
    [
        pytest.param(1, STEP, marks=SLOW),
        pytest.param(0, STEP, marks=SLOW),
        pytest.param(1, SAVING, marks=SLOW),
        pytest.param(0, SAVING, marks=SLOW),
        pytest.param(1, TOKENS, marks=SLOW),
        pytest.param(0, TOKENS, marks=SLOW),
    ],
    ids=["1-step", "0-step", "1-save", "0-save", "1-tokens", "0-tokens"],
)
def test_the_command_says_once_who_was_killed_and_goes_on_the_same(
    pair: Pair, rank: int, where: dict[str, Any]
) -> None:
    number = [STEP, SAVING, TOKENS].index(where)
    name = f"launched-killed-{number}-{rank}"
    data = [f"data.validation={{tail: {30 + rank}%}}"] if where is TOKENS else []
    started = pair.launched(name, *data, faults={0: {**where, "do": "SIGSTOP"}})
    pids = workers(started.pid)
    until_stopped(pids[0])
    os.kill(pids[rank], SIGKILL)
    os.kill(pids[0], SIGCONT)
    done = started.finish()
    assert codes([done]) == [6], done
    assert done.err.splitlines() == [
        f"error: process {rank} of 2 was killed (SIGKILL): probably out of memory",
        "  Lower train.micro_batch_size, or run fewer processes on this machine (launch.processes).",
        "  The same command goes on from the last checkpoint.",
    ]
    if where is TOKENS:
        assert codes(pair.pretrain(name, *data)) == [0, 0]
    else:
        assert 3 in assert_all_good(pair.run(name))
        pair.resume_to_the_same(name)


@SLOW
def test_the_command_says_an_error_of_one_process_once_and_with_its_code(pair: Pair) -> None:
    done = pair.launched("l-full", faults={0: {"bytes": 200_000, "do": "error"}}).finish()
    assert codes([done]) == [4], done
    assert done.err.count("error:") == 1 and "process" not in done.err
    assert "the checkpoint could not be written: File too large" in done.err
    done = pair.launched("l-shard", faults={1: UNREADABLE}).finish()
    assert codes([done]) == [3], done
    assert done.err.startswith("error: process 1 of 2: ") and done.err.count("error:") == 1
    assert "Input/output error" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train.max_stps=1",), 2, "train.max_stps"),
        pytest.param(("data.train=nowhere.txt",), 3, "nowhere.txt", marks=SLOW),
        pytest.param(("model={from: nowhere}",), 7, "nowhere", marks=SLOW),
        pytest.param(("train.learning_rate=1",), 4, "this is not the recipe or the data of the run", marks=SLOW),
    ],
)
def test_what_cannot_begin_is_said_once_and_of_no_process(
    pair: Pair, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = pair.launched("pair", *arguments).finish()
    assert codes([done]) == [code], done
    assert said in done.err
    assert done.err.count("error:") == 1 and "process" not in done.err and "warning" not in done.err


@SLOW
def test_ctrl_c_in_a_terminal_stops_both_at_one_checkpoint_and_is_told_once(pair: Pair) -> None:
    variables = {**pair.bench.forks.environment, **faulty({0: {**STEP, "do": "SIGSTOP"}})}
    with Terminal(pair.launching("typed"), pair.bench.folder, variables) as screen:
        pids = workers(screen.process.pid)
        until_stopped(pids[0])
        screen.type(b"\x03")
        until_signalled(pids[0], SIGINT)
        os.kill(pids[0], SIGCONT)
        code, text = screen.finish()
    assert code == 75, text
    # Each line once, whichever process might have said it; the bar is one line that is written anew.
    said = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n").split("\n") if line]
    assert len(said) == len(set(said))
    assert [line for line in said if "\r" not in line] == [
        *pair.began,
        "stopping after this step; once more leaves at once",
        "stopped: by SIGINT; step 5 of 12 is saved",
        "  The same command goes on from there.",
    ]
    assert assert_all_good(pair.run("typed")) == [3, 5]
    pair.resume_to_the_same("typed")


@SLOW
@pytest.mark.parametrize("processes", [1, 2])
def test_a_window_that_is_closed_saves_once_and_the_run_goes_on_the_same(pair: Pair, processes: int) -> None:
    name = f"closed-{processes}"
    variables = {**pair.bench.forks.environment, **faulty({0: {**STEP, "do": "SIGSTOP"}})}
    if processes == 1:  # as torchrun starts one, so that the fault finds it
        variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with Terminal(pair.launching(name), pair.bench.folder, variables) as screen:
        first = screen.process.pid if processes == 1 else workers(screen.process.pid)[0]
        until_stopped(first)
        screen.close()
        if processes == 2:  # whom a terminal belongs to is continued by the kernel when it is closed
            until_signalled(first, SIGHUP)
            os.kill(first, SIGCONT)
        code, _ = screen.finish()
    assert code == 75
    assert assert_all_good(pair.run(name)) == [3, 5]
    if processes == 1:
        pair.bench.resume_to_the_same(name)
    else:
        pair.resume_to_the_same(name)
