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
    return norm_of([local(gradient) for gradient in gradients], copies(gradients))


def norm_of(parts: Sequence[torch.Tensor], held: Sequence[int] | None) -> torch.Tensor:
    """The Euclidean norm of tensors of which a process has parts.

    Args:
        parts: what this process has.
        held: how many processes have the same of each; None: all have all.
    """
    pieces = list(zip(parts, held or [1] * len(parts), strict=True))
    if parts[0].device.type == "cpu":
        pieces = [(piece, count) for part, count in pieces for piece in torch.split(part.reshape(-1), PIECE)]
    norms = torch.stack(torch._foreach_norm([piece for piece, _ in pieces])).double()
    if held is None:  # nothing goes to the device: a GPU would be waited for
        return norms.square().sum().sqrt().float()
    squares = (norms.square() / torch.tensor([count for _, count in pieces], device=norms.device)).sum()
    torch.distributed.all_reduce(squares)
    return squares.sqrt().float()


def clip(parameters: Sequence[torch.nn.Parameter], norm: torch.Tensor, most: float) -> None:
    """Scale the gradients of parameters down so that their norm is at most `most`, as `torch.nn.utils` does."""
    clip_parts([local(parameter.grad) for parameter in parameters if parameter.grad is not None], norm, most)


def clip_parts(parts: Sequence[torch.Tensor], norm: torch.Tensor, most: float) -> None:
    """Scale what this process has of gradients of such a norm."""
    if parts:
        torch._foreach_mul_(list(parts), (most / (norm + 1e-6)).clamp(max=1.0))
