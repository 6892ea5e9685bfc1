"""torch.compile through the command line: with a compiler, and where the compiler fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.conftest import Cli, make_project

# One layer compiles in about ten seconds.
SETTINGS = (
    "model.type=gpt2",
    "model.config={num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2}",
    "train.precision=fp32",
    "train.micro_batch_size=2",
    "train.max_steps=null",
    "train.epochs=0.05",  # ends with a smaller micro-batch, which is not compiled for
    "train.log_every=1",
)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in lines(run) if "loss" in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, run_cli: Cli) -> Path:
    folder = make_project(tmp_path_factory.mktemp("plain"))
    done = run_cli("pretrain", "tiny.yaml", *SETTINGS, "train.compile=false", "name=plain", cwd=folder)
    assert done.code == 0, done.err
    return folder / "runs" / "plain"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.slow_fault
def test_a_compiled_run_learns_the_same_and_keeps_the_names_of_the_weights(plain: Path, run_cli: Cli) -> None:
    folder = plain.parent.parent
    inductor = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = run_cli("pretrain", "tiny.yaml", *SETTINGS, "train.compile=true", "name=fast", cwd=folder, **inductor)
    assert done.code == 0, done.err
    assert "compile: ready after" in done.out
    assert "uncompiled" not in done.out
    run = plain.parent / "fast"
    assert losses(run) == pytest.approx(losses(plain), abs=1e-4)
    assert (
        load_file(run / "final" / "model.safetensors").keys() == load_file(plain / "final" / "model.safetensors").keys()
    )
    last = json.loads((run / "run.json").read_text())["plan"]
    assert last["total_rows"] % last["micro_batch_size"], "the smaller last batch is part of this test"


@pytest.mark.slow_fault
def test_without_a_compiler_a_line_says_so_and_the_run_is_the_uncompiled_one(plain: Path, run_cli: Cli) -> None:
    folder = plain.parent.parent
    broken = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(folder / "none")}
    done = run_cli("pretrain", "tiny.yaml", *SETTINGS, "train.compile=true", "name=slow", cwd=folder, **broken)
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if line.startswith("compile: ")]
    assert len(said) == 1
    assert "No working C++ compiler" in said[0]
    assert said[0].endswith("training goes on uncompiled")
    assert "Traceback" not in done.out + done.err
    one, other = (load_file(run / "final" / "model.safetensors") for run in (plain, plain.parent / "slow"))
    assert all((one[name] == other[name]).all() for name in one)
    assert losses(plain.parent / "slow") == losses(plain)
    manifest = json.loads(next((plain.parent / "slow").glob("checkpoint-*/MANIFEST.json")).read_text())
    assert manifest["decided"]["train.compile"] == "off"
