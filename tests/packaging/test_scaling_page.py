"""The tables of docs/scaling.md are what benchmarks/scaling.py computes, and its formulas agree with other ways."""

from __future__ import annotations

import importlib.util
import re
import sys
from math import exp
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_benchmark", REPOSITORY / "benchmarks" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_each_table_of_the_page_is_the_scripts(scaling: ModuleType) -> None:
    written = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", PAGE, flags=re.DOTALL))
    assert list(written) == list(scaling.TABLES)
    for name, make in scaling.TABLES.items():
        assert written[name] == make(), f"python benchmarks/scaling.py --write   ({name})"


def test_a_ring_sends_what_the_formula_says(scaling: ModuleType) -> None:
    processes, size = 4, 12
    parts = [[np.full(size // processes, 10.0**rank) for _ in range(processes)] for rank in range(processes)]
    sent = 0
    for step in range(2 * (processes - 1)):
        moving = [
            (rank, (rank - step) % processes, parts[rank][(rank - step) % processes]) for rank in range(processes)
        ]
        for rank, part, values in moving:
            to = (rank + 1) % processes
            parts[to][part] = parts[to][part] + values if step < processes - 1 else values
            sent += len(values) if rank == 0 else 0
    assert all(np.array_equal(part, np.full(size // processes, 1111.0)) for rank in parts for part in rank)
    assert sent == scaling.all_reduce_bytes(size, processes)


@pytest.mark.parametrize(("save", "between"), [(5, 178_000), (435, 178_000), (435, 2_850_000)])
def test_the_interval_between_checkpoints_is_the_minimum_of_the_expected_time(
    scaling: ModuleType, save: float, between: float
) -> None:
    def expected(interval: float) -> float:  # Daly 2006, the exact expectation, up to factors that do not matter
        return (exp((interval + save) / between) - 1) / interval

    interval = scaling.best_interval(save, between)
    assert expected(interval) < min(expected(0.95 * interval), expected(1.05 * interval))


def test_the_1_2_b_model_of_the_page_is_the_recipes(scaling: ModuleType) -> None:
    from types import SimpleNamespace

    from gptcli.model.build import build_config, count_parameters
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe("pretrain/llama-1b-fsdp")
    config, _ = build_config(loaded, SimpleNamespace(vocab_size=50257, bos=50256, eos=50256, pad=50256))  # type: ignore[arg-type]
    counts = count_parameters(config)
    model = next(model for model in scaling.MODELS if model.name == "1.2 B")
    assert model.parameters == pytest.approx(counts.total, rel=1e-3)
    assert 1.0e9 < counts.total < 1.3e9
    train, data = loaded.recipe.train, loaded.recipe.data
    assert data is not None and train.global_batch_tokens is not None
    assert model.sequence == data.sequence_length
    assert model.global_rows * model.sequence == train.global_batch_tokens


def test_the_head_of_the_recipe_says_what_the_formulas_give(scaling: ModuleType) -> None:
    head = (REPOSITORY / "recipes/pretrain/llama-1b-fsdp.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    model = next(model for model in scaling.MODELS if model.name == "1.2 B")
    hours = 10e9 * model.flops_per_token / (8 * scaling.PEAK * scaling.UTILIZATION) / 3600
    state, kept = model.parameters * scaling.STATE / 8e9, model.activations(model.micro_rows) / 1e9
    assert f"{state:.1f} GB of weights" in head
    assert f"about {kept:.0f} GB of activations" in head
    assert f"{model.parameters * scaling.SAVED / 1e9:.0f} GB a checkpoint" in head
    assert f"{model.flops_per_token:.1e}".replace("e+0", "e") + " FLOPs a token" in head
    assert f"{hours:.1f} hours" in head
    assert f"{round(10e9 / 2**20):,} steps" in head
