"""GELU with its derivative: no further from the exact function than torch's own, whatever the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu
from transformers.activations import GELUTanh, NewGELUActivation

from gptcli.model import activation
from gptcli.model.activation import TanhGelu, gelu_with_derivative, keep_derivatives
from tests.tiny import make_model

TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    activation._kept.__dict__.clear()
    yield
    torch.set_num_threads(threads)


def reference(values: torch.Tensor, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's gelu and its derivative, worked out in `dtype`."""
    inputs = values.detach().to(dtype).requires_grad_()
    found = gelu(inputs, approximate="tanh")
    return found.detach(), torch.autograd.grad(found.sum(), inputs)[0]


def ours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`TanhGelu` and its derivative through autograd."""
    inputs = values.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    found = TanhGelu()(inputs)
    assert type(found.grad_fn).__name__ == "_TanhGeluBackward"
    return found.detach(), torch.autograd.grad(found.sum(), inputs)[0]


def both(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU and its derivative."""
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    return out, gelu_with_derivative(values, out)


def samples(count: int = 40_001) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.linspace(-12, 12, count), torch.randn(count)])


def test_fp32_is_within_2e_6_of_float64() -> None:
    values = samples()
    for found, exact in zip(ours(values), reference(values), strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - exact).abs().max() < 2e-6


def test_bf16_is_as_close_to_float64_as_torch_in_bf16() -> None:
    values = samples().bfloat16()
    for found, exact, theirs in zip(ours(values), reference(values), reference(values, torch.bfloat16), strict=True):
        assert found.dtype == torch.bfloat16
        error, bound = (found.double() - exact).abs(), (theirs.double() - exact).abs()
        assert error.max() <= bound.max() + 1e-6
        assert error.mean() <= 1.001 * bound.mean()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_slope_of_what_follows_is_multiplied_in(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values, slope = torch.randn(3, 5, 7, dtype=dtype), torch.randn(3, 5, 7, dtype=dtype)
    inputs = values.clone().requires_grad_()
    TanhGelu()(inputs).backward(slope)
    assert inputs.grad is not None and inputs.grad.dtype == dtype
    expected = slope.double() * reference(values)[1]
    torch.testing.assert_close(
        inputs.grad.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-6
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_extremes_are_numbers_wherever_torch_has_numbers(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    powers = [sign * 10.0**power for power in range(-44, 39) for sign in (1, -1)]
    odd = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), limits.max, limits.min, limits.tiny, -limits.tiny]
    values = torch.tensor([*powers, *odd, *(limits.tiny / 4,) * 9]).to(dtype)
    for found, theirs in zip(ours(values), reference(values, dtype), strict=True):
        assert not (found.isnan() & ~theirs.isnan()).any(), values[found.isnan() & ~theirs.isnan()]
        known = ~theirs.isnan() & ~found.isnan()
        torch.testing.assert_close(
            found[known], theirs[known], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    found, derivative = ours(torch.tensor([float("nan"), 1e4, -1e4, 0.0, -0.0]).to(dtype))
    assert found[0].isnan() and derivative[0].isnan()
    assert found[1] == torch.tensor(1e4).to(dtype) and found[2] == 0 and derivative[1:3].tolist() == [1.0, 0.0]
    assert derivative[3:].tolist() == [0.5, 0.5]
    assert found[3:].signbit().tolist() == [False, True]


@pytest.mark.parametrize("dtype", TYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    whole = torch.randn(6, 10, 8, dtype=dtype)
    for values in (whole.transpose(0, 2), whole[:, ::3], whole[1:, 2:7, 1], whole[:1].expand(4, 10, 8)):
        assert not values.is_contiguous()
        inputs = values.detach().requires_grad_()
        found = TanhGelu()(inputs)
        expected, slope = ours(values.contiguous())
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), inputs)[0], slope)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 64, 65])
def test_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch, size: int, threads: int) -> None:
    torch.manual_seed(3)
    values = torch.randn(size)
    expected = both(values)
    torch.set_num_threads(threads)
    monkeypatch.setattr(activation, "PIECE", 16)
    for found, whole in zip(both(values), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0, 3), (1,)])
def test_any_shape_is_kept(shape: tuple[int, ...]) -> None:
    found, derivative = ours(torch.ones(shape))
    assert found.shape == derivative.shape == shape


def test_a_second_call_leaves_the_first_ones_results_alone() -> None:
    first = both(torch.ones(100))
    before = [values.clone() for values in first]
    both(torch.full((100,), -3.0))
    assert all(map(torch.equal, first, before))


def test_two_threads_at_once_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "PIECE", 512)
    torch.manual_seed(4)
    inputs = torch.randn(2, 200_000)
    expected = [both(values) for values in inputs]
    together = Barrier(2)

    def work(index: int) -> bool:
        torch.set_num_threads(1)
        together.wait(timeout=60)
        return all(all(map(torch.equal, both(inputs[index]), expected[index])) for _ in range(10))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [True, True]


def test_without_a_gradient_and_in_other_types_it_is_torchs_own() -> None:
    values = torch.randn(50)
    assert torch.equal(TanhGelu()(values), gelu(values, approximate="tanh"))
    with torch.no_grad():
        assert torch.equal(TanhGelu()(values.requires_grad_()), gelu(values, approximate="tanh"))
    for dtype in (torch.float64, torch.float16):
        other = torch.randn(50, dtype=dtype, requires_grad=True)
        found = TanhGelu()(other)
        assert torch.equal(found, gelu(other, approximate="tanh"))
        assert type(found.grad_fn).__name__ == "GeluBackward0"


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    values = torch.randn(5, requires_grad=True)
    (slope,) = torch.autograd.grad(TanhGelu()(values).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


KINDS: list[tuple[str, dict[str, Any], type]] = [
    ("gpt2", {"activation_function": "gelu_pytorch_tanh"}, GELUTanh),
    ("gpt2", {"activation_function": "gelu_new"}, NewGELUActivation),
    ("gemma3_text", {}, GELUTanh),
    ("phi", {"head_dim": None}, NewGELUActivation),
]


@pytest.mark.parametrize("kind, fields, theirs", KINDS)
def test_a_model_trains_the_same_and_is_saved_the_same(
    tmp_path: Path, kind: str, fields: dict[str, Any], theirs: type
) -> None:
    fields = {"initializer_range": 0.05, **{name: value for name, value in fields.items() if value is not None}}
    plain, model = make_model(kind, **fields), make_model(kind, **fields)
    assert sum(type(module) is theirs for module in model.modules()) == 2  # layers
    assert keep_derivatives(model) == 2
    assert sum(type(module) is TanhGelu for module in model.modules()) == 2
    assert keep_derivatives(model) == 0
    ids = torch.arange(40).view(2, 20) * 7 % 300
    slopes = []
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
        slopes.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert slopes[0].keys() == slopes[1].keys()
    for name, gradient in slopes[0].items():
        torch.testing.assert_close(slopes[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "ours")
    assert sum(type(module) is theirs for module in again.modules()) == 2
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_other_activations_stay() -> None:
    assert keep_derivatives(make_model("llama")) == 0
    assert keep_derivatives(make_model("gpt2", activation_function="gelu")) == 0


def test_values_take_the_place_of_the_inputs_where_a_model_does_not_look_at_them_again() -> None:
    model = make_model("gpt2", activation_function="gelu_new")
    ids = torch.arange(2, 34)[None]
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    slopes = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    keep_derivatives(model)
    ours = [module for module in model.modules() if isinstance(module, TanhGelu)]
    assert all(module.in_place for module in ours)
    assert all(p.grad is None for p in model.parameters())  # the trial leaves nothing
    inputs: list[torch.Tensor] = []
    ours[0].register_forward_hook(lambda module, given, found: inputs.extend((given[0], found)))
    found = model(input_ids=ids, labels=ids)
    assert inputs[0].data_ptr() == inputs[1].data_ptr()
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, slopes[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use", [lambda given, found: found + given, lambda given, found: found * given.sigmoid()])
def test_a_model_that_looks_at_the_inputs_again_keeps_them(use: Callable[..., torch.Tensor]) -> None:
    model = make_model("gpt2", activation_function="gelu_new")

    class Again(torch.nn.Module):
        """An MLP that uses what it gives to its activation once more."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.c_fc, self.c_proj, self.act = inner.c_fc, inner.c_proj, inner.act

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            given = self.c_fc(hidden)
            return self.c_proj(use(given, self.act(given)))

    for layer in model.transformer.h:
        layer.mlp = Again(layer.mlp)
    ids = torch.arange(2, 34)[None]
    expected = model(input_ids=ids).logits
    assert keep_derivatives(model) == 2
    assert not any(module.in_place for module in model.modules() if isinstance(module, TanhGelu))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
