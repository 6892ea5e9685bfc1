"""An adapter's folder (peft's): looked at before peft opens it, its base found, and the two made one model.

An adapter is a small file of differences to a base model that lies elsewhere. Merged, the model is as fast as its base
and is a plain one of its type. As with a model, weights are safetensors and nothing else, and a tensor that is missing
or belongs to another base is an error; peft only warns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError, GptcliError, MissingError, UsageError, first_line, not_installed
from gptcli.model.folder import absurd_size
from gptcli.model.load import load_model
from gptcli.model.resize import resize
from gptcli.reporting import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")
NAME = "default"
UNUSED_ROWS = 4096  # numbers without a token, which some tokenizers have
# What makes a base another model before its weights change, or is code to import by name.
_REFUSED = ("layer_replication", "megatron_config")


def read_adapter(folder: Path) -> dict[str, Any]:
    """What adapter_config.json of a folder holds, which may be used.

    Raises:
        MissingError: the weights are missing, or are a pickle.
        CheckpointError: it is damaged.
        UsageError: it cannot be merged into a base.
    """
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise CheckpointError("damaged: not the settings of an adapter", where=str(path))
    if why := absurd_size(fields):
        raise CheckpointError(f"damaged: {why}", where=str(path))
    if refused := [name for name in _REFUSED if fields.get(name)]:
        raise UsageError(f"an adapter with {refused[0]} cannot be merged into its base", where=str(path))
    if not (folder / WEIGHTS).is_file():
        pickled = [name for name in PICKLES if (folder / name).exists()]
        raise MissingError(
            f"only {pickled[0]} here, no {WEIGHTS}" if pickled else f"no weights of an adapter here, no {WEIGHTS}",
            where=str(folder),
            remedy="Weights in a pickle can run code, so they are not loaded. Save the adapter again with today's peft."
            if pickled
            else None,
        )
    return fields


def base_of(folder: Path) -> tuple[Path, str | None]:
    """The base of an adapter, a folder or a Hub id, and the revision of the latter.

    A relative path is looked for from the current directory, as peft does, then from the adapter's folder.

    Raises:
        MissingError: none is named, or the one that is named is not here and is no Hub id.
        UsageError: it is an adapter itself.
    """
    fields = read_adapter(folder)
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    where = str(folder / CONFIG)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise MissingError(
            "the adapter does not say which model it belongs to",
            where=where,
            remedy="Set base_model_name_or_path there to that model's folder or Hub id.",
        )
    given = Path(name).expanduser()
    base = next((path for path in (given, folder / given) if path.is_dir()), None)
    if base is None:
        if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) or given.exists():
            raise MissingError(
                f"the base of the adapter is not here: {name}",
                where=where,
                remedy="Put that model's folder there, or set base_model_name_or_path to where it is, or to a Hub id.",
            )
        return given, revision if isinstance(revision, str) else None
    if (base / CONFIG).is_file() and not (base / "config.json").is_file():
        raise UsageError(
            f"the base of the adapter is an adapter itself: {base}",
            where=where,
            remedy=f"Merge that one first: gptcli export {base} --merge --output FOLDER",
        )
    return base, None


def load_merged(folder: Path, **options: Any) -> PreTrainedModel:
    """The base of an adapter with the adapter in its weights, in evaluation mode; `options` are `load_model`'s.

    Raises:
        MissingError: peft or the base is missing.
        CheckpointError: adapter and base do not belong together, or are damaged.
        UsageError: an adapter of a kind that is no change of weights.
    """
    base, revision = base_of(folder)
    with quiet(), _adapter_errors(folder):
        named = tensor_names(folder)
    try:
        import peft
    except ImportError:
        raise not_installed(f"the adapter {folder}", "peft", "adapters") from None
    with quiet(), _adapter_errors(folder):
        settings = peft.PeftConfig.from_pretrained(str(folder))
        if settings.is_prompt_learning or settings.is_adaption_prompt:
            raise UsageError(
                f"{settings.peft_type.value} is no change of weights, so it cannot be merged into a model",
                where=str(folder),
                remedy="Adapters such as LoRA, DoRA and IA3 can.",
            )
    try:
        model = load_model(base, **{**options, "revision": revision})
    except GptcliError as error:
        error.what = f"the base of the adapter {folder}: {error.what}"
        raise
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError("the base is quantized, so an adapter cannot be merged into it", where=str(base))
    with quiet(), _adapter_errors(folder):
        resize(model, _rows(settings, model, folder))
        _untie(model, named)
        return _merge(model, settings, folder)


def tensor_names(folder: Path) -> set[str]:
    """The names of an adapter's tensors, none of which is smaller than its settings say: peft would take the memory.

    Raises:
        CheckpointError: the rank is larger than any side of a tensor.
    """
    from safetensors import safe_open

    fields = read_adapter(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        largest = max((size for name in file.keys() for size in file.get_slice(name).get_shape()), default=0)  # noqa: SIM118
        named = set(file.keys())
    pattern = fields.get("rank_pattern")
    ranks = [fields.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    if absurd := [rank for rank in ranks if isinstance(rank, int) and rank > largest]:
        raise CheckpointError(
            f"damaged: an adapter of rank {absurd[0]:,}, and no tensor of it has a side of more than {largest:,}",
            where=str(folder / CONFIG),
        )
    return named


def _rows(settings: Any, model: PreTrainedModel, folder: Path) -> int:
    """The rows of embeddings that an adapter needs: it may have been trained on tokens that its base has not.

    Raises:
        CheckpointError: it names rows far behind the last one, for which memory would be taken.
    """
    named = getattr(settings, "trainable_token_indices", None) or ()
    embeddings: Any = model.get_input_embeddings()
    rows = int(embeddings.weight.shape[0])
    beyond = {number for each in (named.values() if isinstance(named, dict) else [named]) for number in each}
    beyond = {number for number in beyond if number >= rows}
    last = max(beyond, default=rows - 1)
    if last - rows > len(beyond) + UNUSED_ROWS:
        raise CheckpointError(
            f"damaged: an adapter of {len(beyond):,} new tokens names the number {last:,}, and its base has {rows:,}",
            where=str(folder / CONFIG),
        )
    return int(last) + 1


def _merge(model: PreTrainedModel, settings: Any, folder: Path) -> PreTrainedModel:
    import peft

    settings.inference_mode = True
    wrapped = peft.PeftModelForCausalLM(model, settings, adapter_name=NAME, low_cpu_mem_usage=True)
    told = wrapped.load_adapter(
        str(folder), NAME, torch_device=str(model.device), is_trainable=False, low_cpu_mem_usage=True
    )
    if wrong := sorted([*told.missing_keys, *told.unexpected_keys]):
        raise CheckpointError(
            f"{len(wrong)} tensors of the adapter are missing or belong to another base: {wrong[0]}",
            where=str(folder),
            remedy="Adapter and base do not belong together; check base_model_name_or_path.",
        )
    merged: Any = wrapped.merge_and_unload(safe_merge=True)
    _tie_again(merged)
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    model = merged.eval()
    return model


def _untie(model: PreTrainedModel, adapted: set[str]) -> None:
    """Give the output layer a matrix of its own where an adapter changes it or the embeddings: merged into one that
    both share, a change would reach the other, too.
    """
    import torch

    ends = {name for name, module in model.named_modules() if module in _ends(model)}
    # Rows of new tokens are trained as one where the matrices are.
    changed = {key for key in adapted if ".token_adapter." not in key}
    if _is_tied(model) and any(f".{end}." in f".{key}." for key in changed for end in ends):
        _, output = _ends(model)
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        _say_tied(model, False)


def _tie_again(model: PreTrainedModel) -> None:
    """Say that the matrices of embeddings and output differ, where an adapter's saved copies do."""
    import torch

    embeddings, output = _ends(model)
    if output is None or not model.config.get_text_config().tie_word_embeddings:
        return
    first, last = embeddings.weight, output.weight
    if first is last:
        return
    if first.shape == last.shape and torch.equal(first, last):
        output.weight = first
    else:
        _say_tied(model, False)


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _is_tied(model: PreTrainedModel) -> bool:
    embeddings, output = _ends(model)
    return output is not None and embeddings.weight is output.weight


def _say_tied(model: PreTrainedModel, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


@contextmanager
def _adapter_errors(folder: Path) -> Iterator[None]:
    """Turn what peft raises for a bad adapter into our errors."""
    try:
        yield
    except (GptcliError, MemoryError):
        raise
    except Exception as error:
        from gptcli.device import is_out_of_memory

        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"the adapter cannot be used with its base: {first_line(error)[:300]}",
            where=str(folder),
            remedy="Adapter and base may not belong together; check base_model_name_or_path in adapter_config.json.",
        ) from error
