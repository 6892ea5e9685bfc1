"""Which process of a group this is, from the variables that launchers set: a pure function, no torch, no files.

What was started closest to the process wins: torchrun inside of `srun` or a pod, `mpirun` inside of a Slurm job.
Sources: torch's `run.py` (RANK and its kin, PET_*), `srun`'s manual (SLURM_STEP_*), Open MPI's and MPICH's manuals, and
Kubeflow's `envvar.go` (PyTorchJob, version 1) and `torch.go` (TrainJob, version 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptcli.errors import UsageError

HERE = "127.0.0.1"
LOOPBACK = frozenset({HERE, "localhost", "::1"})
DEFAULT_PORT = 29500
# Below the ports that Linux hands out by itself (32768 and up), above those of services.
SLURM_PORTS = range(20000, 30000)
# rank, size, rank on this machine, processes on this machine
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Group:
    """The place of this process in its group; the defaults are those of a process that is alone.

    Attributes:
        rank: over all machines.
        local_rank: on this machine.
        world_size: processes over all machines.
        local_world_size: processes on this machine.
        master_addr: the machine of rank 0.
        master_port: a port that is free there.
        launcher: who started this process; "" nobody.
        per_machine: whether the launcher starts one process a machine and leaves it open how many run there.
        processes: how many the launcher asks for on each machine, where it says so and leaves starting them to us.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = HERE
    master_port: int = DEFAULT_PORT
    launcher: str = ""
    per_machine: bool = False
    processes: int | None = None

    def exported(self) -> dict[str, str]:
        """The variables by which torch, accelerate and transformers know a group, as torchrun sets them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def recognise(variables: Mapping[str, str]) -> Group:
    """The place of a process with this environment in its group.

    Raises:
        UsageError: variables are missing, no numbers, or contradict each other.
    """
    env = {name: value for name, value in variables.items() if value}
    if "LOCAL_RANK" in env:
        group = _torchrun(env)
    elif "PET_NNODES" in env or "RANK" in env or "WORLD_SIZE" in env:
        group = _pod(env)
    elif "OMPI_COMM_WORLD_RANK" in env or "MV2_COMM_WORLD_RANK" in env:
        group = _mpi(env)
    elif _in_step(env):
        group = _slurm(env)
    elif "PMI_RANK" in env:
        group = _mpi(env)
    else:
        return Group()
    if not (0 <= group.rank < group.world_size and 0 <= group.local_rank < group.local_world_size <= group.world_size):
        raise UsageError(
            f"{group.launcher}: rank {group.rank} of {group.world_size} processes, {group.local_rank} of "
            f"{group.local_world_size} on this machine, cannot be",
            remedy="Ranks count from 0. Unset the variables of another launcher, or mend those that were set by hand.",
        )
    return group


def first_host(hosts: str) -> str:
    """The first of the machines in Slurm's way to write them: `n[01-03,7],m1` begins with n01."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _torchrun(env: Mapping[str, str]) -> Group:
    rank, size, local = (_number(env, name, _AS_TORCHRUN) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    address, port = _meeting({name: value for name, value in env.items() if not name.startswith("PET_")}, size)
    everyone_is_here = size if address in LOOPBACK else local + 1
    return Group(
        rank=rank,
        local_rank=local,
        world_size=size,
        local_world_size=_number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else everyone_is_here,
        master_addr=address,
        master_port=port,
        launcher="gptcli" if "GPTCLI_LAUNCHER_PID" in env else "torchrun",
    )


def _pod(env: Mapping[str, str]) -> Group:
    """Kubeflow's PyTorchJob and TrainJob, one process a pod, or RANK and WORLD_SIZE that were set by hand."""
    asked = env.get("PET_NPROC_PER_NODE", "")
    processes = int(asked) if asked.isdecimal() else None
    if ":" in env.get("PET_NNODES", ""):
        raise UsageError(
            f"PET_NNODES={env['PET_NNODES']}: a job whose number of machines may change is started by torchrun",
            remedy='command: ["torchrun", "-m", "gptcli", "pretrain", ...]; torchrun reads the PET_ variables itself.',
        )
    if env.get("PET_NNODES") == "1":
        return Group(launcher="PyTorchJob", per_machine=True, processes=processes)
    # WORLD_SIZE of a PyTorchJob counts processes, its RANK counts pods; where both are given PET_ is the plain one.
    rank_name = "PET_NODE_RANK" if "PET_NODE_RANK" in env else "RANK"
    size_name = "PET_NNODES" if "PET_NNODES" in env else "WORLD_SIZE"
    rank, size = _number(env, rank_name, _AS_TORCHRUN), _number(env, size_name, _AS_TORCHRUN)
    address, port = _meeting(env, size)
    here = size > 1 and address in LOOPBACK
    return Group(
        rank=rank,
        local_rank=rank if here else 0,
        world_size=size,
        local_world_size=size if here else 1,
        master_addr=address,
        master_port=port,
        launcher="PyTorchJob" if "PET_NNODES" in env or "KUBERNETES_SERVICE_HOST" in env else "RANK and WORLD_SIZE",
        per_machine=not here,
        processes=processes,
    )


def _mpi(env: Mapping[str, str]) -> Group:
    names = next(names for names in MPI if names[0] in env)
    rank, size = _number(env, names[0]), _number(env, names[1], "Start the processes with mpirun.")
    if size == 1:
        return Group(launcher="MPI", per_machine=True)
    if names[2] not in env:
        raise UsageError(
            f"{names[0]} is set and {names[2]} is not: which process of its machine this is cannot be known",
            remedy=_AS_TORCHRUN,
        )
    local, local_size = _number(env, names[2]), _number(env, names[3]) if names[3] in env else 1
    if local_size < size and "MASTER_ADDR" not in env:
        raise UsageError(
            f"mpirun started {size} processes on several machines, and where they meet is not said",
            remedy="mpirun -x MASTER_ADDR=HOST ... (Open MPI) or mpirun -genv MASTER_ADDR HOST ... (Intel MPI, MPICH), "
            "HOST being the machine of rank 0.",
        )
    return Group(
        rank=rank,
        local_rank=local,
        world_size=size,
        local_world_size=local_size,
        master_addr=env.get("MASTER_ADDR", HERE),
        master_port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else DEFAULT_PORT,
        launcher="MPI",
        per_machine=local_size == 1,
    )


def _in_step(env: Mapping[str, str]) -> bool:
    """Whether Slurm's `srun` started this process.

    A batch script and the shell of `salloc` have SLURM_NTASKS too, for the steps that they may start; a batch script
    even has SLURM_PROCID=0, beside ENVIRONMENT=BATCH. Under Intel's `mpirun` in a job the step is its helper's.
    """
    if "SLURM_PROCID" not in env:
        return False
    if "PMI_RANK" in env and (env["PMI_RANK"], env.get("PMI_SIZE")) != (env["SLURM_PROCID"], _tasks(env)):
        return False
    return "SLURM_STEP_NUM_TASKS" in env or ("SLURM_NTASKS" in env and env.get("ENVIRONMENT") != "BATCH")


def _tasks(env: Mapping[str, str]) -> str | None:
    return env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")


def _slurm(env: Mapping[str, str]) -> Group:
    remedy = "Start the processes with srun, or set RANK, WORLD_SIZE and LOCAL_RANK for each."
    size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", remedy)
    if size == 1:
        return Group(launcher="Slurm", per_machine=True)
    rank, local = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID", remedy)
    local_size, machines = _slurm_tasks_here(env, size)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    address = env.get("MASTER_ADDR") or (HERE if local_size == size else first_host(hosts or ""))
    if not address:
        raise UsageError(
            "srun started several processes, and neither SLURM_STEP_NODELIST nor MASTER_ADDR says where they meet",
            remedy="Set MASTER_ADDR to the machine of rank 0.",
        )
    job = "".join(filter(str.isdecimal, env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID") or "")) or "0"
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else SLURM_PORTS[int(job) % len(SLURM_PORTS)]
    return Group(
        rank=rank,
        local_rank=local,
        world_size=size,
        local_world_size=local_size,
        master_addr=address,
        master_port=port,
        launcher="Slurm",
        per_machine=machines == size,
    )


def _slurm_tasks_here(env: Mapping[str, str], size: int) -> tuple[int, int]:
    """Tasks on this machine, and machines: `2(x3),1` is two on each of the first three of four, one on the last."""
    written = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", written):
        counts += [int(tasks)] * int(times or 1)
    machine = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    if machine < len(counts):
        return counts[machine], len(counts)
    name = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if name in env), None)
    machines = max(1, _number(env, name)) if name else 1
    return max(1, size // machines), machines


_AS_TORCHRUN = (
    "Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process, "
    "as torchrun does, or unset them all."
)


def _meeting(env: Mapping[str, str], size: int) -> tuple[str, int]:
    """The address and port at which the processes meet; needed by more than one process only."""
    if size <= 1:
        return HERE, DEFAULT_PORT
    endpoint = env.get("PET_RDZV_ENDPOINT", "")
    address, _, port = endpoint.rpartition(":") if re.search(r":\d+$", endpoint) else (endpoint, "", "")
    address = env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR") or address.strip("[]")
    if not address:
        raise UsageError(f"there are {size} processes, and MASTER_ADDR is not set", remedy=_AS_TORCHRUN)
    name = "PET_MASTER_PORT" if "PET_MASTER_PORT" in env else "MASTER_PORT"
    if name in env or not port:
        return address, _number(env, name, _AS_TORCHRUN)
    return address, int(port)


def _number(env: Mapping[str, str], name: str, remedy: str | None = None) -> int:
    if name not in env:
        raise UsageError(f"{name} is not set, and other variables of a launcher are", remedy=remedy)
    try:
        return int(env[name])
    except ValueError:
        raise UsageError(f"{name}={env[name]}: not a number", remedy=remedy) from None
