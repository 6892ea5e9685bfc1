"""The random states of a run's processes, in a checkpoint: one file a process, so that each goes on with its own.

On another number of processes there is nothing to go on with. Each then draws from a seed of its own, made from the
run's and the step's: dropout differs, the rows and their order do not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcli.files import fingerprint

PREFIX = "rng_state"


def state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, and of the GPU that this process uses."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    assert isinstance(numpy, tuple)
    found = {
        "python": [python[0], list(python[1]), python[2]],
        # As plain numbers, so that a file of it is read without running any code.
        "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
        "cpu": torch.get_rng_state(),
    }
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def save(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Write the states of all processes, in the order of their ranks."""
    import torch

    for rank, of_one in enumerate(states):
        torch.save(of_one, folder / _name(rank, len(states)))


def load(folder: Path, rank: int, processes: int) -> bool:
    """Restore the state of one of so many processes; False when the checkpoint is of another number of them.

    Raises:
        Exception: of torch, for a file that cannot be read or holds other objects.
    """
    import numpy as np
    import torch

    if len(list(folder.glob(f"{PREFIX}*"))) != processes:
        return False
    found = torch.load(folder / _name(rank, processes), map_location="cpu", weights_only=True)
    version, numbers, gauss = found["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(found["cpu"])
    if torch.cuda.is_available() and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])
    return True


def separate(seed: int, step: int, rank: int) -> None:
    """Let a process draw other numbers than the others from here on."""
    import numpy as np
    import torch

    own = int(fingerprint([seed, step, rank]), 16) % 2**32
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def _name(rank: int, processes: int) -> str:
    return f"{PREFIX}.pth" if processes == 1 else f"{PREFIX}_{rank}.pth"
