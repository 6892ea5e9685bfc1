"""The fields of a configuration: which there are, how they are called, and the sizes that a recipe leaves open.

Nothing here knows a model family: names come from the configuration's own `attribute_map`, proportions from its
defaults.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError
from gptcli.reporting import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from gptcli.model.build import TokenIds
    from gptcli.recipe.load import LoadedRecipe

# Widths that follow the hidden size, under the names that configurations of transformers use.
_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "word_embed_proj_dim",
    "embed_dim",
)
_WIDTH_MULTIPLE = 64
_STANDARD = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_fields(
    loaded: LoadedRecipe, model_type: str, base: PreTrainedConfig, given: dict[str, Any], place: str = "model.config"
) -> None:
    """Refuse a field that a type does not have, with the nearest that it has; `place`: the key that holds `given`.

    Only a type's own fields and transformers' common ones are known; anything else would be ignored in silence.
    """
    known = set(base.to_dict()) | set(vars(base)) | set(base.attribute_map) | {"tie_word_embeddings"}
    for field in given:
        if field in known:
            continue
        near = difflib.get_close_matches(field, known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"See transformers' documentation of {type(base).__name__}."
        raise RecipeError(
            f"{place}: {model_type} has no field {field}",
            where=loaded.where(f"{place}.{field}"),
            remedy=remedy,
        )


def standard_names(base: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Fields by the names that transformers has for all types: GPT-2 calls its width n_embd."""
    # attribute_map holds {alias: field}. GPT-2's aliases are the standard names; of others the fields are.
    names = {
        **{own: alias for alias, own in base.attribute_map.items() if own not in _STANDARD},
        **{alias: own for alias, own in base.attribute_map.items() if own in _STANDARD and alias not in _STANDARD},
    }
    return {names.get(field, field): value for field, value in given.items()}


def proportional(base: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The sizes that were not given, in the proportions of the type's defaults."""
    sizes: dict[str, Any] = {}
    hidden, base_hidden = given.get("hidden_size"), get(base, "hidden_size")
    heads, base_heads = given.get("num_attention_heads"), get(base, "num_attention_heads")
    if isinstance(hidden, int) and isinstance(base_hidden, int):
        for field in _WIDTHS:
            value = get(base, field)
            if isinstance(value, int) and field not in given:
                exact = value * hidden / base_hidden
                rounded = max(1, round(exact / _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE
                sizes[field] = hidden if value == base_hidden else rounded
    if isinstance(heads, int) and isinstance(base_heads, int):
        kv_heads = get(base, "num_key_value_heads")
        if isinstance(kv_heads, int) and "num_key_value_heads" not in given:
            sizes["num_key_value_heads"] = _kv_heads(heads, max(1, round(base_heads / kv_heads)))
        # Only where it is a field: in some types it is computed.
        head_dim = base.to_dict().get("head_dim")
        if isinstance(head_dim, int) and "head_dim" not in given:
            width = hidden if isinstance(hidden, int) else base_hidden
            if isinstance(width, int) and width % heads == 0:
                sizes["head_dim"] = width // heads
    return sizes


def _kv_heads(heads: int, group: int) -> int:
    # The group size of the default, or the next smaller one that divides the heads.
    return next(heads // size for size in range(min(group, heads), 0, -1) if heads % size == 0)


def model_defaults(base: PreTrainedConfig, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """DEFINITIONS' defaults for a model from scratch: no dropout, and the fused form of the same GELU."""
    changes: dict[str, Any] = {}
    notes = []
    dropouts = [
        field
        for field, value in base.to_dict().items()
        if ("dropout" in field or field.endswith("_pdrop")) and isinstance(value, float) and value > 0
        if field not in given
    ]
    if dropouts:
        changes |= dict.fromkeys(dropouts, 0.0)
        notes.append(f"dropout 0 ({', '.join(dropouts)}): set it in model.config to have it")
    activations = [field for field, value in base.to_dict().items() if value == "gelu_new" and field not in given]
    for field in activations:
        changes[field] = "gelu_pytorch_tanh"
        notes.append(f"{field} gelu_pytorch_tanh: the same function as gelu_new, fused")
    return changes, notes


def get(config: PreTrainedConfig, field: str) -> Any:
    """The value of a field, None where there is none."""
    try:
        return getattr(config, field, None)
    except Exception:  # some types raise their own error for a field that varies from layer to layer
        return None


def quietly(config_class: type[PreTrainedConfig], **fields: Any) -> PreTrainedConfig:
    """A configuration without the warning of token ids beyond a small vocabulary, which are set right afterwards."""
    with quiet():
        return config_class(**fields)


def bad_config(loaded: LoadedRecipe, error: Exception) -> RecipeError:
    """The error for fields that do not fit together; each type checks its own, with its own kind of error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RecipeError(
        f"model.config does not make a model: {' '.join(lines[:2])[:300]}",
        where=loaded.where("model.config"),
        remedy="hidden_size must be divisible by num_attention_heads, and that by num_key_value_heads.",
    )


def text_fields(base: PreTrainedConfig, ids: TokenIds, length: int) -> dict[str, Any]:
    """The fields of a configuration that follow the tokenizer and the length of the rows."""
    fields: dict[str, Any] = {
        "vocab_size": ids.vocab_size,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    if get(base, "max_position_embeddings") is not None:
        fields["max_position_embeddings"] = length
    return fields
