"""Embeddings and output layer of a model made larger, for tokens that it does not know yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptcli.reporting import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resize(model: PreTrainedModel, size: int, new: Sequence[int] = ()) -> None:
    """Give a model `size` rows of embeddings at least, in place; matrices that are shared stay so.

    The rows of `new`, and those that are added, become the mean of the others, so that no token begins with an
    embedding or a likelihood that is far from all others (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).
    Random state is left as it was.

    Args:
        model: the model.
        size: rows of both matrices; fewer than there are: nothing is added.
        new: ids below `size` whose rows no training has seen.
    """
    import torch

    embeddings: Any = model.get_input_embeddings()
    before = int(embeddings.weight.shape[0])
    devices = [model.device] if model.device.type == "cuda" else []
    if size > before:
        with quiet(), torch.random.fork_rng(devices):  # transformers draws rows, which are written over
            model.resize_token_embeddings(size, mean_resizing=False)
    rows = sorted({*new, *range(before, size)})
    if not rows:
        return
    known = torch.ones(max(size, before), dtype=torch.bool)
    known[rows] = False
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings = model.get_input_embeddings()
    tensors: list[Any] = [embeddings.weight, _weight(output), getattr(output, "bias", None)]
    matrices = {id(tensor): tensor for tensor in tensors}
    with torch.no_grad():
        for tensor in matrices.values():
            if tensor is not None:
                tensor[rows] = tensor[known.to(tensor.device)].float().mean(0).to(tensor.dtype)


def _weight(output: Any) -> Any:
    return None if output is None else output.weight
