"""A model as a folder for others: weights, tokenizer, processor, settings of generation, chat template, card, no more.

What is written was loaded, so it loads again. It is made in a folder beside its place and moved there by one rename:
there is never half of it. Memory: the model in fp32.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptcli import __version__
from gptcli.errors import CheckpointError, UsageError, writing
from gptcli.files import committed_folder, leads_out, system_errors, write_atomic
from gptcli.model.adapters import base_of
from gptcli.model.card import card_head
from gptcli.model.folder import is_adapter
from gptcli.model.load import load_config, load_model, load_tokenizer, memory_errors, model_home, processor_home
from gptcli.model.quantize import Quantized, check_can_save, model_bytes, quantize
from gptcli.processors import PROCESSOR_FILES
from gptcli.reporting import Reporter, Silent, mebibytes, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SavedPrecision = Literal["auto", "fp32", "bf16"]
# Of configuration, tokenizer and card.
ROOM_BESIDE_WEIGHTS = 16 << 20
ADAPTER = "adapter"  # beside a model that it was merged into


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the folder, its weights' bytes and dtype, and how it was quantized."""

    folder: Path
    parameters: int
    bytes: int
    dtype: str
    quantized: Quantized | None


def check_source(source: Path, *, merge: bool) -> None:
    """Say whether `--merge` fits what is to be exported. Raises `UsageError`."""
    if merge and not is_adapter(source):
        raise UsageError(
            f"--merge: {source} is no adapter",
            remedy="It is a whole model already (or a Hub id); leave out --merge. An adapter's folder has "
            "adapter_config.json.",
        )
    if is_adapter(source) and not merge:
        raise UsageError(
            f"{source} is an adapter, which is no model without its base",
            remedy="Add --merge, which writes its base with it merged in.",
        )


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds something, unless it may be overwritten and is a model's folder or a file like it.

    Raises:
        UsageError: it exists, or the source is in it.
    """
    if not target.exists() and not target.is_symlink():
        return
    if source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{target} holds the model that is to be exported", remedy="Name another place.")
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target} exists", remedy="Name another place, or add --overwrite to replace it.")
    if target.is_dir() and not (target / "config.json").is_file():
        raise UsageError(
            f"{target} is a folder that holds no model, so it is not overwritten", remedy="Name another place."
        )


def export(
    source: Path,
    target: Path,
    *,
    precision: SavedPrecision = "auto",
    quantization: str | None = None,
    reporter: Reporter,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a model as a plain Hugging Face folder; an adapter is merged into its base.

    Args:
        source: a model's or adapter's folder, or a Hub id.
        target: the folder; one that is there is replaced (see `check_target`).
        precision: of the weights in the folder; auto: as they are.
        quantization: "int8" or "int4", for the linear layers.
        reporter: where it is said what was done.
        trust_remote_code: as for `load_model`.

    Raises:
        UsageError, MissingError: see `load_model` and `quantize`.
        CheckpointError: the model is damaged, or the folder cannot be written.
    """
    import torch

    from gptcli.device import best_device

    if best_device().type == "cpu":
        # accelerate imports DeepSpeed where it is installed, which says on standard output that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = best_device() if quantization == "int4" else torch.device("cpu")  # int8 is the same on any
    if quantization is not None:
        check_can_save(quantization, device.type)
    dtype = _dtype(source, precision, trust_remote_code)
    with memory_errors("An export needs 4 bytes a parameter. Close other programs, or take a larger machine."):
        tokenizer: Any = load_tokenizer(source, trust_remote_code=trust_remote_code)
        home = processor_home(source, trust_remote_code=trust_remote_code)
        processor = [] if home is None else [home / name for name in PROCESSOR_FILES if (home / name).is_file()]
        if linked := [path for path in processor if leads_out(path) is not None]:
            raise UsageError(
                f"{linked[0]} is a link out of its folder, to {leads_out(linked[0])}",
                remedy="It would be copied into the export. Put the file itself there if it is meant.",
            )
        model: Any = load_model(source, dtype="fp32", device=device, trust_remote_code=trust_remote_code)
        parameters = model.num_parameters()
        if is_adapter(source):
            reporter.say(f"merged {source} into {base_of(source)[0]}")
        model.to(dtype)
        quantized = None
        if quantization is not None:
            quantized = quantize(model, quantization, to_save=True)
            reporter.say(str(quantized))
    size = model_bytes(model)
    check_room(target, size + ROOM_BESIDE_WEIGHTS)
    done = Exported(target, parameters, size, str(model.dtype).removeprefix("torch."), quantized)
    with (
        writing(target, "the export", "Nothing of it is left behind."),
        committed_folder(target) as work,
        system_errors(work),
        quiet(),
    ):
        model.save_pretrained(str(work))
        tokenizer.save_pretrained(str(work))
        for path in processor:
            shutil.copyfile(path, work / path.name)
        write_atomic(work / "README.md", _card(source, done, model))
    reporter.say(f"{target}: {parameters:,} parameters, {done.dtype}, {mebibytes(size)}")
    return done


def merge(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Make a plain model in fp32 of an adapter's folder, in place: its base with it merged in, as `export` does.

    The adapter stays, in `adapter/` of the folder. Raises as `export` does.
    """
    kept, whole = folder / ADAPTER, folder / "whole"
    kept.mkdir()
    for path in [path for path in folder.iterdir() if path != kept]:
        path.rename(kept / path.name)
    export(kept, whole, precision="fp32", reporter=Silent(), trust_remote_code=trust_remote_code)
    for path in list(whole.iterdir()):
        path.rename(folder / path.name)
    whole.rmdir()


def check_room(target: Path, needed: int) -> None:
    """Compare the bytes that will be written with what is free. Raises `CheckpointError`."""
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"the export needs about {mebibytes(needed)} of disk and {mebibytes(free)} are free",
            where=str(target),
            remedy="Make room, or name a place on another disk.",
        )


def _dtype(source: Path, precision: SavedPrecision, trust_remote_code: bool) -> torch.dtype:
    """The dtype of what is written; auto: that of the source, an adapter's base.

    Raises:
        UsageError: the source is quantized.
    """
    import torch

    folder, revision = model_home(source)
    config = load_config(folder, trust_remote_code=trust_remote_code, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{folder} is quantized, and an export begins with whole weights",
            remedy="Export the model that it was made of.",
        )
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    said = config.dtype
    return said if isinstance(said, torch.dtype) and said.is_floating_point else torch.float32


def _card(source: Path, done: Exported, model: PreTrainedModel) -> str:
    """The source's own model card with a paragraph on the export, or a short one."""
    how = [f"Exported by gptcli {__version__}: weights in {done.dtype}"]
    if is_adapter(source):
        how.append("an adapter merged into its base")
    if done.quantized is not None:
        how.append(f"the matrices of linear layers in {done.quantized.kind} (torchao)")
    paragraph = ", ".join(how) + "."
    own = source / "README.md"
    if own.is_file() and not is_adapter(source):
        return own.read_text(encoding="utf-8", errors="replace").rstrip() + f"\n\n## Export\n\n{paragraph}\n"
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = [("type", model.config.model_type), ("parameters", f"{done.parameters:,}")]
    if isinstance(context, int):
        rows.append(("context", f"{context:,} tokens"))
    return card_head(done.folder.name, paragraph, rows)
