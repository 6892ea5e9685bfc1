"""An optimizer's state by the names of the parameters, so that it does not depend on their order or division.

torch numbers parameters in the order in which a process happened to list them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


def save(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Write the state of an optimizer of `model` and of its schedule into a folder."""
    import torch

    names = _names(model, optimizer)
    state = optimizer.state_dict()
    by_name = {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
    torch.save(by_name, folder / OPTIMIZER)
    torch.save(scheduler.state_dict(), folder / SCHEDULER)


def load(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Fill an optimizer of `model` and its schedule from a folder that `save` wrote. No code of a file is run.

    Raises:
        CheckpointError: the state is another optimizer's or model's.
        Exception: of torch, for files that cannot be read or hold other objects.
    """
    import torch

    saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    schedule = torch.load(folder / SCHEDULER, map_location="cpu", weights_only=True)
    names = _names(model, optimizer)
    numbers = {name: number for number, name in enumerate(names)}
    groups = {frozenset(group["params"]): group for group in saved["param_groups"]}
    ordered = []
    for group in optimizer.state_dict()["param_groups"]:  # torch goes by positions: all in the order of now
        of_group = [names[number] for number in group["params"]]
        if frozenset(of_group) not in groups or len(groups) != len(optimizer.param_groups):
            raise CheckpointError(
                "the optimizer's state cannot be restored: it is of other parameters, or of others together",
                where=str(folder),
                remedy="Resume from another checkpoint with --resume PATH, or train anew with --overwrite.",
            )
        fields = {**groups[frozenset(of_group)], "params": group["params"]}
        ordered.append({**fields, **({"param_names": of_group} if "param_names" in fields else {})})
    state = {numbers[name]: values for name, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": ordered})
    scheduler.load_state_dict(schedule)


def _names(model: nn.Module, optimizer: Any) -> list[str]:
    """The parameters' names, as torch numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
