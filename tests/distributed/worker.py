"""A worker without a trainer: `worker.py BEHAVIOUR FOLDER`, whose errors take the way of every command's.

It leaves files in the folder by which a test knows where it is: `ready-RANK`, `signals-RANK`, `starts-RANK`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType

import gptcli.cli.main as cli
from gptcli.errors import DataError, StoppedError
from gptcli.launch import join, rank, restarted, world_size

FOLDER = Path(sys.argv[2])
LONG = timedelta(hours=1)


def note(name: str, text: str) -> None:
    with (FOLDER / f"{name}-{rank()}").open("a") as file:
        file.write(f"{text}\n")


def gloo() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=LONG)
    dist.barrier()


def reduced(value: float) -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([value])
    dist.all_reduce(tensor)
    return float(tensor)


def done() -> None:
    note("ready", " ".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")))


def listen() -> list[str]:
    """As a training does: the first signal is noted, the second leaves at once."""
    came: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(signal.Signals(number).name)
        note("signals", came[-1])
        if len(came) > 1:
            os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)
    return came


def saved(reason: str) -> StoppedError:
    return StoppedError(f"by {reason}; step 3 is saved", remedy="The same command goes on.")


def stop() -> None:
    came = listen()
    note("ready", str(os.getpid()))
    while not came:
        signal.pause()
    raise saved(came[0])


def never_ends() -> None:
    """One that a signal does not end: its step takes forever."""
    listen()
    note("ready", str(os.getpid()))
    while True:
        signal.pause()


def slow_save() -> None:
    """Rank 0 saves long after the other has ended, longer than a failure's followers are given."""
    came = listen()
    note("ready", str(os.getpid()))
    while not came:
        signal.pause()
    if rank() == 0:
        time.sleep(4)
    raise saved(came[0])


def agree() -> None:
    came = listen()
    gloo()
    note("ready", str(os.getpid()))
    while not reduced(float(bool(came))):
        time.sleep(0.01)
    raise saved("SIGTERM")


def typed() -> None:
    gloo()
    if rank() == 1:
        raise DataError("row 7 is no text", where="a.jsonl:7", remedy="Mend it.")
    reduced(1.0)


def all_typed() -> None:
    raise DataError("row 7 is no text", where="a.jsonl:7")


def unexpected() -> None:
    gloo()
    if rank() == 1:
        raise ValueError("a shape that nobody thought of")
    reduced(1.0)


def killed() -> None:
    note("starts", os.environ["TORCHELASTIC_RESTART_COUNT"])
    gloo()
    if rank() == 1 and not restarted():
        os.kill(os.getpid(), signal.SIGKILL)
    reduced(1.0)


def segfault() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    stop()


def deaf() -> None:
    """Rank 0 waits where no signal is heard, as in a collective of NCCL, for what rank 1 will never send."""
    listen()
    if rank() == 1:
        raise DataError("row 7 is no text", where="a.jsonl:7")
    from torch.distributed import TCPStore

    TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size(), False).wait(["never"], LONG)


BEHAVIOURS: dict[str, Callable[[], None]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__
}


def run(behaviour: str) -> None:
    join()
    try:
        BEHAVIOURS[behaviour]()
    finally:
        if "torch.distributed" in sys.modules:
            import torch.distributed as dist

            # Without it gloo's threads may still run when the interpreter is torn down, and abort it.
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    cli.build_app = lambda wanted: lambda args, standalone_mode: run(args[0])  # type: ignore[assignment,misc]
    sys.exit(cli.main(sys.argv[1:]))
