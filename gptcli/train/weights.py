"""The trained model as a plain Hugging Face folder: what transformers writes, whole, and as users should get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.model.load import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor] | None,
    *,
    use_cache: bool | None,
) -> None:
    """Write safetensors, configuration and tokenizer into a folder.

    Args:
        folder: made where it is not there.
        model: the model.
        tokenizer: its tokenizer.
        weights: those of a model that is divided, brought together; None: the model has them.
        use_cache: that of the model's configuration before training, which turns the key-value cache off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), _as_before_training(model.config, use_cache):
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(str(folder))


@contextmanager
def _as_before_training(config: Any, use_cache: bool | None) -> Iterator[None]:
    """Inside, a configuration does not say how the model is divided, and has the key-value cache on again."""
    before = {key: config.__dict__[key] for key in ("use_cache", "distributed_config") if key in config.__dict__}
    if use_cache is not None:
        config.use_cache = use_cache
    config.__dict__.pop("distributed_config", None)
    try:
        yield
    finally:
        config.__dict__.update(before)
