"""The training loss: summed natural-log cross entropy, in fp32 whatever the precision of the logits.

The model's own loss is not used: rows already hold their next tokens as labels, and the sum is divided by the count
of tokens over the whole global batch, so that accumulation and processes do not change the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats summed over the labels that are not -100.

    Args:
        logits: [batch, time, vocabulary], any float type.
        labels: [batch, time], the next token of each position (already shifted), -100 where there is none.
    """
    from torch.nn import functional

    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
