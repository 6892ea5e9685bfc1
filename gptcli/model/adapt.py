"""An adapter (LoRA, DoRA) on a model that is to be trained: put on it, written, read again, all by peft.

peft changes the model's linear layers in place and the model stays the class of transformers that it is, so that loss,
evaluation and generation see nothing new. Only the adapter's parameters take gradients; the folder that is written is
peft's own, which `model.adapters` (and peft without gptcli) puts on the base again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError, GptcliError, MissingError, RecipeError, first_line, not_installed
from gptcli.files import read_json, write_json
from gptcli.model.adapters import CONFIG, NAME, WEIGHTS, base_of, read_adapter, tensor_names
from gptcli.model.folder import is_adapter
from gptcli.model.towers import keep_evaluating, language_model
from gptcli.reporting import quiet

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from gptcli.recipe.load import LoadedRecipe

PREFIX = "base_model.model."  # of peft's own model around the one of transformers, in the names of the file
ALL_LINEAR = "all-linear"
EMBEDDINGS = "embeddings"
_GROUPS = {ALL_LINEAR, EMBEDDINGS}
BASE = "base.json"  # beside the adapter: what it was trained on


@dataclass(frozen=True)
class Base:
    """What an adapter belongs to: a path or a Hub id, its revision there, and a fingerprint of its weights."""

    name: str
    revision: str | None
    fingerprint: str


def put_adapter(model: PreTrainedModel, loaded: LoadedRecipe, new_tokens: Sequence[int] = ()) -> None:
    """Put the recipe's adapter on a model, in place, and leave nothing else to be trained.

    Args:
        model: the base; one on torch's meta device gets an adapter without values.
        loaded: the recipe: `finetune.adapter`, `lora`, `adapter_from` (whose shape and values are taken), `freeze`.
        new_tokens: ids whose rows of embeddings and output layer are trained beside the adapter.

    Raises:
        MissingError: peft is missing, or `adapter_from` holds no adapter.
        RecipeError: modules that the model has not, or an `adapter_from` of another kind.
        CheckpointError: `adapter_from` does not fit the model.
    """
    import torch

    finetune = loaded.recipe.finetune
    settings = _settings(model, loaded, new_tokens)
    torch.manual_seed(loaded.recipe.seed)
    with quiet():
        try:
            model.add_adapter(settings, NAME)
        except (ValueError, TypeError, NotImplementedError) as error:
            key = "finetune.lora.target_modules" if finetune.adapter_from is None else "finetune.adapter_from"
            raise RecipeError(
                f"{key}: peft cannot put this adapter on {type(model).__name__}: {first_line(error)[:300]}",
                where=loaded.where(key),
                remedy=f"Its linear layers: {', '.join(linear_names(model))}; or all-linear.",
            ) from error
    keep_evaluating(model)
    if finetune.adapter_from is not None and not next(model.parameters()).is_meta:
        read(model, Path(finetune.adapter_from))


def freeze(model: nn.Module, loaded: LoadedRecipe) -> None:
    """Stop the modules of `finetune.freeze` from being trained. Raises `RecipeError` for a prefix of none."""
    for module in _frozen(model, loaded):
        for parameter in model.get_submodule(module).parameters():
            parameter.requires_grad_(False)
    keep_evaluating(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("finetune.freeze: nothing is left to be trained", where=loaded.where("finetune.freeze"))


def is_adapted(model: nn.Module) -> bool:
    """Whether there is an adapter on a model (see `put_adapter`)."""
    return NAME in getattr(model, "peft_config", {})


def write(model: PreTrainedModel, folder: Path, base: Base) -> None:
    """Write the adapter of a model as peft does, with where its base is."""
    import peft
    from safetensors.torch import save_file

    with quiet():
        state = peft.get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / BASE, asdict(base))
    settings: Any = model.peft_config[NAME]
    settings.base_model_name_or_path, settings.revision = base.name, base.revision
    settings.inference_mode = True
    try:
        settings.save_pretrained(str(folder))
    finally:
        settings.inference_mode = False
    # peft keeps names in sets, whose order is another one in every process.
    fields = read_json(folder / CONFIG)
    write_json(folder / CONFIG, {key: sorted(v) if _are_names(v) else v for key, v in fields.items()})


def read(model: PreTrainedModel, folder: Path) -> None:
    """Fill the adapter on a model from a folder.

    Raises:
        CheckpointError: tensors are missing, or are those of another adapter or base.
    """
    import peft
    from safetensors.torch import load_file

    state = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    with quiet(), _misfit(folder):
        told = peft.set_peft_model_state_dict(model, state, adapter_name=NAME)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if wrong := sorted([*(trained & set(told.missing_keys)), *told.unexpected_keys]):
            raise CheckpointError(
                f"{len(wrong)} tensors of the adapter are missing or belong to another base: {wrong[0]}",
                where=str(folder),
            )


def check_adapter_from(loaded: LoadedRecipe, base: Base) -> None:
    """Refuse an `adapter_from` that was trained on another model than `model.from`.

    Raises:
        RecipeError: it was.
        MissingError, CheckpointError: see `read_adapter`.
    """
    if loaded.recipe.finetune.adapter_from is None:
        return
    folder = _adapter_folder(loaded)
    named = str(read_adapter(folder).get("base_model_name_or_path"))
    made_for = _made_for(folder)
    if made_for is not None:
        same = made_for == base.fingerprint
    else:  # another tool's
        found, given = base_of(folder)[0], Path(base.name)
        same = found.resolve() == given.resolve() if given.is_dir() else str(found) == base.name
    if not same:
        raise RecipeError(
            f"finetune.adapter_from: the adapter was trained on {named}, and model.from is {base.name}"
            + (", whose weights are others" if named == base.name else ""),
            where=loaded.where("finetune.adapter_from"),
            remedy=f"Set model.from to the model that it belongs to, or merge it into a model of its own:\n"
            f"gptcli export {folder} --merge --output FOLDER",
        )


def linear_names(model: nn.Module) -> list[str]:
    """The last words of the names of a model's linear layers, the output head's aside: what `target_modules` takes."""
    return sorted({name.rpartition(".")[2] for name in _linear(model)})


def _linear(model: nn.Module) -> list[str]:
    """The names of a model's linear layers, the output head's aside."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, (nn.Linear, Conv1D)) and module is not head]


def _targets(model: nn.Module, wanted: str | list[str]) -> str | list[str]:
    """Where an adapter goes, as peft takes it.

    Of a model with towers, which are trained for their media by much more data: the layers of its language model alone.
    A name that is not there, of a projector or in a tower, is taken where it is, and of a module all linear layers.
    """
    text = language_model(model)
    names = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(wanted, str) and (text is None or wanted not in _GROUPS):
        return _embeddings(model) if wanted == EMBEDDINGS else wanted
    if text is None and not {*names} & _GROUPS:
        return wanted
    linear = _linear(model)
    inner = linear if text is None else [name for name in linear if name.startswith(f"{text}.")]
    found: set[str] = set()
    for given in names:
        if given in _GROUPS:
            found.update(inner if given == ALL_LINEAR else _embeddings(model))
            continue
        named = [name for name in linear if _is_named(name, given)]
        inside = [name for name in named if name in inner]
        modules = [name for name, _ in model.named_modules() if _is_named(name, given)]
        below = [name for name in linear if any(name.startswith(f"{module}.") for module in modules)]
        found.update(inside or named or below)
    return sorted(found)


def _embeddings(model: nn.Module) -> list[str]:
    """The name of the table of a model's tokens, as a list."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return [name for name, module in model.named_modules() if module is table]


def _is_named(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}")


def _settings(model: PreTrainedModel, loaded: LoadedRecipe, new_tokens: Sequence[int]) -> Any:
    """peft's configuration of the recipe's adapter."""
    finetune = loaded.recipe.finetune
    try:
        import peft
    except ImportError:
        raise not_installed(f"finetune.adapter: {finetune.adapter}", "peft", "adapters") from None
    tokens = _token_rows(model, new_tokens)
    if finetune.adapter_from is not None:
        return _settings_from(loaded, peft, tokens)
    lora = finetune.lora
    modules = {name for name, _ in model.named_modules()}
    for name in [] if isinstance(lora.target_modules, str) else lora.target_modules:
        if name not in _GROUPS and not any(_is_named(module, name) for module in modules):
            raise RecipeError(
                f"finetune.lora.target_modules: {type(model).__name__} has no module {name}",
                where=loaded.where("finetune.lora.target_modules"),
                remedy=f"Its linear layers: {', '.join(linear_names(model))}; or all-linear, embeddings.",
            )
    targets = _targets(model, lora.target_modules)
    if tokens and not isinstance(targets, str) and {*targets} & {*_embeddings(model)}:
        raise RecipeError(
            "finetune.lora.target_modules: peft does not train an adapter of the embeddings and the "
            f"{len(new_tokens):,} tokens that are new to the model at once",
            where=loaded.where("finetune.lora.target_modules"),
            remedy="Leave embeddings out: the rows of new tokens are trained whole.",
        )
    frozen = _frozen(model, loaded)
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=rf"({'|'.join(map(re.escape, frozen))})(\..*)?" if frozen else None,
        use_rslora=lora.rank_stabilized,
        use_dora=finetune.adapter == "dora",
        trainable_token_indices=tokens or None,
        task_type="CAUSAL_LM",
    )


def _settings_from(loaded: LoadedRecipe, peft: Any, tokens: dict[str, list[int]]) -> Any:
    """The configuration of the adapter that training goes on with."""
    finetune = loaded.recipe.finetune
    folder, where = _adapter_folder(loaded), loaded.where("finetune.adapter_from")
    fields = read_adapter(folder)
    if fields["peft_type"] != "LORA":
        raise RecipeError(
            f"finetune.adapter_from: {folder} is an adapter of the kind {fields['peft_type']}, which is not trained on",
            where=where,
            remedy="LoRA and DoRA are. gptcli export --merge makes a whole model of it.",
        )
    is_dora = fields.get("use_dora") is True
    if is_dora != (finetune.adapter == "dora"):
        raise RecipeError(
            f"finetune.adapter: {finetune.adapter} is not the kind of {folder}",
            where=loaded.where("finetune.adapter"),
            remedy=f"Set finetune.adapter to {'dora' if is_dora else 'lora'}.",
        )
    with quiet(), _misfit(folder):
        tensor_names(folder)
        settings = peft.PeftConfig.from_pretrained(str(folder))
    if (settings.trainable_token_indices or {}) != tokens:
        raise RecipeError(
            "finetune.adapter_from: the tokens that are new to the model are others than those of the adapter",
            where=where,
            remedy=f"Use the tokenizer that it was trained with: tokenizer={{from: {folder}}}\nOr merge it first.",
        )
    settings.inference_mode = False
    return settings


def _made_for(folder: Path) -> str | None:
    """The fingerprint of what an adapter was trained on; None for one of another tool."""
    try:
        return str(read_json(folder / BASE)["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _adapter_folder(loaded: LoadedRecipe) -> Path:
    folder = Path(loaded.recipe.finetune.adapter_from or "")
    if not is_adapter(folder):
        raise MissingError(
            f"finetune.adapter_from: no adapter in {folder}",
            where=loaded.where("finetune.adapter_from"),
            remedy=f"Give the folder that holds {CONFIG} and {WEIGHTS}, for example runs/NAME/final.",
        )
    return folder


def _token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]]:
    """The rows of the embeddings, and of an output layer with a matrix of its own, that are trained, by module."""
    if not tokens:
        return {}
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    apart = output is not None and output.weight is not embeddings.weight
    ends = [embeddings, output] if apart else [embeddings]
    return {name: list(tokens) for name, module in model.named_modules() if module in ends}


def _frozen(model: nn.Module, loaded: LoadedRecipe) -> list[str]:
    """The modules that `finetune.freeze` names: by whole names, as the model's body has them, or by their ends."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    modules = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for given in loaded.recipe.finetune.freeze:
        named = [name for name in modules if given in (name, name.removeprefix(body))]
        named = named or [name for name in modules if _is_named(name, given)]
        outer = [name for name in named if not any(name.startswith(f"{other}.") for other in named)]
        if len(outer) == 1:
            found += outer
            continue
        what, remedy = f"{type(model).__name__} has no module {given}", None
        short = sorted({name.removeprefix(body) for name in modules}, key=lambda name: (name.count("."), name))
        if outer:
            what = f"{given} is the name of {len(outer)} modules of {type(model).__name__}"
            remedy = f"Write one of: {', '.join(name.removeprefix(body) for name in outer[:4])}"
        elif near := get_close_matches(given, short, n=3, cutoff=0.0):
            remedy = f"The nearest: {', '.join(near)}"
        raise RecipeError(f"finetune.freeze: {what}", where=loaded.where("finetune.freeze"), remedy=remedy)
    return found


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


@contextmanager
def _misfit(folder: Path) -> Iterator[None]:
    """Turn what peft and torch raise for an adapter that does not fit a model into a `CheckpointError`."""
    try:
        yield
    except (GptcliError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if "size mismatch" in line), first_line(error))
        raise CheckpointError(f"the adapter does not fit this model: {said[:300]}", where=str(folder)) from error
