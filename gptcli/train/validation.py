"""The validation loss of a run: the loss of `gptcli eval` over the documents that were held out.

Where only a part of a document is learnt, only that is scored (see `evaluation.supervised`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from gptcli.evaluation.loss import LossResult, document_loss, loss_of
from gptcli.evaluation.supervised import packing_for, supervised_windows
from gptcli.launch import world_size
from gptcli.train import group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.data.media.reader import MediaReader
    from gptcli.data.shards import Shards
    from gptcli.recipe.schema import Recipe


# What products are rounded to on a GPU; on a CPU evaluation is in fp32, as `gptcli eval` is.
_TYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}


def validation_loss(
    model: PreTrainedModel,
    shards: Shards,
    recipe: Recipe,
    precision: str,
    *,
    parts: int = 1,
    reader: MediaReader | None = None,
) -> LossResult:
    """The loss over the held-out documents: that of `gptcli eval`.

    Args:
        model: the model.
        shards: the documents.
        recipe: says how they are cut into windows, and what of them is learnt.
        precision: that of training.
        parts: the run's processes, or groups of them, that share the windows.
        reader: of the documents' images and sounds, where they have some.
    """
    assert recipe.data is not None
    limit, packing = recipe.eval.limit, packing_for(shards, recipe)
    prefix = shards.specials.eos if shards.specials.bos is None else shards.specials.bos
    assert prefix is not None  # tokenizing refuses a tokenizer without an end token
    with as_evaluated(model, precision):
        if packing is not None:
            windows = islice(supervised_windows(shards, packing), limit)
            own = loss_of(model, windows, pad_id=prefix, part=group.part(parts), reader=reader)
        else:
            own = document_loss(
                model,
                islice(shards.evaluation_documents(), limit),
                prefix_id=prefix,
                sequence_length=recipe.data.sequence_length,
                stride=recipe.eval.stride,
                part=group.part(parts),
            )
    share = parts / world_size()  # below 1: several processes work on the same rows
    nats, tokens = group.total([own.nats * share, own.tokens * share])
    return replace(own, nats=nats, tokens=round(tokens))


@contextmanager
def as_evaluated(model: PreTrainedModel, precision: str) -> Iterator[None]:
    """What a model is evaluated in during training: the products of a GPU in the precision of training."""
    half = _TYPES.get(precision) if model.device.type == "cuda" else None
    with _without_wrapper(model), torch.autocast(model.device.type, dtype=half, enabled=half is not None):
        yield


@contextmanager
def _without_wrapper(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's own forward: accelerate puts its autocast around the whole model, not around its parts.

    So the head, applied to what the body gives, would be taken for another one than the model's.
    """
    wrapped = model.__dict__.get("forward") if hasattr(model, "_original_forward") else None
    if wrapped is None:
        yield
        return
    del model.__dict__["forward"]
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapped
