"""DeepSpeed's ZeRO on two processes: the result of one process, from every checkpoint, and its parts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import team
from tests.conftest import REPOSITORY
from tests.distributed.test_equal import assert_equal, forget, train_alone
from tests.faults.test_numbers import PLAIN, make_poisoned, metrics, poisoned_steps
from tests.faults.test_numbers import RECIPE as POISONED
from tests.runs import Forks, lines

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'gptcli[deepspeed]'"
)
SLOW = pytest.mark.slow_fault
ZERO = "launch.strategy=deepspeed"


def stage(number: int) -> str:
    return f"launch.deepspeed={{zero_optimization: {{stage: {number}, stage3_param_persistence_threshold: 0}}}}"


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=SLOW)])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The folder of a run of one process."""
    return train_alone(request.param, tmp_path_factory, forks)


@pytest.mark.parametrize("number", [pytest.param(1, marks=SLOW), 2, 3])
def test_two_processes_end_as_one_and_go_on_to_the_last_bit(alone: Path, forks: Forks, number: int) -> None:
    folder, run = alone.parent.parent, alone.parent / f"zero-{number}"
    settings = ["pretrain", "r.yaml", f"name={run.name}", ZERO, stage(number)]
    done = team.run(forks, 2, *settings, cwd=folder)
    assert "Warning" not in done.err and "DeepSpeed" not in done.out + done.err
    assert_equal(run, alone)
    undisturbed, weights = lines(run), load_file(run / "final" / "model.safetensors")
    forget(run)
    assert "from checkpoint-10 (" in team.run(forks, 2, *settings, cwd=folder).out
    assert lines(run) == undisturbed
    again = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, [ZERO, stage(3)]), (1, [])),
        pytest.param((1, []), (2, [ZERO, stage(3)]), marks=SLOW),
        pytest.param((2, [ZERO, stage(1)]), (2, ["launch.strategy=fsdp"]), marks=SLOW),
        pytest.param((2, [ZERO, stage(3)]), (2, [ZERO, stage(2)]), marks=SLOW),
    ],
    ids=["3-alone", "alone-3", "1-fsdp", "3-2"],
)
def test_a_checkpoint_goes_on_under_another_strategy(
    alone: Path,
    forks: Forks,
    before: tuple[int, list[str]],
    after: tuple[int, list[str]],
    request: pytest.FixtureRequest,
) -> None:
    folder, name = alone.parent.parent, request.node.callspec.id
    settings = ["pretrain", "r.yaml", f"name={name}"]
    team.run(forks, before[0], *settings, *before[1], cwd=folder)
    forget(alone.parent / name)
    assert "from checkpoint-10 (" in team.run(forks, after[0], *settings, *after[1], cwd=folder).out
    assert_equal(alone.parent / name, alone)


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=SLOW)])
def test_bf16_keeps_and_saves_fp32_weights(alone: Path, forks: Forks, number: int) -> None:
    folder, run = alone.parent.parent, alone.parent / f"bf16-{number}"
    settings = ["pretrain", "r.yaml", f"name={run.name}", "train.precision=bf16", ZERO, stage(number)]
    team.run(forks, 2, *settings, cwd=folder)
    losses, expected = ([line["loss"] for line in lines(path) if "loss" in line] for path in (run, alone))
    assert np.allclose(losses, expected, rtol=5e-3, atol=0)
    weights = load_file(run / "final" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
    assert json.loads((run / "final" / "config.json").read_text())["dtype"] == "float32"
    undisturbed = lines(run)
    forget(run)
    team.run(forks, 2, *settings, cwd=folder)
    assert lines(run) == undisturbed


@pytest.mark.parametrize("number", [2, 3])
def test_a_nan_stops_before_the_update_and_one_that_is_skipped_changes_nothing(
    tmp_path: Path, forks: Forks, number: int
) -> None:
    folder = make_poisoned(tmp_path)
    first = poisoned_steps(folder)[0]
    settings = ["pretrain", "tiny.yaml", *POISONED, *PLAIN]
    zero = [ZERO, stage(number)]
    ended = team.start(forks, 2, *settings, "name=stops", "train.save_every=1", *zero, cwd=folder).finish()
    assert [each.code for each in ended] == [5, 5], ended[0].err
    assert f"the gradient of step {first} is not finite (norm nan, loss nan)" in ended[0].err
    run = folder / "runs" / "stops"
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, first))
    assert {path.name for path in run.glob("checkpoint-*")} <= {f"checkpoint-{step}" for step in range(1, first)}
    assert not (run / "final").exists()

    assert forks(*settings, "name=alone", "train.non_finite=skip", cwd=folder).code == 0
    team.run(forks, 2, *settings, "name=skips", "train.non_finite=skip", *zero, cwd=folder)
    alone, skips = (folder / "runs" / name for name in ("alone", "skips"))
    assert [line.get("skipped") for line in lines(skips)] == [line.get("skipped") for line in lines(alone)]
    one, other = (load_file(path / "final" / "model.safetensors") for path in (alone, skips))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("number", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_each_process_holds_its_part_and_takes_it_back(tmp_path: Path, number: int) -> None:
    script = Path(__file__).with_name("zero_parts.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    path = os.pathsep.join([str(REPOSITORY), *sys.path])
    done = subprocess.run(
        [*launch, str(team.free_port()), str(script), str(number), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for part in found:
        half = part["every"] / 2 + 64  # what fills parameters and groups up
        assert part["state"] <= half
        assert part["gradient"] <= half
        assert part["whole"]
        assert (part["parts"] <= half and part["weights"] == 0) == (number == 3)
    assert sum(part["state"] for part in found) >= found[0]["every"]
