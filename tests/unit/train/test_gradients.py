"""The norm of a gradient against fp64, and clipping against torch's."""

from __future__ import annotations

import pytest
import torch

from gptcli.train.gradients import clip, gradient_norm


def parameters(*shapes: tuple[int, ...], scale: float = 1e-3) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in found:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [*found, torch.nn.Parameter(torch.zeros(3))]  # one without a gradient


def test_the_norm_of_millions_of_values_is_right_to_one_in_a_million() -> None:
    some = parameters((3_000_000,), (70, 33), (5,))
    exact = torch.stack([p.grad.double().norm() for p in some if p.grad is not None]).norm()
    assert float(gradient_norm(some)) == pytest.approx(float(exact), rel=1e-6)


def test_a_gradient_that_is_not_finite_has_no_finite_norm() -> None:
    for bad in (float("nan"), float("inf")):
        some = parameters((4, 4))
        assert some[0].grad is not None
        some[0].grad[1, 2] = bad
        assert not torch.isfinite(gradient_norm(some))


def test_no_gradient_has_the_norm_0() -> None:
    assert float(gradient_norm([torch.nn.Parameter(torch.zeros(3))])) == 0


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_clipping_is_torchs(scale: float) -> None:
    mine, theirs = parameters((40, 30), (7,), scale=scale), parameters((40, 30), (7,), scale=scale)
    clip(mine, gradient_norm(mine), 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for one, other in zip(mine[:2], theirs[:2], strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-6)
