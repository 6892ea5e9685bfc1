"""The dry step: what it finds is the largest that fits, under a real limit of memory, and it leaves nothing behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.model.build import counts_of
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.reporting import Silent
from gptcli.train import fitting
from gptcli.train.begin import Options
from gptcli.train.decisions import Hardware
from gptcli.train.fitting import dry_step, largest_micro_batch, largest_that_fits
from gptcli.train.plan import Plan, make_plan
from gptcli.train.run import train
from tests.conftest import REPOSITORY, make_project
from tests.tiny import make_model


@given(st.sets(st.integers(1, 10_000), min_size=1, max_size=60).map(sorted), st.integers(0, 10_001), st.data())
def test_the_largest_that_fits_is_found_in_a_logarithm_of_tries(
    sizes: list[int], limit: int, data: st.DataObject
) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    first = data.draw(st.sampled_from(sizes))
    assert largest_that_fits(sizes, fits, first=first) == max((size for size in sizes if size <= limit), default=None)
    assert tried[0] == first
    assert len(tried) <= 1 + math.ceil(math.log2(len(sizes) + 1))


def planned(folder: Path, model: Any, *overrides: str) -> tuple[LoadedRecipe, Plan]:
    loaded = load_recipe(str(make_project(folder) / "tiny.yaml"), ["train.precision=fp32", *overrides])
    hardware = Hardware("cuda", False, 1, 1 << 36)
    return loaded, make_plan(loaded, counts_of(model), hardware, rows_per_epoch=10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_step_leaves_nothing_behind(tmp_path: Path, checkpointing: bool) -> None:
    model = make_model("llama", attention_dropout=0.1)
    model.config.use_cache = True
    loaded, plan = planned(tmp_path, model, f"train.activation_checkpointing={str(checkpointing).lower()}")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rows, reason = dry_step(model, plan, loaded.recipe.train)
    assert rows == 4
    assert "the whole batch" in reason
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert model.config.use_cache is True
    assert not model.is_activation_checkpointing


def test_an_error_that_is_not_of_memory_is_not_taken_for_a_size_that_does_not_fit(tmp_path: Path) -> None:
    model = make_model("llama")
    loaded, plan = planned(tmp_path, model)

    def fail(*_: Any) -> None:
        raise RuntimeError("another defect")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="another defect"):
        dry_step(model, plan, loaded.recipe.train)


# 8 rows need some 150 MB and 16 twice that; the limit is put half-way, where 12 would fit.
LIMITED = """
import json, resource, sys
import torch
from pathlib import Path
from gptcli.train.fitting import _pass, largest_micro_batch
from tests.tiny import make_model
from tests.unit.train.test_fitting import planned

def size(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

sizes = [1, 2, 4, 8, 16, 32]
model = make_model("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=256, head_dim=32, context=512)
settings = ("train.global_batch_size=32", "data.sequence_length=512")
loaded, plan = planned(Path(sys.argv[1]), model, *settings)
section = loaded.recipe.train
peaks = []
for rows in (8, 16):
    _pass(model, plan, section, rows)
    model.zero_grad()
    peaks.append(size("VmPeak"))
found = []
six_rows = (peaks[1] - peaks[0]) * 3 // 4
resource.setrlimit(resource.RLIMIT_AS, (sum(peaks) // 2, resource.getrlimit(resource.RLIMIT_AS)[1]))
for spare in (0, six_rows, 1 << 40):
    found.append(largest_micro_batch(model, plan, section, sizes=sizes, spare_bytes=spare))
print(json.dumps({"found": found, "margin": (peaks[1] - peaks[0]) // 2}))
"""


@pytest.mark.slow_fault
def test_under_a_limit_the_answer_is_the_size_below_it(tmp_path: Path, environment: dict[str, str]) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux holds a process to RLIMIT_AS and tells the size of its address space")
    # Each tensor in its own pages, so that what is freed leaves the address space; and no room reserved by each thread.
    variables = {**environment, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["margin"] > 30 << 20, "too little to tell one size from the next"
    # Of 12 rows' memory: all of it, half of it, and with more to be spared than there is.
    assert result["found"] == [8, 4, None]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a GPU, and training on the CPU: the dry step itself is the same code."""
    monkeypatch.setattr("gptcli.train.assemble.Hardware", lambda kind, *rest, **more: Hardware("cuda", *rest, **more))


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def trained(folder: Path, *overrides: str) -> tuple[Path, list[str]]:
    lines = Lines()
    loaded = load_recipe(str(folder / "tiny.yaml"), [f"output_dir={folder}/runs", "train.sample_every=0", *overrides])
    train(loaded, Options("pretrain"), lines)
    return folder / "runs" / "tiny", lines.said


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_answer_is_told_and_recorded_and_a_resume_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_project(tmp_path)
    real: Callable[..., int | None] = largest_micro_batch
    asked: list[list[int]] = []

    def two_fit(*arguments: Any, sizes: list[int], **more: Any) -> int | None:
        asked.append(sizes)
        return real(*arguments, **more, sizes=[1, 2])

    monkeypatch.setattr(fitting, "largest_micro_batch", two_fit)
    monkeypatch.setattr("gptcli.train.batches.GPU_MICRO_BATCH_TOKENS", 32)  # the estimate: one row
    monkeypatch.setattr("gptcli.train.fitting.dry_step_sizes", lambda plan: [1, 2, 4])
    run, said = trained(folder)
    assert asked == [[1, 2, 4]]
    assert any(line.startswith("auto: train.micro_batch_size = 2 (dry step: ") for line in said)
    plan = json.loads((run / "run.json").read_text())["plan"]
    assert (plan["micro_batch_size"], plan["gradient_accumulation_steps"], plan["dry_step"]) == (2, 2, False)
    assert "micro_batch_size: 2" in (run / "resolved.yaml").read_text()
    manifest = json.loads((run / "checkpoint-8" / "MANIFEST.json").read_text())
    assert manifest["decided"]["train.micro_batch_size"] == "2"
    _, said = trained(folder, "train.max_steps=10")
    assert len(asked) == 1
    assert any("(2 x 2 at once)" in line for line in said)
    # Another size in the recipe wins over the checkpoint's.
    _, said = trained(folder, "train.max_steps=12", "train.micro_batch_size=1")
    assert any("(1 x 4 at once)" in line for line in said)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_training_after_a_dry_step_is_as_without_one(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    found, _ = trained(folder)
    given, _ = trained(folder, f"output_dir={folder}/given", "train.micro_batch_size=4")
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (found, folder / "given" / "tiny")]
    assert given == found
    one, other = ([json.loads(line).get("loss") for line in each] for each in lines)
    assert one == other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_dry_step_holds_the_reserve_and_clears_the_allocator(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model = make_model("llama", num_hidden_layers=4, hidden_size=256, intermediate_size=1024, context=512).to(device)
    settings = ("train.global_batch_size=64", "data.sequence_length=512")
    loaded, plan = planned(tmp_path, model, *settings)

    def found(spare_bytes: int) -> int | None:
        return largest_micro_batch(model, plan, loaded.recipe.train, sizes=[1, 8, 64], spare_bytes=spare_bytes)

    assert found(0) == 64  # and CUDA's libraries have what they keep
    before, state = torch.cuda.memory_allocated(device), torch.cuda.get_rng_state(device)
    free, total = torch.cuda.mem_get_info(device)
    assert found(free - (1 << 30)) == 8  # of 64 rows, 4 layers keep more than a GiB
    assert found(total) is None
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert torch.cuda.max_memory_allocated(device) == torch.cuda.memory_allocated(device) <= before
