"""A model divided over the processes of a run: torch's FSDP2 by transformers' own `distributed`, on GPUs and CPUs.

Each layer's weights, gradients and optimizer state are divided, and gathered for the layer's own pass alone (Zhao et
al. 2023, arXiv:2304.11277). accelerate's plugin for it is not used: on a CPU it turns into DistributedDataParallel
without a word (1.15). What is asked for and did not happen is an error here (`check_divided`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from gptcli.errors import RecipeError, first_line
from gptcli.launch import rank, world_size
from gptcli.model.saved import fit, saved_state
from gptcli.reporting import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.sections_rest import Fsdp, Launch

FREE, KEEP = "free_full_weight", "keep_full_weight"


def divide(model: PreTrainedModel, launch: Launch, *, strategy: str, processes: int, bf16: bool) -> None:
    """Divide a model over so many processes, in place; its parameters are DTensors then.

    Args:
        model: the whole model, the same on every process.
        launch: the recipe's section.
        strategy: fsdp; with ddp only the matrices are divided, over `launch.parallel.tp` processes.
        processes: those of the run.
        bf16: whether fsdp gathers weights, and computes with them, in bf16; gradients are summed in fp32 all the same.

    Raises:
        RecipeError: the model has no layers by which it could be divided, or stayed whole.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    # A matrix that is divided twice is gathered in two steps, which torch says for each of them at every save.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    settings, parallel = launch.fsdp, launch.parallel
    rows = processes // parallel.tp
    copied = parallel.dp_replicate if strategy == "fsdp" else rows
    if rows % copied:
        raise RecipeError(
            f"launch.parallel.dp_replicate: {copied} copies do not divide {rows} processes",
            remedy=f"Set it to a divisor of {rows}.",
        )
    plan = dict.fromkeys(layer_names(model, settings), FREE if settings.reshard_after_forward else KEEP)
    try:
        config = DistributedConfig(
            tp_size=parallel.tp,
            dp_replicate_size=copied,
            fsdp_size=rows // copied,
            fsdp_plan=plan,
            fsdp_cpu_offload=settings.cpu_offload,
            fsdp_mixed_precision=bf16,
        )
        kind = type(model)
        with quiet():  # of rules for the names of other models
            _, _, mesh = kind.prepare_distribute_model(config)
            kind.maybe_distribute_model(model, config, mesh)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(
            f"launch: transformers cannot divide {type(model).__name__}: {first_line(error)}",
            remedy="Set launch.strategy: ddp and leave launch.parallel out.",
        ) from error
    check_divided(model, rows // copied)


def layer_names(model: PreTrainedModel, settings: Fsdp) -> list[str]:
    """The modules that are gathered one after the other, `model.layers.*`: those of the classes that the recipe names.

    Else those that transformers says are not to be split.
    """
    named = settings.transformer_layer_cls_to_wrap
    classes = {named} if isinstance(named, str) else set(named or model._no_split_modules or ())
    found = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, part in model.named_modules() if type(part).__name__ in classes
    }
    if not found:
        asked = ", ".join(sorted(classes)) or "none that transformers names"
        raise RecipeError(
            f"launch.strategy: fsdp finds no layers in {type(model).__name__} ({asked})",
            remedy="Name their class in launch.fsdp.transformer_layer_cls_to_wrap, or set launch.strategy: ddp.",
        )
    return sorted(found)


def check_divided(model: nn.Module, processes: int) -> None:
    """Refuse a model of which not every parameter is divided over so many processes."""
    from torch.distributed.tensor import DTensor

    if processes == 1:
        return
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    held = sum(local(parameter).numel() for parameter in model.parameters())
    every = sum(parameter.numel() for parameter in model.parameters())
    # The first rank's parts are rounded up: by at most one row of each parameter.
    rows = sum(parameter.numel() // max(1, parameter.shape[0]) for parameter in model.parameters())
    refuse_whole(model, "fsdp", whole=len(whole), held=held, every=every, most=every / processes + rows)


def refuse_whole(model: nn.Module, strategy: str, *, whole: int, held: int, every: int, most: float) -> None:
    """Raise a `RecipeError` where parameters stayed whole, or this process holds more values than `most` of `every`."""
    if whole or held > most:
        raise RecipeError(
            f"launch.strategy: {strategy} did not divide {type(model).__name__}: {whole} parameters are whole, "
            f"{held:,} of {every:,} values are here",
            remedy=f"Set launch.strategy: {'ddp' if strategy == 'fsdp' else 'fsdp'}.",
        )


def is_divided(model: nn.Module) -> bool:
    """Whether a model was divided by `divide`."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def part_again(model: nn.Module) -> None:
    """Give back what a forward pass gathered that no backward pass followed: of the root, and of layers that keep it.

    Until then these parameters are others than the optimizer's.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    to_local = getattr(tensor, "to_local", None)
    part: torch.Tensor = tensor if to_local is None else to_local()
    return part


def copies(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """How many processes hold the same part of each of a model's tensors; None of a model that is not divided."""
    from torch.distributed.tensor import DTensor

    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return None
    found = []
    for tensor in tensors:
        parts = 1
        if isinstance(tensor, DTensor):
            sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
            parts = math.prod(size for size, placement in sizes if not placement.is_replicate())
        found.append(world_size() // parts)
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be divided; all processes ask for it together."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type  # where the processes talk; with fsdp's cpu_offload the parts lie on the host
    on_device = tensor if tensor.to_local().device.type == kind else tensor.to(kind)
    every: torch.Tensor = cast("DTensor", on_device).full_tensor()
    return every


def divided_like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, divided as another of its shape is; itself where that is not divided."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    mesh = pattern.device_mesh
    copied = DTensor.from_local(tensor.to(pattern.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copied.redistribute(placements=pattern.placements)


def owned_weights(model: PreTrainedModel, owner: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The weights of a divided model that this process owns, whole, on the host; all processes call it together.

    Args:
        model: the model.
        owner: the rank that owns each, by its name (`weight_sizes` has the names).
    """
    state = model.state_dict()
    found = {}
    for name in owner:
        tensor = whole(state[name].detach())
        if owner[name] == rank():
            found[name] = tensor.cpu()
    return found


def weight_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of each weight that a model's folder has, whole; a tied one once."""
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value.numel() * value.element_size() for name, value in model.state_dict().items() if name in own}


def load_weights(model: PreTrainedModel, folder: Path) -> Any:
    """Fill a divided model from a folder with safetensors, one tensor at a time; what `load_state_dict` returns."""
    from safetensors import safe_open

    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def put(name: str, value: torch.Tensor) -> None:
        local(places[name]).copy_(local(divided_like(value, places[name])))

    paths = sorted(folder.glob("model*.safetensors"))
    with ExitStack() as opened, torch.no_grad():
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no dict)
        if holders.keys() <= places.keys():
            for name, file in holders.items():
                put(name, file.get_tensor(name))
            return fit(model, holders)
        state = saved_state(model, folder)  # in other pieces than the model's, or not its own
        for name in state.keys() & places.keys():
            put(name, state[name])
        return fit(model, state)
