"""The trained model as a plain Hugging Face folder: what transformers writes, whole, and as users should get it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.launch import is_main_process
from gptcli.model import adapt
from gptcli.reporting import quiet
from gptcli.train import optimizer_state, sharding, together
from gptcli.train.together import Write
from gptcli.train.zero import Zero, say_fp32

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gptcli.model.adapt import Base


def collect(
    model: PreTrainedModel,
    writers: Sequence[int],
    *,
    use_cache: bool | None,
    optimizer: Any = None,
    zero: Zero | None = None,
    base: Base | None = None,
) -> Write | None:
    """Bring together what this process writes of a model; for all processes to call together.

    Args:
        model: the model; a divided one's tensors are shared out among those who write, those of another are rank 0's.
        writers: their ranks.
        use_cache: that of the model's configuration before training, which turns the key-value cache off.
        optimizer: whose state is written too.
        zero: what divides the model and that state, if DeepSpeed does; rank 0 writes then.
        base: what the adapter on the model belongs to, which alone is written then; None: there is none.

    Returns:
        What writes that into a folder, rank 0 the configuration too; None where there is nothing to write.
    """
    owner = together.owners(sharding.weight_sizes(model), writers) if sharding.is_divided(model) else None
    if owner is None and zero is None and not is_main_process():
        return None
    if zero is not None:
        weights = zero.whole_weights()
    else:
        weights = None if owner is None else sharding.owned_weights(model, owner)
    state = None if optimizer is None else optimizer_state.by_name(model, optimizer, owner)
    if not is_main_process() and not weights:
        return None

    def write(folder: Path) -> None:
        with quiet(), _as_before_training(model.config, use_cache):
            if base is not None:
                adapt.write(model, folder, base)
            elif is_main_process():
                model.save_pretrained(folder, state_dict=weights)
            elif weights:
                _save_part(folder, model, weights)
        if zero is not None:
            say_fp32(folder)
        if state is not None:
            optimizer_state.save(folder, state)

    return write


def _save_part(folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Write some of a model's weights as `save_pretrained` does, which only writes on rank 0."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    for name in model._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    named = revert_weight_conversion(model, weights)
    whole = {name: tensor.contiguous() for name, tensor in named.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


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
