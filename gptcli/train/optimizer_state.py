"""An optimizer's state by the names of the parameters, so that it does not depend on their order or division.

torch numbers parameters in the order in which a process happened to list them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


def by_name(model: nn.Module, optimizer: Any, owner: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The state of an optimizer of `model`, whole.

    `owner`: of a divided model, the rank that has the state of each parameter: the others, which all call this
    together, have nothing of it.
    """
    from gptcli.launch import rank
    from gptcli.train.sharding import whole

    names = _names(model, optimizer)
    state = optimizer.state_dict()
    found = {}
    for number, values in state["state"].items():
        if owner is None:
            found[names[number]] = values
            continue
        every = {key: whole(value) if hasattr(value, "shape") else value for key, value in values.items()}
        if owner[names[number]] == rank():
            found[names[number]] = {
                key: value.cpu() if hasattr(value, "cpu") else value for key, value in every.items()
            }
    return {
        "state": found,
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write what `by_name` returned into a folder."""
    import torch

    torch.save(state, folder / OPTIMIZER)


def save_schedule(folder: Path, scheduler: Any) -> None:
    """Write the state of the schedule into a folder."""
    import torch

    torch.save(scheduler.state_dict(), folder / SCHEDULER)


def load(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Fill an optimizer of `model` and its schedule from a folder that `save` wrote. No code of a file is run.

    Raises:
        CheckpointError: the state is another optimizer's or model's.
        Exception: of torch, for files that cannot be read or hold other objects.
    """
    import torch

    from gptcli.train.sharding import divided_like, is_divided

    saved = _saved(folder, mapped=is_divided(model))
    schedule = torch.load(folder / SCHEDULER, map_location="cpu", weights_only=True)
    names = _names(model, optimizer)
    numbers = {name: number for number, name in enumerate(names)}
    # By parameter: a divided model's groups are more, of those that are divided alike.
    settings = {
        name: {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in saved["param_groups"]
        for name in group["params"]
    }
    ordered = []
    for group in optimizer.state_dict()["param_groups"]:  # torch goes by positions: all in the order of now
        of_group = [names[number] for number in group["params"]]
        found = [settings.get(name) for name in of_group]
        if settings.keys() != numbers.keys() or any(fields != found[0] for fields in found):
            raise CheckpointError(
                "the optimizer's state cannot be restored: it is of other parameters, or of others together",
                where=str(folder),
                remedy="Resume from another checkpoint with --resume PATH, or train anew with --overwrite.",
            )
        ordered.append({**group, **(found[0] or {} if found else {})})
    parameters = dict(model.named_parameters())
    state = {
        numbers[name]: {
            key: divided_like(value, parameters[name]) if hasattr(value, "shape") else value
            for key, value in values.items()
        }
        for name, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": ordered})
    scheduler.load_state_dict(schedule)


def _saved(folder: Path, *, mapped: bool) -> dict[str, Any]:
    """What `save` wrote, by one process or by several; `mapped`: read when it is used."""
    import torch

    files = sorted(folder.glob("optimizer*.pt")) or [folder / OPTIMIZER]
    parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=mapped) for path in files]
    return {**parts[0], "state": {name: values for part in parts for name, values in part["state"].items()}}


def _names(model: nn.Module, optimizer: Any) -> list[str]:
    """The parameters' names, as torch numbers them."""
    if (known := getattr(optimizer, "parameter_names", None)) is not None:  # of one that updates others in their place
        return list(known)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
