"""Fault 28, and memory that runs out later: a process whose address space is limited really runs out of it.

Machines differ, so the limits are measured: the same process first trains without one. All of it is one process, since
most of its time would be spent importing; the driver below runs one command after another and prints what became of
them. Nothing is patched: the allocator refuses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli, make_project

DRIVER = """
import contextlib, gc, io, json, resource, sys
from gptcli.cli.main import main

def size(field):  # bytes of address space: VmSize now, VmPeak at most so far
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

def run(limit, *arguments):
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (limit, free[1]))
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = main(["pretrain", "tiny.yaml", "--quiet", *arguments])
    resource.setrlimit(resource.RLIMIT_AS, free)
    done[arguments[0].removeprefix("name=")] = {"code": code, "err": streams[1].getvalue()}
    return size("VmPeak")

done = {}
free, settings = resource.getrlimit(resource.RLIMIT_AS), json.loads(sys.argv[1])
half = run(free[0], "name=half", *settings, "train.micro_batch_size=24")
whole = run(free[0], "name=whole", *settings, "train.micro_batch_size=48")
run((half + whole) // 2, "name=limited", *settings, "train.micro_batch_size=48")
row = ("data.sequence_length=8192", "train.global_batch_size=4", "train.micro_batch_size=4")
run(size("VmSize") + (128 << 20), "name=row", *settings, *row)
run(size("VmSize") + (256 << 20), "name=model", *settings, "model.preset=350m", "model.config=null")
print(json.dumps({**done, "margin": (whole - half) // 2}))
"""
# Deep and narrow: many activations for little work. Half a micro-batch's are some 300 MB.
SETTINGS = (
    "data.sequence_length=256",
    "data.validation=0",
    "model.config={num_hidden_layers: 8, hidden_size: 64, num_attention_heads: 4}",
    "train.global_batch_size=48",
    "train.max_steps=2",
    "train.log_every=1",
    "train.save_every=1",
    "train.sample_every=0",
)


@dataclass(frozen=True)
class Outcome:
    """What the commands of the driver came to."""

    folder: Path
    done: dict[str, Any]

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


# Half a minute to set up; what is decided is tested by units in tests/unit/train/test_backoff.py and test_fitting.py.
pytestmark = pytest.mark.slow_fault


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Outcome:
    if sys.platform != "linux":
        pytest.skip("only Linux holds a process to RLIMIT_AS and tells the size of its address space")
    folder = make_project(tmp_path_factory.mktemp("memory"))
    command = [sys.executable, "-c", DRIVER, json.dumps(SETTINGS)]
    # Each tensor in its own pages, so that what is freed leaves the address space; and no room reserved by each thread.
    variables = {**environment, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["half"]["code"] == found["whole"]["code"] == 0, found
    assert found["margin"] > 100 << 20, "too little to tell half a micro-batch from a whole one"
    return Outcome(folder, found)


def test_memory_that_runs_out_in_a_step_halves_the_micro_batch_and_trains_the_same(outcome: Outcome) -> None:
    limited = outcome.done["limited"]
    assert limited["code"] == 0, limited["err"]
    said = "out of memory in step 1: the micro-batch is 24 rows from now on, accumulation 2; the global batch stays 48"
    assert said in limited["err"]
    assert outcome.losses("limited") == pytest.approx(outcome.losses("whole"), abs=1e-5)


def test_the_smaller_micro_batch_is_recorded_and_a_resume_takes_it(outcome: Outcome, run_cli: Cli) -> None:
    run = outcome.folder / "runs" / "limited"
    assert json.loads((run / "run.json").read_text())["plan"]["micro_batch_size"] == 24
    assert "micro_batch_size: 24" in (run / "resolved.yaml").read_text()
    decided = json.loads((run / "checkpoint-1" / "MANIFEST.json").read_text())["decided"]
    assert decided["train.micro_batch_size"] == "24"
    settings = [*SETTINGS, "name=limited", "train.micro_batch_size=48", "train.max_steps=3"]
    done = run_cli("pretrain", "tiny.yaml", *settings, cwd=outcome.folder)
    assert done.code == 0, done.err
    assert "(24 x 2 at once)" in done.out
    assert len(outcome.losses("limited")) == 3


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("row", "one row of 8,192 tokens does not fit (step 1)"),
        ("model", "out of memory while the model was built"),
    ],
)
def test_out_of_memory_exits_6_with_the_keys_to_change_and_what_each_saves(
    outcome: Outcome, name: str, what: str
) -> None:
    done = outcome.done[name]
    assert done["code"] == 6, done["err"]
    head, *rest = done["err"].partition("error: ")[2].splitlines()
    assert head == what
    assert len(rest) <= 7
    assert "Traceback" not in done["err"]
    keys = [line.split()[0] for line in rest[1:]]
    assert all(" saves about " in line for line in rest[1:])
    assert {"train.activation_checkpointing=true", "train.optimizer=muon"} <= set(keys)
    assert json.loads((outcome.folder / "runs" / name / "run.json").read_text())["status"] == "failed"
