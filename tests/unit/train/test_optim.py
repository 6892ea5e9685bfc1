from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gptcli.recipe.schema import Train
from gptcli.train.optim import Muon, MuonAdamW, build_optimizer, build_schedule, orthogonalize, schedule_factor


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


def names(optimizer: torch.optim.Optimizer, index: int) -> set[str]:
    return set(optimizer.param_groups[index]["param_names"])


def give_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_adamw_decays_matrices_only() -> None:
    model = tiny()
    optimizer = build_optimizer(model, Train(optimizer="adamw", weight_decay=0.3))
    assert optimizer is not None
    shapes = dict(model.named_parameters())
    assert all(shapes[name].ndim >= 2 for name in names(optimizer, 0))
    assert all(shapes[name].ndim < 2 for name in names(optimizer, 1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert names(optimizer, 0) | names(optimizer, 1) == set(shapes)


def test_muon_takes_hidden_matrices_and_leaves_embeddings_and_head_to_adamw() -> None:
    optimizer = build_optimizer(tiny(), Train(optimizer="muon", learning_rate=1e-3, muon_learning_rate=2e-3))
    assert isinstance(optimizer, MuonAdamW)
    assert names(optimizer, 0) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("layers" in name for name in names(optimizer, 2))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 2e-3]


def test_muon_equals_torchs_own_within_the_rounding_of_bfloat16() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(24, 48)), nn.Parameter(torch.randn(24, 48)), nn.Parameter(torch.randn(48, 24))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    a = Muon(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            torch.manual_seed(step)
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        a.step()
        b.step()
    for start, mine, other in zip(before, ours, theirs, strict=True):
        assert torch.norm(mine - other) < 0.02 * torch.norm(start - other)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 40), (1, 40, 16), (3, 20, 20)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.max() < 1.4
        assert values.median() > 0.6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    torch.use_deterministic_algorithms(True)
    model = tiny()
    optimizer = build_optimizer(model, Train(optimizer=name))
    assert optimizer is not None
    give_gradients(model, 1)
    optimizer.step()
    other = copy.deepcopy(model)
    restored = build_optimizer(other, Train(optimizer=name))
    assert restored is not None
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for built, which in ((optimizer, model), (restored, other)):
        give_gradients(which, 2)
        for group in built.param_groups:
            group["lr"] *= 0.5
        built.step()
    torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def factors(kind: str, steps: int = 100, warmup: int = 10, decay: int = 20, minimum: float = 0.1) -> list[float]:
    return [
        schedule_factor(kind, s, steps=steps, warmup_steps=warmup, decay_steps=decay, minimum=minimum)
        for s in range(steps)
    ]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedules_rise_to_the_peak_and_end_at_the_minimum(kind: str) -> None:
    values = factors(kind)
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(values[10:]))


def test_wsd_is_flat_until_the_decay_and_linear_in_it() -> None:
    values = factors("wsd", minimum=0.0)
    assert set(values[10:80]) == {1.0}
    assert values[89] == pytest.approx(0.5)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert factors("cosine", steps=111, minimum=0.0)[60] == pytest.approx(0.5)
    assert math.isclose(factors("constant")[99], 1.0)


def test_names_of_transformers_are_left_to_transformers() -> None:
    model = tiny()
    assert build_optimizer(model, Train(optimizer="adafactor")) is None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    polynomial = Train(lr_scheduler="polynomial")
    assert build_schedule(optimizer, polynomial, steps=10, warmup_steps=1, decay_steps=0) is None
