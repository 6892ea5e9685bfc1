"""A model from a type and a size: any causal `model_type` of transformers, with random weights.

Nothing here knows a model family. Sizes that a recipe leaves open (the MLP's width, key-value heads) keep the
proportions of the type's own default configuration, so that `{type: qwen3, preset: 1m}` is a small Qwen-3.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError, first_line
from gptcli.model.composite import composite_config
from gptcli.model.fields import (
    bad_config,
    check_fields,
    model_defaults,
    proportional,
    quietly,
    standard_names,
    text_fields,
)
from gptcli.model.folder import absurd_size
from gptcli.model.kinds import auto_class, is_multimodal, why_not_a_decoder
from gptcli.model.load import evaluating
from gptcli.recipe.presets import MEDIA_PRESETS, PRESETS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from gptcli.model.kept import Kept
    from gptcli.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class TokenIds:
    """The ids of the tokenizer that a model's configuration repeats.

    `media`: those of the tokens that stand for images and sounds, by what they mean (see `processor.media_tokens`).
    """

    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None
    media: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        total: all of them, tied ones once.
        matrix: those in matrix products, the output head once (the N of DEFINITIONS' MFU).
        hidden_matrices: 2-D weights that are neither embeddings nor the head: what Muon updates.
        head: those of the output head.
        layers, width: depth and width, for the attention term of the FLOPs.
        heads: of attention.
        largest_units: those of the largest two units that FSDP gathers: a layer, the embedding, the head.
        kept, kept_half: what a forward pass keeps in fp32 and under autocast; None where that could not be counted.
        frozen, frozen_matrix, frozen_hidden: those of `total`, `matrix` and `hidden_matrices` that are not trained.
        frozen_head: whether the output head is one of them.
        quantized: those that are held in 4 bits.
        towers: places x layers x width that towers for images and sounds work on for a row, on average.
    """

    total: int
    matrix: int
    hidden_matrices: int
    head: int
    layers: int
    width: int
    heads: int = 0
    largest_units: int = 0
    kept: Kept | None = None
    kept_half: Kept | None = None
    frozen: int = 0
    frozen_matrix: int = 0
    frozen_hidden: int = 0
    frozen_head: bool = False
    quantized: int = 0
    towers: float = 0.0

    @property
    def trained(self) -> int:
        """Those that take gradients."""
        return self.total - self.frozen

    @property
    def vocabulary(self) -> int:
        """Entries of the output head."""
        return self.head // max(1, self.width)


def build_config(loaded: LoadedRecipe, ids: TokenIds) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration of `model.type` at the recipe's size, and a line for each default that was changed.

    Raises:
        RecipeError: unknown or non-causal type, a field that the type does not have, values that do not fit.
    """
    model = loaded.recipe.model
    assert model is not None and model.type is not None
    config_class = _config_class(loaded, model.type)
    given = dict(model.config or {})
    base = quietly(config_class)
    if why := absurd_size(given):
        raise RecipeError(f"model.config: {why}", where=loaded.where("model.config"))
    if is_multimodal(model.type):
        return composite_config(loaded, base, ids)
    if model.preset in MEDIA_PRESETS:
        raise RecipeError(
            f"model.preset: {model.preset} is for a type that sees or hears, and {model.type} has text alone",
            where=loaded.where("model.preset"),
            remedy="Take model.type: llava or qwen2_audio, or preset: 1m.",
        )
    check_fields(loaded, model.type, base, given)
    if model.preset is not None:
        shape = PRESETS[model.preset]
        given = {
            "num_hidden_layers": shape.num_hidden_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
        } | standard_names(base, given)
    else:
        given = standard_names(base, given)
    assert loaded.recipe.data is not None
    fields = text_fields(base, ids, loaded.recipe.data.sequence_length) | proportional(base, given)
    changes, notes = model_defaults(base, given)
    try:
        config = quietly(config_class, **(fields | changes | given))
    except Exception as error:  # each type checks its own fields, with its own kind of error
        raise bad_config(loaded, error) from error
    return config, notes


def build_model(loaded: LoadedRecipe, config: PreTrainedConfig, *, seed: int, attention: str | None) -> PreTrainedModel:
    """The model of a configuration in fp32 with random weights, a function of `seed` alone."""
    import torch

    torch.manual_seed(seed)
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        model: PreTrainedModel = _from_config(config, dtype=torch.float32, **options)
    except (ValueError, TypeError, AssertionError, ImportError, KeyError, ZeroDivisionError) as error:
        raise bad_config(loaded, error) from error
    try:
        is_decoder = looks_only_back(model)
    except Exception as error:  # what each type says of a text without a picture, or of sizes that do not fit
        raise RecipeError(
            f"model.type: {config.model_type} does not run on a text: {first_line(error)[:300]}",
            where=loaded.where("model.type"),
            remedy="Look at the sizes in model.config, or take another type: llama, qwen3, llava.",
        ) from error
    if not is_decoder:
        raise RecipeError(
            f"model.type: {config.model_type} looks at later tokens, so it would learn to copy them",
            where=loaded.where("model.type"),
            remedy="Take a decoder: llama, gpt2, qwen3, mistral, gemma3_text.",
        )
    return model


def looks_only_back(model: PreTrainedModel) -> bool:
    """Whether no logit changes with a later token: some types of the causal mapping are encoders by default."""
    import torch

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(8, context) if isinstance(context, int) and context > 0 else 8
    ids = torch.arange(length)[None] % 2
    changed = ids.clone()
    changed[0, -1] = 1 - changed[0, -1]
    with torch.no_grad(), evaluating(model):
        before, after = (model(input_ids=batch).logits[:, :-1] for batch in (ids, changed))
    return bool(torch.allclose(before, after, atol=1e-4))


def count_parameters(config: PreTrainedConfig, prepare: Callable[[PreTrainedModel], None] | None = None) -> Counts:
    """Count a model's parameters, and what its layers keep, without allocating them (on torch's meta device).

    `prepare` is done to the model first: an adapter that is put on it, modules that are frozen.
    """
    import torch

    from gptcli.model.kept import kept_bytes

    with torch.device("meta"):
        model = _from_config(copy.deepcopy(config), dtype=torch.float32)
        if prepare is not None:
            prepare(model)
    counts = counts_of(model)
    return replace(counts, kept=kept_bytes(model, half=False), kept_half=kept_bytes(model, half=True))


def counts_of(model: PreTrainedModel) -> Counts:
    """Count the parameters of a model that is there."""
    matrices = hidden_matrices(model)
    hidden = sum(parameter.numel() for parameter in matrices.values())
    head = output_head(model)
    weights = [] if head is None else [p for p in head.parameters() if p.ndim >= 2]
    frozen_head = bool(weights) and not any(p.requires_grad for p in weights)
    head_size = max((p.numel() for p in weights), default=0)  # an adapter on it is little beside it
    text_config = model.config.get_text_config()
    return Counts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        matrix=hidden + head_size,
        hidden_matrices=sum(p.numel() for p in matrices.values() if p.ndim == 2),
        head=head_size,
        layers=int(getattr(text_config, "num_hidden_layers", 0) or 0),
        width=int(getattr(text_config, "hidden_size", 0) or 0),
        heads=int(getattr(text_config, "num_attention_heads", 0) or 0),
        largest_units=sum(sorted(_units(model))[-2:]),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        frozen_matrix=sum(p.numel() for p in matrices.values() if not p.requires_grad) + frozen_head * head_size,
        frozen_hidden=sum(p.numel() for p in matrices.values() if p.ndim == 2 and not p.requires_grad),
        frozen_head=frozen_head,
    )


def _units(model: PreTrainedModel) -> list[int]:
    """Parameters of what accelerate gives to FSDP2 as one piece each: embedding, layers, head (tied: one piece)."""
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=())
    ends = {
        id(p): p.numel()
        for module in (model.get_input_embeddings(), output_head(model))
        if module is not None
        for p in module.parameters()
    }
    return [*ends.values(), *(sum(p.numel() for p in layer.parameters()) for layer in layers)]


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, where the model names one."""
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def is_product(head: nn.Module | None) -> bool:
    """Whether a head may give logits as a product with its `weight`: a linear layer, also with rows of new tokens."""
    from torch import nn

    return type(head) is nn.Linear or hasattr(head, "token_adapter")


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights with two or more dimensions that are neither an embedding table nor the output head, by name."""
    from torch import nn

    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    find: Callable[[], nn.Module | None] = getattr(model, "get_input_embeddings", lambda: None)
    for end in (find(), output_head(model)):  # with what an adapter adds to them
        tables |= {id(p) for p in end.parameters()} if end is not None else set()
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in tables}


def uses_a_matrix_twice(model: nn.Module) -> bool:
    """Whether several places of a model multiply with one matrix, as in models that share layers; embeddings aside."""
    from torch import nn

    owned = [  # not what an adapter's layer shows as its own, and is that of the layer in it
        module._parameters.get("weight")
        for _, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, nn.Embedding)
    ]
    matrices = [id(weight) for weight in owned if weight is not None and weight.ndim >= 2]
    return len(set(matrices)) < len(matrices)


def _from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    make: Callable[..., PreTrainedModel] = auto_class(config).from_config
    return make(config, **options)


def _config_class(loaded: LoadedRecipe, model_type: str) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = loaded.where("model.type")
    if model_type in CONFIG_MAPPING:
        found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
        if why := why_not_a_decoder(quietly(found)):
            remedy = "Take one that has images and sounds among its tokens: llava, idefics3, qwen2_audio."
            raise RecipeError(f"model.type: {why}", where=where, remedy=remedy)
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or is_multimodal(model_type):
            return found
        known = "is not a causal language model"
    else:
        known = "is unknown to transformers"
    near = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
    remedy = f"Did you mean {' or '.join(near)}?" if near else "Common ones: llama, gpt2, qwen3, mistral, gemma3_text."
    raise RecipeError(f"model.type: {model_type} {known}", where=where, remedy=remedy)
