"""The norm of a gradient over all parameters and processes, and clipping by it.

torch sums squares on a CPU in fp32 with few sums at once: the norm of 20 M values is 1e-3 too small, and another one
where they are divided. In pieces it is right to 1e-6, whichever way they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptcli.train.sharding import copies, local

PIECE = 1 << 16


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The Euclidean norm of the gradients of parameters, some of which may be divided over the processes: a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    held = copies(gradients)
    parts = [(local(gradient), count) for gradient, count in zip(gradients, held or [1] * len(gradients), strict=True)]
    if gradients[0].device.type == "cpu":
        parts = [(piece, count) for part, count in parts for piece in torch.split(part.reshape(-1), PIECE)]
    norms = torch.stack(torch._foreach_norm([part for part, _ in parts])).double()
    if held is None:  # nothing goes to the device: a GPU would be waited for
        return norms.square().sum().sqrt().float()
    squares = (norms.square() / torch.tensor([count for _, count in parts], device=norms.device)).sum()
    torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def clip(parameters: Sequence[torch.nn.Parameter], norm: torch.Tensor, most: float) -> None:
    """Scale the gradients of parameters down so that their norm is at most `most`, as `torch.nn.utils` does."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
