from __future__ import annotations

import os

import pytest

import gptcli.launch as launching
from gptcli.errors import MissingError, UsageError
from gptcli.launch import (
    is_main_process,
    join,
    local_processes,
    local_rank,
    local_world_size,
    processes_to_start,
    rank,
    restarted,
    world_size,
)

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "OMPI_", "PET_", "TORCHELASTIC_", "GPTCLI_")
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_knows_its_place_before_anything_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (rank(), world_size(), is_main_process(), restarted()) == (0, 1, True, False)
    set_all(monkeypatch, {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    assert (rank(), world_size(), is_main_process()) == (1, 2, False)
    assert (local_rank(), local_world_size()) == (0, 1)
    monkeypatch.setenv("SLURM_LOCALID", "x")
    assert is_main_process()  # who prints the error of it?


def test_joining_shows_a_slurm_step_as_torchrun_would(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    assert join().world_size == 1
    assert dict(os.environ) == before
    set_all(monkeypatch, {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "7"})
    shown = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1"}
    for name in (*shown, "MASTER_PORT", "GLOO_SOCKET_IFNAME", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that they are unset again
    join()
    assert {name: os.environ[name] for name in shown} == shown
    assert os.environ["MASTER_PORT"] == "20007"
    assert (rank(), world_size()) == (1, 2)


@pytest.mark.parametrize(
    ("gpus", "wanted", "expected"), [(0, "auto", 1), (0, 4, 4), (4, "auto", 4), (4, 1, 1), (4, 4, 4)]
)
def test_processes_follow_the_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, wanted: int | str, expected: int
) -> None:
    monkeypatch.setattr(launching, "_gpus", lambda: gpus)
    assert local_processes(wanted) == expected  # type: ignore[arg-type]


def test_more_processes_than_gpus_are_refused_with_the_number_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_gpus", lambda: 2)
    with pytest.raises(MissingError, match="3 processes, and this machine has 2 GPUs") as caught:
        local_processes(3)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("variables", "wanted", "nodes", "expected"),
    [
        ({}, "auto", 1, 0),
        ({}, 2, 1, 2),
        ({}, 1, 2, 1),
        # A worker of torchrun, or one of several on its machine, trains whatever the recipe says.
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 2, 1, 0),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}, 2, 1, 0),
        # One a machine starts the machine's own, if there are to be several.
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 1, 1, 0),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 2, 1, 2),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 2, 2, 2),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, "auto", 1, 2),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, 3, 1, 3),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 2, 1, 2),
    ],
)
def test_what_is_started_here(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: int | str, nodes: int, expected: int
) -> None:
    set_all(monkeypatch, variables)
    assert processes_to_start(wanted, nodes, "head:29400") == expected  # type: ignore[arg-type]


def test_several_machines_need_a_place_to_meet_and_the_launchers_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nodes is 2") as caught:
        processes_to_start(2, 2, None)
    assert "launch.rendezvous=HOST:PORT" in caught.value.lines()[1]
    set_all(monkeypatch, {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    with pytest.raises(UsageError, match="nodes is 3, and Slurm started 2 machines"):
        processes_to_start(2, 3, None)
