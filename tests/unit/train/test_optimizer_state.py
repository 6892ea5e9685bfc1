"""An optimizer's state finds its parameters by name, and nothing else is taken for it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gptcli.errors import CheckpointError
from gptcli.train import optimizer_state


def trained(model: nn.Module, names: list[str], steps: int = 3) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """An AdamW whose groups list the parameters in a given order, after some steps of known gradients."""
    named = dict(model.named_parameters())
    groups = [{"params": [named[name] for name in names], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        for name, parameter in named.items():
            parameter.grad = torch.full_like(parameter, 0.1 * step + len(name))
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))


def test_the_order_of_the_parameters_does_not_matter(tmp_path: Path) -> None:
    one = make()
    names = [name for name, _ in one.named_parameters()]
    optimizer, schedule = trained(one, names)
    optimizer_state.save(tmp_path, optimizer_state.by_name(one, optimizer))
    optimizer_state.save_schedule(tmp_path, schedule)

    other = copy.deepcopy(one)
    loaded, loaded_schedule = trained(other, names[::-1], steps=0)
    optimizer_state.load(tmp_path, other, loaded, loaded_schedule)
    assert loaded_schedule.state_dict()["last_epoch"] == 3
    assert loaded.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[mine].items():
            assert torch.equal(loaded.state[theirs][key], value), (name, key)


def test_the_state_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    model = make()
    names = [name for name, _ in model.named_parameters()]
    optimizer, schedule = trained(model, names)
    optimizer_state.save(tmp_path, optimizer_state.by_name(model, optimizer))
    optimizer_state.save_schedule(tmp_path, schedule)
    larger = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 5))
    with pytest.raises(CheckpointError, match="other parameters"):
        optimizer_state.load(tmp_path, larger, *trained(larger, [name for name, _ in larger.named_parameters()]))
    with pytest.raises(CheckpointError, match="other parameters") as caught:
        optimizer_state.load(tmp_path, model, *trained(model, names[:2]))
    assert caught.value.exit_code == 4
