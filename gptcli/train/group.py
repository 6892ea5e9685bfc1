"""What the processes of a run tell each other. With one process every function here is the identity.

Decisions are made once, by rank 0, and told (`from_first`), or agreed on by all (`most`); an error that rank 0 meets
in what it does for all is raised by all. This goes over sockets (gloo) beside the tensors' own way (NCCL on GPUs), so
that no decision waits for a device, and with a time-out of days, since others wait while rank 0 makes tokens. A process
that dies closes its sockets, which ends the others' waits at once; a machine that vanishes is noticed by its silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from gptcli import errors
from gptcli.device import cpu_cores
from gptcli.errors import AbortedError, GptcliError
from gptcli.launch import local_rank, local_world_size, rank, world_size
from gptcli.network import notice_silence, step_seconds

Value = TypeVar("Value")

WAIT_TIMEOUT = timedelta(days=7)
_words: Any = None


def join() -> None:
    """Meet the other processes of the run, if there are any; the device of this one is chosen."""
    global _words
    if world_size() == 1 or _words is not None:
        return
    import torch
    import torch.distributed as dist

    step_timeout = timedelta(seconds=step_seconds())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", timeout=step_timeout, device_id=device)
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, cpu_cores() // local_world_size())
            os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate looks there, and guesses otherwise
            torch.set_num_threads(threads)
        dist.init_process_group("gloo", timeout=step_timeout)
    _words = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    notice_silence(step_seconds())


def leave() -> None:
    """Wait for all others to come here, and part: no process ends while another needs it."""
    global _words
    if _words is None:
        return
    import torch.distributed as dist

    dist.barrier(_words)
    _words = None
    dist.destroy_process_group()


def from_first(do: Callable[[], Value]) -> Value:
    """What rank 0 gets from `do`, on all processes; only rank 0 calls it.

    Raises:
        GptcliError: what rank 0 raised, on all processes. Of another error the others hear that it was.
    """
    if _words is None:
        return do()
    if rank() != 0:
        told: Value = _taken(_told(None))
        return told
    try:
        value = do()
    except BaseException as error:
        told_error: BaseException = error
        if isinstance(error, KeyboardInterrupt):
            told_error = AbortedError("there was nothing to save")
        elif not isinstance(error, GptcliError):
            told_error = GptcliError(f"connection closed: process 0 failed ({type(error).__name__}: {error})")
        with suppress(RuntimeError):  # nobody is left to hear it
            _told((type(told_error).__name__, {**vars(told_error)}))
        raise
    _told((None, value))
    return value


def part(parts: int) -> tuple[int, int]:
    """(i, n): which of n parts of the rows this process takes; several take one where they divide the matrices."""
    return rank() * parts // world_size(), parts


def most(number: int) -> int:
    """The largest of the numbers that all processes bring."""
    if _words is None:
        return number
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_words)
    return int(tensor)


def total(numbers: Sequence[float]) -> list[float]:
    """The sums, over all processes, of the numbers that each brings, in fp64."""
    if _words is None:
        return list(numbers)
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, group=_words)
    return [float(number) for number in tensor]


def gathered(value: Value) -> list[Value]:
    """The values of all processes in the order of their ranks, on rank 0; an empty list elsewhere."""
    if _words is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, group=_words)
    return values or []


def _told(value: Any) -> Any:
    import torch.distributed as dist

    carried = [value]
    dist.broadcast_object_list(carried, src=0, group=_words)
    return carried[0]


def _taken(told: tuple[str | None, Any]) -> Any:
    kind, value = told
    if kind is None:
        return value
    error: GptcliError = getattr(errors, kind)(value["what"], remedy=value["remedy"])
    vars(error).update(value)
    raise error
