"""The weights that a folder holds, by the names that the model's own code has them by.

transformers 5 computes with some models, such as mixtures of experts, in other pieces than they are published in (one
tensor of all experts), and writes the published ones. Its `from_pretrained` puts them together again; a state dict as
the files have it does not fit the model.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.reporting import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def saved_state(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the safetensors files in a folder, whole and on the host, by the names of `model`'s state.

    What the model has not keeps its name in the files, and what these lack is not there: `load_state_dict` tells both.

    Args:
        model: one of the same class and sizes; divided or not, its own values are left alone.
        folder: what `save_pretrained` wrote.

    Raises:
        Exception: of safetensors or transformers, for files that cannot be read.
    """
    from safetensors.torch import load_file

    saved: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        saved |= load_file(path)
    if saved.keys() <= model.state_dict().keys():
        return saved
    with quiet():
        filled, told = _own_class(model).from_pretrained(
            str(folder), dtype=model.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    own: dict[str, torch.Tensor] = filled.state_dict()
    state = {name: values for name, values in own.items() if name not in told["missing_keys"]}
    return state | {name: values for name, values in saved.items() if name in told["unexpected_keys"]}


def fit(model: PreTrainedModel, saved: Collection[str]) -> Any:
    """What `load_state_dict` would say of weights of such names: which a model lacks, and which it has not."""
    from torch.nn.modules.module import _IncompatibleKeys

    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    places = {*parameters, *(name for name, _ in model.named_buffers())}
    return _IncompatibleKeys([name for name in parameters if name not in saved], sorted(set(saved) - places))


def _own_class(model: PreTrainedModel) -> Any:
    """A model's class, without the one that FSDP2 puts before it."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
