"""The validation loss of a run: the loss of `gptcli eval` over the documents that were held out."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from gptcli.evaluation.loss import LossResult, document_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.data.shards import Shards
    from gptcli.recipe.schema import Recipe


def validation_loss(model: PreTrainedModel, shards: Shards, recipe: Recipe) -> LossResult:
    """The loss over the held-out documents, as DEFINITIONS has it."""
    assert recipe.data is not None
    documents = islice(shards.evaluation_documents(), recipe.eval.limit)
    prefix = shards.specials.eos if shards.specials.bos is None else shards.specials.bos
    assert prefix is not None  # tokenizing refuses a tokenizer without an end token
    return document_loss(
        model,
        documents,
        prefix_id=prefix,
        sequence_length=recipe.data.sequence_length,
        stride=recipe.eval.stride,
    )
