"""A model and its tokenizer from a folder or the Hub, safely and quietly.

Weights are safetensors only: a pickle is code of whoever wrote it, so it is refused (`model.folder` looks before any
library does). Code of a model's folder runs only where `trust_remote_code` is passed. A tensor that the weights lack,
or that has another shape, is an error; transformers would fill in random ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptcli.device import best_device, has_fast_bf16, is_out_of_memory
from gptcli.errors import (
    CheckpointError,
    GptcliError,
    MissingError,
    OutOfMemoryError,
    UsageError,
    first_line,
    not_installed,
)
from gptcli.model.folder import (
    INDEX,
    WEIGHTS,
    check_config,
    check_index,
    check_parameters,
    check_weights,
    is_adapter,
    read_config,
)
from gptcli.model.kinds import auto_class, is_multimodal, why_not_a_decoder
from gptcli.processors import has_processor
from gptcli.reporting import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["auto", "fp32", "bf16"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "tekken.json",
)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module of it back in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def choose_dtype(precision: Precision, device: torch.device, saved: str | None = None) -> tuple[torch.dtype, str]:
    """The dtype of the weights, and why.

    `auto` is bf16 on a GPU that multiplies it fast. A CPU keeps fp32, so that numbers equal any plain fp32 loop's, but
    for weights that were saved as bf16 (`saved`: the config's dtype) on a CPU with fast bf16.
    """
    import torch

    if precision == "fp32":
        return torch.float32, "as asked"
    if precision == "bf16":
        return torch.bfloat16, "as asked"
    if not has_fast_bf16(device):
        return torch.float32, f"this {device.type} has no fast bf16"
    if device.type == "cpu" and saved != "bfloat16":
        return torch.float32, "exact on a CPU"
    return torch.bfloat16, f"fast on this {device.type}"


def load_model(
    folder: Path,
    *,
    dtype: Precision = "auto",
    device: torch.device | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    four_bits: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode onto `device` (default: the best one), with its towers if any.

    Args:
        folder: a Hugging Face model folder, a Hub id (OWNER/NAME) as a path, or an adapter's folder, which is merged
            into its base.
        dtype: see `choose_dtype`.
        device: where the weights go.
        attention: a name of transformers' attention implementations; `auto` leaves the choice to transformers.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit of a Hub model.
        four_bits: hold the matrices of linear layers in 4 bits (bitsandbytes' NF4, scales quantized too).

    Raises:
        MissingError: no config, no safetensors weights, or the Hub cannot give them.
        CheckpointError: the files are damaged or do not belong together.
    """
    check_precision(dtype)
    if is_adapter(folder):
        from gptcli.model.adapters import load_merged

        return load_merged(folder, dtype=dtype, device=device, attention=attention, trust_remote_code=trust_remote_code)
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": folder.is_dir()}
    if revision is not None:
        shared["revision"] = revision
    config = load_config(folder, trust_remote_code=trust_remote_code, revision=revision)
    with quiet(), typed_errors(folder, "model"):
        device = device or best_device()
        if not folder.is_dir():
            _check_hub_weights(str(folder), config, revision)
        saved = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
        loaded: Any = auto_class(config).from_pretrained(
            str(folder),
            config=config,
            dtype=choose_dtype(dtype, device, saved)[0],
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are told below, with their shapes
            output_loading_info=True,
            **({} if attention == "auto" else {"attn_implementation": attention}),
            **(_in_four_bits(device) if four_bits else {}),
            **shared,
        )
        model, info = loaded
        if wrong := sorted(info["mismatched_keys"]):
            name, saved_shape, shape = wrong[0]
            raise CheckpointError(
                f"{len(wrong)} tensors have other shapes than config.json says: {name} has {list(saved_shape)} "
                f"in place of {list(shape)}",
                where=str(folder),
                remedy="config.json and the weights do not belong together; restore both from one place.",
            )
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"the weights lack {len(missing)} of the model's tensors: {', '.join(missing[:3])}",
                where=str(folder),
                remedy="config.json and the weights do not belong together; restore both from one place.",
            )
        with memory_errors("Try --precision bf16, or a machine with more memory."):
            placed: PreTrainedModel = model.to(device).eval()
        return placed


def _in_four_bits(device: torch.device) -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    quantization = make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_fast_bf16(device) else torch.float32,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def load_config(folder: Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model folder or a Hub id, without its weights; errors as `load_model`.

    That of a folder is compared with the sizes of the weights that lie beside it.
    """
    weights = None
    if folder.is_dir():
        weights = check_weights(folder, read_config(folder, trust_remote_code=trust_remote_code))
    with quiet(), typed_errors(folder, "model"):
        from transformers import AutoConfig, PreTrainedConfig

        shared: dict[str, Any] = {} if revision is None else {"revision": revision}
        if weights is None:  # for a Hub id what a folder's config.json was read for
            plain, _ = PreTrainedConfig.get_config_dict(str(folder), **shared)
            check_config(plain, str(folder), trust_remote_code=trust_remote_code)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=folder.is_dir(), **shared
        )
        if why := why_not_a_decoder(config):
            raise CheckpointError(why, where=str(folder), remedy="gptcli works with causal models.")
        if weights is not None:
            check_parameters(config, weights, trust_remote_code=trust_remote_code)
        return config


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, a Hub id or an adapter's folder; without its own the last has its base's.

    Raises:
        MissingError: there is none.
        CheckpointError: its files are damaged.
    """
    folder, revision = tokenizer_home(folder, revision)
    if folder.is_dir():
        check_tokenizer_files(folder)
    if (folder / "config.json").is_file():  # transformers reads it for a tokenizer too
        read_config(folder, trust_remote_code=trust_remote_code)
    with quiet(), typed_errors(folder, "tokenizer"):
        from transformers import AutoTokenizer

        shared: dict[str, Any] = {"revision": revision} if revision is not None else {}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=folder.is_dir(), **shared
        )
        return tokenizer


def tokenizer_home(folder: Path, revision: str | None = None) -> tuple[Path, str | None]:
    """Where a model's tokenizer is, and the revision there: the same place, but for an adapter's folder without one."""
    return (folder, revision) if _holds_tokenizer(folder) else model_home(folder, revision)


def model_home(folder: Path, revision: str | None = None) -> tuple[Path, str | None]:
    """Where a model's configuration is, and the revision there: the same place, but for an adapter that of its base."""
    if not is_adapter(folder):
        return folder, revision
    from gptcli.model.adapters import base_of

    return base_of(folder)


def processor_home(folder: Path, *, trust_remote_code: bool = False) -> Path | None:
    """The folder of a model's processor: its own, its base's if it is an adapter, or the Hub's cache; whether or not
    one is there. None: the model is one of text alone.

    Raises:
        MissingError, CheckpointError: as `load_config`.
    """
    base, revision = model_home(folder)
    if not is_multimodal(load_config(base, revision=revision, trust_remote_code=trust_remote_code).model_type):
        return None
    homes = (home for home in (folder, tokenizer_home(folder)[0], base) if has_processor(home))
    found = next(homes, None)
    if found is not None or base.is_dir():
        return found or base
    from huggingface_hub import snapshot_download

    with typed_errors(base, "processor"):
        files = ["*.json", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(str(base), revision=revision, allow_patterns=files))


def check_tokenizer_files(folder: Path) -> None:
    """Raise `MissingError` for a local folder without any file of a tokenizer."""
    if not _holds_tokenizer(folder):
        raise MissingError(
            "no tokenizer in this folder", where=str(folder), remedy=f"Looked for {', '.join(TOKENIZER_FILES)}."
        )


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions that the model was made for; None when its config names no limit."""
    return context_of(model.config)


def context_of(config: PreTrainedConfig) -> int | None:
    """`context_length`, from the configuration alone."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _check_hub_weights(name: str, config: PreTrainedConfig, revision: str | None) -> None:
    """Refuse a model of the Hub whose index names other files than safetensors, before these are fetched."""
    from transformers.utils.hub import cached_file

    explicit = getattr(config, "transformers_weights", None)
    index = str(explicit) if str(explicit).endswith(INDEX) else WEIGHTS[1]
    found = cached_file(
        name,
        index,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        check_index(Path(found))


def check_precision(precision: str) -> None:
    """Raise `UsageError` for what is no precision of weights."""
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is not one of auto, fp32, bf16")


@contextmanager
def typed_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises for a bad folder or a Hub that gives nothing into our errors."""
    try:
        yield
    except (GptcliError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        reason = first_line(error)[:300]
        if not folder.is_dir():
            offline = "HF_HUB_OFFLINE is set, so only its cache was read. " if os.environ.get("HF_HUB_OFFLINE") else ""
            raise MissingError(
                f"the {what} {str(folder)!r} could not be loaded from the Hub",
                remedy=f"{reason}\n{offline}Check the name and the network, or give a local folder.",
            ) from error
        if isinstance(error, ImportError):
            if error.name == "torchao":
                raise not_installed("reading quantized weights", "torchao", "quantize") from error
            raise MissingError(f"a package that this {what} needs is missing", remedy=reason) from error
        if "trust_remote_code" in str(error):
            raise MissingError(
                f"this {what} brings its own Python code, which is not run",
                where=str(folder),
                remedy="If you trust where it comes from: model.trust_remote_code: true in a recipe."
                if what == "model"
                else "Its tokenizer.json is data, and is used without the rest: tokenizer: {from: FOLDER} in a recipe.",
            ) from error
        raise CheckpointError(f"the {what} cannot be loaded: {reason}", where=str(folder)) from error


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn a device or a machine without enough memory into `OutOfMemoryError` with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError("not enough memory for this model", remedy=remedy) from error
