"""Each process goes on with its own random numbers, or with new ones that differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcli.train import random_state


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_each_process_goes_on_with_its_own_numbers(tmp_path: Path) -> None:
    states: list[Any] = []
    expected = []
    for rank in range(2):
        random_state.separate(1, 0, rank)
        states.append(random_state.state())
        expected.append(draw())
    assert len(set(expected)) == 2
    random_state.save(tmp_path, states)
    for rank in (1, 0):
        assert random_state.load(tmp_path, rank, 2)
        assert draw() == expected[rank]


def test_states_of_another_number_of_processes_are_not_taken(tmp_path: Path) -> None:
    random_state.save(tmp_path, [random_state.state()] * 2)
    for processes in (1, 3, 4):
        before = random_state.state()
        assert not random_state.load(tmp_path, 0, processes)
        assert torch.equal(before["cpu"], random_state.state()["cpu"])


def test_one_process_has_the_file_that_transformers_names(tmp_path: Path) -> None:
    random_state.save(tmp_path, [random_state.state()])
    assert [path.name for path in tmp_path.iterdir()] == ["rng_state.pth"]
    assert random_state.load(tmp_path, 0, 1)
