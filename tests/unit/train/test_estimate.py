"""What a machine that is not here will do: batch, memory a strategy and time; nothing of it is timed on this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptcli.device import CARDS
from gptcli.errors import MissingError, RecipeError, UsageError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.estimate import Estimate, estimate
from tests.conftest import make_project


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("timed on this machine")

    monkeypatch.setattr("gptcli.train.choices.timed_passes", refuse)
    monkeypatch.setattr("gptcli.device._measured_flops", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("plan"))


def planned(folder: Path, *overrides: str, **options: Any) -> Estimate:
    return estimate(load_recipe(str(folder / "tiny.yaml"), ("train.precision=auto", *overrides)), Silent(), **options)


def test_each_strategys_memory_is_the_sum_of_its_lines(folder: Path) -> None:
    found = planned(folder, "train.global_batch_size=16", device="h100", processes=8).as_dict()
    assert (found["device"], found["device_memory_bytes"], found["precision"]) == ("H100", 80 * 10**9, "bf16")
    assert (found["kind"], found["world_size"], found["strategy"]) == ("cuda", 8, "ddp")
    for each in found["strategies"].values():
        assert each["memory_bytes"] == sum(each["memory"].values())
        assert each["fits"]
    assert found["strategies"]["ddp"]["memory"] == found["memory"]
    smaller = [found["strategies"][name]["memory_bytes"] for name in ("zero1", "zero2", "zero3")]
    assert smaller == sorted(smaller, reverse=True)


def test_a_strategy_that_does_not_fit_says_so(folder: Path) -> None:
    large = ("model.config=null", "model.preset=1.5b", "train.global_batch_size=16")
    found = planned(folder, *large, device="rtx-3090", processes=8)
    fits = {name: each["fits"] for name, each in found.as_dict()["strategies"].items()}
    assert found.plan.strategy == "fsdp"
    assert fits["fsdp"] and not fits["ddp"]
    (columns, rows) = next(table for table in found.tables() if table[0][0] == "strategy")
    assert [row[-1] for row in rows if row[0] == "fsdp (chosen)"] == ["yes"]
    assert len(rows) == 5 and len(columns) == len(rows[0])


def test_two_machines_take_half_the_time_of_one_and_a_rate_is_the_data_sheets(folder: Path) -> None:
    one, two = (planned(folder, device="l4", processes=2, nodes=nodes) for nodes in (1, 2))
    assert (one.plan.world_size, two.plan.world_size) == (2, 4)
    assert one.seconds is not None and two.seconds == pytest.approx(one.seconds / 2)
    flops = next(card.flops for card in CARDS if card.name == "L4")
    assert one.seconds == pytest.approx(one.plan.total_flops / (0.4 * 2 * flops))


def test_precision_follows_the_card(folder: Path) -> None:
    found = {name: planned(folder, device=name).plan.precision for name in ("t4", "v100", "l4", "mi300x", "rtx-3090")}
    assert found == {"t4": "fp16", "v100": "fp16", "l4": "bf16", "mi300x": "bf16", "rtx-3090": "bf16"}
    with pytest.raises(MissingError, match="fp8"):
        planned(folder, "train.precision=fp8", device="a100")
    assert planned(folder, "train.precision=fp8", "train.attention=flash_attention_3", device="h100")


@pytest.mark.parametrize("name, near", [("h1000", "h100"), ("rtx4090", "rtx-4090"), ("???", "a100-80gb")])
def test_an_unknown_card_names_the_nearest(folder: Path, name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(folder, device=name)
    assert near in str(caught.value.remedy)


def test_processes_that_do_not_divide_are_an_error_of_the_recipe(folder: Path) -> None:
    with pytest.raises(RecipeError, match="do not divide over 3 processes"):
        planned(folder, device="h100", processes=3)
    with pytest.raises(RecipeError, match="devices a model"):
        planned(folder, "launch.parallel={tp: 4}", device="h100", processes=2)


def test_without_options_it_is_the_recipes_processes(folder: Path) -> None:
    settings = ("launch.processes=2", "launch.nodes=2")
    assert planned(folder, *settings, device="h100").plan.world_size == 4
    assert planned(folder, *settings, device="h100", processes=1).plan.world_size == 2
    alone = planned(folder, device="h100")
    assert alone.plan.world_size == 1
    assert list(alone.strategies) == ["ddp"]
