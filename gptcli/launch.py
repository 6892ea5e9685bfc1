"""Which process of a launched group this is, read from the environment that torchrun and accelerate set.

Starting the processes is not here yet: one process trains, and `launch.processes` above 1 is refused.
"""

from __future__ import annotations

import os


def rank() -> int:
    """The rank of this process over all machines, 0 when it was not launched in a group."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of the group, 1 when this process was not launched in one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one process that prints and writes."""
    return rank() == 0


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of processes of the group on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
