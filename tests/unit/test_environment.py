from __future__ import annotations

import pytest

from gptcli.environment import Group, first_host, recognise
from gptcli.errors import UsageError


def env(text: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.split())


TORCHRUN = env("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=head MASTER_PORT=1234")
# As srun sets them for the third of `srun --nodes 2 --ntasks 3`, two of them on the first machine.
SRUN = env(
    "SLURM_JOB_ID=123456 SLURM_NTASKS=3 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NUM_NODES=2 SLURM_PROCID=2 "
    "SLURM_LOCALID=0 SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=2,1 "
    "SLURM_STEP_NODELIST=gpu[07-08] SLURM_JOB_NODELIST=gpu[07-08]"
)
ONE_A_NODE = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
BATCH = env(
    "SLURM_JOB_ID=5 SLURM_NTASKS=8 SLURM_PROCID=0 "
    "SLURM_LOCALID=0 SLURM_NODEID=0 ENVIRONMENT=BATCH SLURM_JOB_NODELIST=n[1-2]"
)
OPEN_MPI = env(
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2"
)
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# Kubeflow's training operator: one pod of three, two processes each.
PYTORCHJOB = env(
    "RANK=2 WORLD_SIZE=6 MASTER_ADDR=job-master-0 MASTER_PORT=23456 "
    "PET_NNODES=3 PET_NODE_RANK=2 PET_NPROC_PER_NODE=2 KUBERNETES_SERVICE_HOST=10.0.0.1"
)
TRAINJOB = env(
    "PET_NNODES=2 PET_NPROC_PER_NODE=auto PET_NODE_RANK=1 PET_MASTER_ADDR=job-node-0-0.job PET_MASTER_PORT=29400"
)


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert recognise({}) == Group(0, 0, 1, 1)
    # accelerate sets these for one process too, and batch scripts export them for srun.
    assert recognise({"MASTER_ADDR": "head", "MASTER_PORT": "1234"}) == Group()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, Group(3, 1, 4, 2, "head", 1234, "torchrun")),
        ({**TORCHRUN, "GPTCLI_LAUNCHER_PID": "1"}, Group(3, 1, 4, 2, "head", 1234, "gptcli")),
        # torchrun inside of srun, of a pod, and under mpirun
        ({**SRUN, **OPEN_MPI, **TRAINJOB, **TORCHRUN}, Group(3, 1, 4, 2, "head", 1234, "torchrun")),
        (SRUN, Group(2, 0, 3, 1, "gpu07", 23456, "Slurm")),
        (
            {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
            Group(1, 1, 3, 2, "gpu07", 23456, "Slurm"),
        ),
        ({**SRUN, "MASTER_ADDR": "ib7", "MASTER_PORT": "1"}, Group(2, 0, 3, 1, "ib7", 1, "Slurm")),
        (ONE_A_NODE, Group(1, 0, 2, 1, "gpu07", 23456, "Slurm", per_machine=True)),
        (OPEN_MPI, Group(1, 1, 2, 2, "127.0.0.1", 29500, "MPI")),
        (INTEL_MPI, Group(1, 1, 2, 2, "127.0.0.1", 29500, "MPI")),
        # mpirun in a Slurm job: the step is that of its own helper, one a machine
        ({**ONE_A_NODE, **OPEN_MPI}, Group(1, 1, 2, 2, "127.0.0.1", 29500, "MPI")),
        ({**ONE_A_NODE, **INTEL_MPI, "PMI_SIZE": "4"}, Group(1, 1, 4, 2, "head", 29500, "MPI")),
        # srun --mpi=pmi2 sets PMI's beside its own
        (
            {**ONE_A_NODE, "PMI_RANK": "1", "PMI_SIZE": "2"},
            Group(1, 0, 2, 1, "gpu07", 23456, "Slurm", per_machine=True),
        ),
        (PYTORCHJOB, Group(2, 0, 3, 1, "job-master-0", 23456, "PyTorchJob", per_machine=True, processes=2)),
        (TRAINJOB, Group(1, 0, 2, 1, "job-node-0-0.job", 29400, "PyTorchJob", per_machine=True)),
    ],
)
def test_launchers_are_recognised(variables: dict[str, str], expected: Group) -> None:
    if expected.master_addr == "head" and expected.launcher == "MPI":
        variables = {**variables, "MASTER_ADDR": "head"}
    assert recognise(variables) == expected


def test_rank_and_size_set_by_hand_on_one_machine_are_enough() -> None:
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    found = recognise(by_hand)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (1, 1, 2, 2)
    assert recognise({**by_hand, "LOCAL_RANK": "1"}).local_world_size == 2
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}
    assert recognise(slurm).exported() | {"MASTER_PORT": ""} == env(
        "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT="
    )


@pytest.mark.parametrize(
    "variables",
    [
        BATCH,
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"},  # the shell of salloc
        {**BATCH, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash in it
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_batch_script_a_shell_and_a_group_of_one_are_alone(variables: dict[str, str]) -> None:
    assert recognise(variables).world_size == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, ["WORLD_SIZE is not set", "RANK, WORLD_SIZE, LOCAL_RANK"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set"]),
        ({"LOCAL_RANK": "1"}, ["RANK is not set"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["MASTER_ADDR is not set"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head"}, ["MASTER_PORT is not set"]),
        ({**TORCHRUN, "RANK": "4"}, ["rank 4 of 4"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["2 of 2 on this machine"]),
        ({**TORCHRUN, "RANK": "many"}, ["RANK=many", "number"]),
        ({**SRUN, "SLURM_LOCALID": ""}, ["SLURM_LOCALID is not set", "srun"]),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, ["MASTER_ADDR"]),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ["mpirun -x MASTER_ADDR="],
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ["MPI_LOCALRANKID"]),
        ({"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "a:1"}, ["PET_NNODES=1:4", "torchrun"]),
    ],
)
def test_what_is_half_set_or_contradicts_itself_is_refused_with_what_to_set(
    variables: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        recognise(variables)
    assert caught.value.exit_code == 2
    assert all(word in "\n".join(caught.value.lines()) for word in words), caught.value.lines()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-03,7],m1", "n01"),
        ("m1,n[01-03,7]", "m1"),
        ("gpu-[7,9-12]", "gpu-7"),
        ("r[1-2]n[03-04]-ib", "r1n03-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_lists(hosts: str, first: str) -> None:
    assert first_host(hosts) == first
