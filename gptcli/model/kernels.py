"""Which attention kernels a model's code can use, and plain causal attention without a mask that nobody needs.

For rows that hold one stream of tokens transformers 5.23 still looks in every forward pass for documents that begin
in the middle of a row, which makes the host wait for a GPU; and while compiling it makes the whole [time, time] mask,
which keeps torch from its fastest kernel (until torch 2.14, pytorch#176499). Here both are known to be unneeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptcli.model.kinds import is_multimodal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "gptcli_sdpa"
# Kernels that run on a GPU in half precision alone: a model is made with another, and gets these when it is trained.
GPU_ONLY = ("flash_attention_2", "flash_attention_3", "flex_attention")
_FLASH_HEAD_SIZE = 256
_FLASH_HEAD_MULTIPLE = 8


def usable_attention(config: PreTrainedConfig) -> frozenset[str]:
    """The names of transformers' attention implementations that the model of a configuration has code for.

    None for a model that brings its own code, which is not read here.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    mapping: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING if is_multimodal(config.model_type) else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class: Any = mapping.get(type(config), None)
    if model_class is None:
        return frozenset()
    text = config.get_text_config()
    names = {"eager"}
    if model_class._supports_sdpa:
        names.add("sdpa")
    if model_class._supports_flex_attn:
        names.add("flex_attention")
    size = getattr(text, "head_dim", None)
    if not isinstance(size, int):
        width, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
        size = width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else 0
    fits = 0 < size <= _FLASH_HEAD_SIZE and size % _FLASH_HEAD_MULTIPLE == 0
    if model_class._supports_flash_attn and fits:
        names |= {"flash_attention_2", "flash_attention_3"}
    return frozenset(names)


def attend_without_mask(model: PreTrainedModel) -> bool:
    """Let a model's sdpa leave out a mask that is plainly causal; False where it has another attention, which stays."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return attend_in_place_of_sdpa(model, NAME, sdpa_attention_forward, _mask)


def attend_in_place_of_sdpa(
    model: PreTrainedModel, name: str, forward: Callable[..., Any], mask: Callable[..., Any]
) -> bool:
    """Register an attention with its mask under a name, and use it; False where the model's is not sdpa, and stays."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    return True


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """transformers' `sdpa_mask`, or None where sdpa's own `is_causal` is the whole mask, compiling or not.

    A sliding window shorter than the row, padding, a cache, and whatever a model adds to the mask keep it.
    """
    from transformers.masking_utils import sdpa_mask

    plain = (
        allow_is_causal_skip
        and attention_mask is None
        and isinstance(q_offset, int)
        and q_offset == 0
        and 1 < q_length == kv_length
        and (local_size is None or kv_length < local_size)
    )
    if plain:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    return mask


def settle_attention(model: PreTrainedModel, name: str) -> None:
    """Give a model that is on its GPU and under autocast the kernel of its plan, if it is one of `GPU_ONLY`."""
    if name in GPU_ONLY:
        model.set_attn_implementation(name)


@contextmanager
def one_stream_rows() -> Iterator[None]:
    """Inside, no row holds documents that must not see each other, so that no forward pass looks for them."""
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
