"""Liger's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989) as one more way to `train.loss`'s two sums.

Its Triton kernels run on a GPU alone. It is taken where it is installed and nothing is compiled: our own blocks are
then ten passes over the logits where Liger makes two. It counts the labels with `.item()`, one wait a micro-batch.
"""

from __future__ import annotations

import torch


def losses(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, z_loss: float
) -> torch.Tensor:
    """[nats, nats + z_loss * squares] of hidden [n, width], weight [vocabulary, width], bias and labels [n], in fp32.

    The gradient of the weight is summed in fp32 and rounded once to the type of `hidden`.

    Raises:
        ImportError: the package is not installed, or has another form than this one.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    with torch.autocast(hidden.device.type, enabled=False):
        found = liger_fused_linear_cross_entropy(
            hidden,
            weight.to(hidden.dtype),
            labels,
            None if bias is None else bias.to(hidden.dtype),
            lse_square_scale=z_loss,
            reduction="sum",
            return_z_loss=True,
            accum_dtype=torch.float32,
        )
    objective: torch.Tensor = found.loss
    return torch.stack([(objective - found.z_loss).detach(), objective])
