"""How many processes a command runs on, which of them this one is, and starting them.

Started once, a command starts its workers itself, each the same command again; started by torchrun, accelerate, `srun`,
`mpirun` or a PyTorchJob it is a worker. One process a machine that is to run several starts the machine's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from gptcli.device import cpu_cores
from gptcli.endings import GOES_ON, LESS_MEMORY, report_of, write_report
from gptcli.environment import HERE, LOOPBACK, Group, recognise
from gptcli.errors import GptcliError, MissingError, UsageError
from gptcli.network import address_for_others, interface_towards, is_ours_and_free, step_seconds

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import RendezvousHandler

# What a driver leaves where there is a GPU (NVIDIA, AMD, WSL); torch, seconds to import, is asked only then.
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
PR_SET_PDEATHSIG = 1
JOIN_SECONDS = 600
TRY_SECONDS = 1.0
# Held until the process ends: a store goes with its last owner.
_OWN_STORES: list[TCPStore] = []


def group() -> Group:
    """The place of this process in the group that it was started in; raises `UsageError`, see `recognise`."""
    return recognise(os.environ)


def rank() -> int:
    """The rank of this process over all machines, 0 when it was not launched in a group."""
    return group().rank


def world_size() -> int:
    """The number of processes of the group, 1 when this process was not launched in one."""
    return group().world_size


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return group().local_rank


def local_world_size() -> int:
    """The number of processes of the group on this machine."""
    return group().local_world_size


def is_main_process() -> bool:
    """Whether this is the one process that prints and writes; one whose place cannot be known is."""
    try:
        return rank() == 0
    except UsageError:
        return True


def restarted() -> bool:
    """Whether this worker was started again after a failure: it goes on, whatever its command says of starting anew."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def join() -> Group:
    """Let torch, accelerate and transformers see the group as if torchrun had started it; one alone is left alone."""
    mine = group()
    if mine.world_size > 1:
        _quiet()
        os.environ.update(mine.exported())
        several = mine.local_world_size < mine.world_size and mine.master_addr not in LOOPBACK
        # gloo takes that of the host's own name; NCCL takes every one that is no loopback, and several carry more.
        if several and "GLOO_SOCKET_IFNAME" not in os.environ and (leading := interface_towards(mine.master_addr)):
            os.environ["GLOO_SOCKET_IFNAME"] = leading
        if restarted() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _move_to_a_new_store(mine)
    return mine


def _move_to_a_new_store(mine: Group) -> None:
    """Meet in another store than before a restart: there torch finds the addresses of processes that are gone.

    Its agent keeps one store for all starts, and with torch 2.13 gloo then waits forever, under torchrun too
    (https://github.com/pytorch/pytorch/issues/135712).
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    key = f"gptcli/port/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    old = TCPStore(mine.master_addr, mine.master_port, is_master=False)
    if mine.rank == 0:
        server = TCPStore(mine.master_addr, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        _OWN_STORES.append(server)
        old.set(key, str(server.port))
    os.environ["MASTER_PORT"] = old.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _quiet() -> None:
    """Before torch is imported: no C++ stack traces of its tries to connect; what matters is raised, and said once."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def local_processes(wanted: int | Literal["auto"], *, option: str = "launch.processes") -> int:
    """The number of processes that this machine runs: as wanted; auto: one a visible GPU, one on a CPU.

    Args:
        wanted: what the user says.
        option: where it is said.

    Raises:
        MissingError: there are GPUs, and fewer than processes.
    """
    devices = _gpus()
    if wanted == "auto":
        return max(devices, 1)
    if 0 < devices < wanted:
        raise MissingError(
            f"{option}: {wanted} processes, and this machine has {devices} GPU{'s' if devices > 1 else ''}",
            remedy=f"{option}={devices}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to work on the CPU.",
        )
    return wanted


def processes_to_start(wanted: int | Literal["auto"], nodes: int, rendezvous: str | None) -> int:
    """The number of workers that this process has to start here; 0: it trains itself.

    Args:
        wanted: the recipe's `launch.processes`.
        nodes: the recipe's `launch.nodes`.
        rendezvous: the recipe's `launch.rendezvous`.

    Raises:
        UsageError: the launcher and the recipe differ in the number of machines, nothing says where they meet, or see
            `recognise`.
        MissingError: see `local_processes`.
    """
    mine = group()
    if mine.launcher and not mine.per_machine:
        return 0
    if mine.world_size == 1 and nodes > 1 and rendezvous is None:
        raise UsageError(
            f"launch.nodes is {nodes}, and where the machines meet is not said",
            remedy="launch.rendezvous=HOST:PORT, one of the machines and a free port there; the same command on each.",
        )
    if mine.world_size == 1 and nodes > 1:
        _parts(rendezvous or "")
    here = local_processes(mine.processes or "auto" if wanted == "auto" else wanted)
    if mine.world_size == 1:
        return here if here * nodes > 1 else 0
    if nodes not in (1, mine.world_size):
        raise UsageError(
            f"launch.nodes is {nodes}, and {mine.launcher} started {mine.world_size} machines",
            remedy="Leave launch.nodes out: the launcher says it.",
        )
    return here if here > 1 else 0


def launch(
    arguments: Sequence[str],
    *,
    processes: int,
    nodes: int = 1,
    rendezvous: str | None = None,
    name: str = "gptcli",
    warn: Callable[[str], None] = lambda text: None,
    entrypoint: Sequence[str] | None = None,
    advice: tuple[str, str] = (LESS_MEMORY, GOES_ON),
) -> None:
    """Run a command on several processes and wait for them.

    Args:
        arguments: of the command line, the same for every worker.
        processes: on this machine.
        nodes: machines, when no launcher started one process on each.
        rendezvous: host:port at which the machines meet.
        name: of the run, the same on every machine.
        warn: where a restart is said.
        entrypoint: what Python runs before the arguments; none: gptcli.
        advice: what is said where a worker was killed: what to do against too little memory, and how it goes on.

    Raises:
        WorkersError: what the workers ended with, with their exit code.
        AbortedError: a signal came before there were workers.
        UsageError: GPTCLI_MAX_RESTARTS or GPTCLI_STEP_TIMEOUT is no number.
    """
    _quiet()

    import shutil
    import tempfile

    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous import RendezvousError

    from gptcli.agent import Agent, hearing_signals

    restarts, silence = _max_restarts(), step_seconds()
    agents: list[Agent] = []
    with hearing_signals(agents):
        handler, meeting = _meeting(nodes, rendezvous, name)
        reports = Path(tempfile.mkdtemp(prefix="gptcli-"))
        spec = WorkerSpec(
            role="gptcli",
            local_world_size=processes,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=(*(this_program() if entrypoint is None else entrypoint), *arguments),
            max_restarts=restarts if handler.get_backend() != "static" else 0,
        )
        variables = _variables(processes)
        agent = Agent(spec, reports=reports, variables=variables, warn=warn, silence=silence, advice=advice)
        agents.append(agent)
        try:
            agent.run()
        except (RendezvousError, DistError) as error:
            if agent.error is None:
                raise _lost(meeting) from error
        finally:
            with contextlib.suppress(RuntimeError):
                handler.shutdown()
            shutil.rmtree(reports, ignore_errors=True)
    if agent.error is not None:
        raise agent.error


def _meeting(nodes: int, endpoint: str | None, name: str) -> tuple[RendezvousHandler, str]:
    """torch's way for the machines to meet, and how to call it."""
    import logging
    import uuid

    import torch.distributed.elastic.rendezvous.registry as registry
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters

    if "LOGLEVEL" not in os.environ:  # torch's way to ask for it; what matters is said by `WorkersError`
        logging.getLogger("torch.distributed").handlers = [logging.NullHandler()]
    mine = group()
    if mine.world_size > 1:
        meeting = f"{mine.world_size} machines at {mine.master_addr}:{mine.master_port}"
        if mine.rank:
            _wait_for(mine.master_addr, mine.master_port, meeting)
        parameters = RendezvousParameters(
            "static",
            f"{mine.master_addr}:{mine.master_port}",
            name,
            mine.world_size,
            mine.world_size,
            rank=mine.rank,
            timeout=JOIN_SECONDS,
        )
        return registry.get_rendezvous_handler(parameters), meeting
    if nodes == 1:
        # A name of its own and a port that the system chooses: any number of runs beside each other.
        parameters = RendezvousParameters("c10d", f"{HERE}:0", uuid.uuid4().hex, 1, 1, local_addr=HERE, is_host="true")
        return registry.get_rendezvous_handler(parameters), HERE
    address, port = _parts(endpoint or "")
    meeting = f"{nodes} machines at {address}:{port}"
    for is_host in (is_ours_and_free(address, port), False):
        if not is_host:
            _wait_for(address, port, meeting)
        parameters = RendezvousParameters(
            "c10d",
            f"{address}:{port}",
            name,
            nodes,
            nodes,
            local_addr=address_for_others(address),
            join_timeout=JOIN_SECONDS,
            is_host=str(is_host).lower(),
        )
        try:
            return registry.get_rendezvous_handler(parameters), meeting
        except RendezvousConnectionError:  # another command on this machine was faster
            continue
    raise _lost(meeting)


def _parts(endpoint: str) -> tuple[str, int]:
    address, _, port = endpoint.rpartition(":")
    if not address or not port.isdecimal():
        raise UsageError(f"launch.rendezvous is {endpoint}: not host:port", remedy="launch.rendezvous=HOST:29400")
    return address.strip("[]"), int(port)


def _wait_for(address: str, port: int, meeting: str) -> None:
    """Wait until somebody listens there. torch waits too, but in C++, where Ctrl+C is not heard."""
    import socket

    until = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=TRY_SECONDS):
            return
        time.sleep(TRY_SECONDS)
    raise GptcliError(
        f"{meeting}: nobody listened there within {JOIN_SECONDS // 60} minutes",
        remedy="Run the same command on every machine; that port has to be open between them.",
    )


def _lost(meeting: str) -> GptcliError:
    return GptcliError(
        f"{meeting}: one of them did not come, or its command has ended",
        remedy="If it was running, the cause is in what it said there. The port has to be open between the machines.",
    )


def _max_restarts() -> int:
    text = os.environ.get("GPTCLI_MAX_RESTARTS", "0")
    if not text.isdecimal():
        raise UsageError(
            f"GPTCLI_MAX_RESTARTS={text}: not a number", remedy="How often a failed group is started again."
        )
    return int(text)


def _variables(processes: int) -> dict[str, str]:
    """The environment of the workers; the cores are divided among them unless OMP_NUM_THREADS says otherwise."""
    threads = str(max(1, cpu_cores() // processes))
    return {"OMP_NUM_THREADS": threads, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", **os.environ}


def this_program() -> tuple[str, ...]:
    """`-m gptcli`, and without the current folder on the path where the installed command has none there either."""
    started_by_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return ("-m", "gptcli") if started_by_module else ("-P", "-m", "gptcli")


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not (visible or any(os.path.exists(path) for path in GPU_FILES)):
        return 0
    _quiet()
    import torch

    return torch.cuda.device_count()


def follow_parent() -> None:
    """In a worker that gptcli started: stop, as by SIGTERM, when the parent has ended, also when it was killed (Linux).

    The kernel signals once for each thread of the parent that ends; a second SIGTERM would leave without saving.
    """
    parent = os.environ.get("GPTCLI_LAUNCHER_PID")
    if parent is None or not hasattr(signal, "SIGRTMIN"):
        return
    orphaned = signal.SIGRTMIN + 5  # one that nobody uses
    stopping = False

    def stop(number: int = 0, frame: FrameType | None = None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            os.kill(os.getpid(), signal.SIGTERM)

    import ctypes

    signal.signal(orphaned, stop)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, orphaned)
    if not os.path.exists(f"/proc/{parent}"):  # it ended before it was followed
        stop()


def hand_to_parent(error: GptcliError, traceback: str = "") -> bool:
    """Leave an error that ends this worker to the parent that started it; False: there is none, so print it."""
    folder = os.environ.get("GPTCLI_REPORTS")
    if folder is None:
        return False
    return _parent_lives() and write_report(Path(folder), report_of(error, rank(), traceback)) and _parent_lives()


def _parent_lives() -> bool:
    """Whether the parent of this worker is there; killed, it is a zombie until the last of its threads has ended."""
    parent = os.environ["GPTCLI_LAUNCHER_PID"]
    with contextlib.suppress(OSError):
        return (
            str(os.getppid()) == parent
            and Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        )
    return False


def place() -> str:
    """What this process is called beside others; empty for rank 0, and for one whose place cannot be known."""
    with contextlib.suppress(UsageError):
        mine = group()
        if mine.rank:
            return f"process {mine.rank} of {mine.world_size}"
    return ""
