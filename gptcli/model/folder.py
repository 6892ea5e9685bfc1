"""A model folder looked at before any library opens it: what its files say of weights, sizes and code.

A folder is a stranger's until it is known. Weights are the safetensors files in it and nothing else, its sizes are such
as a model can have, and it asks for no code that was not allowed. None of these looks costs more than reading two small
files; `check_parameters` makes the model on torch's meta device, which takes no memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError, MissingError
from gptcli.model.kinds import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
INDEX = ".safetensors.index.json"
# Of each thing that a model has one module of, so that a number is time and memory. The deepest published models have
# some 130 layers, the widest mixtures 512 experts.
MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH = 1_000, 10_000, 10_000_000
_LIMITS = (
    (re.compile(r"(n|num|encoder|decoder)_(\w+_)?(layers?|blocks?)|depth"), MAX_LAYERS),
    (re.compile(r"(n|num)_(\w+_)?experts?"), MAX_EXPERTS),
    (re.compile(r"(\w*(hidden|intermediate|vocab|embed|inner|ffn)\w*|head)_(size|dim)|(n|num)_\w*heads?"), MAX_WIDTH),
    (re.compile(r"n_embd|n_inner|d_model|d_ff"), MAX_WIDTH),
)
# A parameter takes a bit of a file at least, in the hardest quantized models that there are.
PARAMETERS_A_BYTE = 8
SMALL_MODEL = 10_000_000
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def absurd_size(fields: Mapping[str, Any]) -> str | None:
    """The first of a configuration's sizes that no model has, as a sentence; None when all can be."""
    for key, value in _fields(fields):
        if isinstance(value, int) and not isinstance(value, bool):
            limit = next((limit for name, limit in _LIMITS if name.fullmatch(key)), None)
            if limit is not None and not 0 <= value <= limit:
                number = f"{value:,}" if abs(value) < 10**15 else f"a number of {len(str(abs(value)))} digits"
                return f"{key} is {number}, which no model has (0 to {limit:,})"
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter (peft's) and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()


def read_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What config.json of a local folder holds, which may be used.

    Raises:
        MissingError: there is none, or it asks for code of the Hub that is not allowed.
        CheckpointError: it is no JSON object, or names sizes that no model has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingError(
            "no model in this folder (it has no config.json)",
            where=str(folder),
            remedy=f"It holds an adapter. A whole model of it: gptcli export {folder} --merge --output FOLDER"
            if is_adapter(folder)
            else "Give the folder that holds config.json and model.safetensors, for example runs/NAME/final.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError("damaged: not a JSON object", where=str(path))
    check_config(config, str(path), trust_remote_code=trust_remote_code)
    return config


def check_config(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> None:
    """Refuse absurd sizes, and kernels of the Hub, which are code, where that is not allowed."""
    if why := absurd_size(config):
        raise CheckpointError(f"damaged: {why}", where=where)
    kernels = [name for key, value in _fields(config) if key in _KERNELS for name in _names(value) if "/" in name]
    if kernels and not trust_remote_code:
        raise MissingError(
            f"this model asks for the kernel {kernels[0][:100]!r} of the Hub, which is code and is not run",
            where=where,
            remedy="Remove that line, or if you trust where it comes from: model.trust_remote_code: true in a recipe.",
        )


def check_weights(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files of a local folder's weights, all safetensors files of that folder.

    Raises:
        MissingError: there are none, or only pickles.
        CheckpointError: the index is damaged, or names other files; or there is an adapter beside the model.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            "this folder holds a whole model and an adapter, and which of them is meant is not said",
            where=str(folder),
            remedy="Remove adapter_config.json to use the model without it.",
        )
    chosen = config.get("transformers_weights")
    if chosen is not None:
        names = [_weights_name(chosen, folder / "config.json")]
    else:
        names = [name for name in WEIGHTS if (folder / name).is_file()][:1]
    if not names:
        raise _no_weights(folder)
    if not names[0].endswith(INDEX):
        return [folder / names[0]]
    return check_index(folder / names[0])


def check_index(index: Path) -> list[Path]:
    """The files that an index of weights names, all safetensors files beside it. Raises `CheckpointError`."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / _weights_name(name, index) for name in sorted(shards)]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CheckpointError("damaged: not an index of weights", where=str(index)) from None


def check_parameters(config: PreTrainedConfig, files: list[Path], **options: Any) -> None:
    """Refuse a configuration of many more parameters than the weights can hold, before memory is taken for them.

    `options` are for making the model. Raises `CheckpointError`.
    """
    import torch

    make: Any = auto_class(config).from_config
    size = sum(path.stat().st_size for path in files if path.is_file())
    with torch.device("meta"):
        made = make(config, **options)
    parameters = sum(parameter.numel() for parameter in made.parameters())
    if parameters > max(SMALL_MODEL, PARAMETERS_A_BYTE * size):
        raise CheckpointError(
            f"config.json describes a model of {parameters:,} parameters, and the weights have {size:,} bytes",
            where=str(files[0].parent) if files else None,
            remedy="They do not belong together; restore both from one place.",
        )


def _no_weights(folder: Path) -> MissingError:
    if pickles := [name for name in PICKLES if (folder / name).exists()]:
        return MissingError(
            f"only {pickles[0]} here, no safetensors weights",
            where=str(folder),
            remedy="Weights in a pickle can run code, so they are not loaded. If you trust where they come from,\n"
            'convert them on purpose: python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
            "'FOLDER', use_safetensors=False).save_pretrained('NEW_FOLDER')\"",
        )
    return MissingError("no weights in this folder", where=str(folder), remedy=f"Looked for {' and '.join(WEIGHTS)}.")


def _weights_name(name: Any, where: Path) -> str:
    if isinstance(name, str) and Path(name).name == name and name.endswith((".safetensors", INDEX)):
        return name
    raise CheckpointError(
        f"names {str(name)[:100]!r} as weights, which is no safetensors file of this folder",
        where=str(where),
        remedy="Weights of other kinds can run code, so they are not loaded.",
    )


def _fields(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a configuration and of those inside it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name), inner
            yield from _fields(inner, str(name))


def _names(value: Any) -> list[str]:
    """The implementation that is named, or those named for the parts of a model."""
    return [str(inner) for inner in value.values()] if isinstance(value, Mapping) else [str(value)]
