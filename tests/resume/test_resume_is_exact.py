"""Resume: the losses of every later step and the final weights equal those of a run that was never disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli, make_project
from tests.runs import assert_same_model, lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, run_cli: Cli) -> Path:
    folder = make_project(tmp_path_factory.mktemp("undisturbed"))
    done = run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", cwd=folder)
    assert done.code == 0, done.err
    return folder / "runs" / "tiny"


def start(folder: Path, environment: dict[str, str], *overrides: str) -> subprocess.Popen[str]:
    """A training in its own process, whose standard output is read line by line."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "gptcli", "pretrain", "tiny.yaml", "train.optimizer=muon", *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    assert process.stderr is not None
    raise AssertionError(f"{text!r} was never printed: {process.stderr.read()}")


def test_sigterm_saves_and_exits_75_and_the_resumed_run_is_the_same(
    undisturbed: Path, tmp_path: Path, run_cli: Cli, environment: dict[str, str]
) -> None:
    folder = make_project(tmp_path)
    process = start(folder, environment)
    wait_for(process, "step 4  validation loss")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    run = folder / "runs" / "tiny"
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    done = run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", cwd=folder)
    assert done.code == 0, done.err
    assert "resuming" in done.out
    assert_same_model(undisturbed / "final", run / "final")
    assert lines(run, "samples.jsonl") == lines(undisturbed, "samples.jsonl")
    assert lines(run) == lines(undisturbed)


@pytest.mark.slow_fault
def test_sigkill_between_checkpoints_loses_nothing_that_was_saved(
    undisturbed: Path, tmp_path: Path, run_cli: Cli, environment: dict[str, str]
) -> None:
    folder = make_project(tmp_path)
    process = start(folder, environment)
    wait_for(process, "step 4  validation loss")
    run = folder / "runs" / "tiny"
    while not (run / "checkpoint-4" / "MANIFEST.json").exists() and process.poll() is None:
        os.sched_yield()
    process.kill()
    process.communicate(timeout=60)
    done = run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", cwd=folder)
    assert done.code == 0, done.err
    assert_same_model(undisturbed / "final", run / "final")
    assert lines(run) == lines(undisturbed)


@pytest.mark.slow_fault
def test_a_damaged_checkpoint_is_passed_over_and_named(undisturbed: Path, tmp_path: Path, run_cli: Cli) -> None:
    folder = make_project(tmp_path)
    assert run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", cwd=folder).code == 0
    run = folder / "runs" / "tiny"
    weights = run / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    done = run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", cwd=folder)
    assert done.code == 0, done.err
    assert "checkpoint-8 is passed over: model.safetensors has" in done.err
    assert_same_model(undisturbed / "final", run / "final")


@pytest.mark.slow_fault
def test_two_names_give_equal_metrics_and_weights(undisturbed: Path, run_cli: Cli) -> None:
    folder = undisturbed.parent.parent
    done = run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", "name=again", cwd=folder)
    assert done.code == 0, done.err
    again = folder / "runs" / "again"
    assert lines(again) == lines(undisturbed)
    assert lines(again, "samples.jsonl") == lines(undisturbed, "samples.jsonl")
    assert_same_model(again / "final", undisturbed / "final")


def test_the_resolved_recipe_gives_the_same_run(undisturbed: Path, run_cli: Cli) -> None:
    folder = undisturbed.parent.parent
    done = run_cli("pretrain", str(undisturbed / "resolved.yaml"), "name=resolved", cwd=folder)
    assert done.code == 0, done.err
    assert lines(folder / "runs" / "resolved") == lines(undisturbed)


@pytest.mark.slow_fault
def test_a_finished_run_says_so_and_a_longer_one_goes_on(undisturbed: Path, tmp_path: Path, run_cli: Cli) -> None:
    folder = make_project(tmp_path)
    assert run_cli("pretrain", "tiny.yaml", cwd=folder).code == 0
    finished = run_cli("pretrain", "tiny.yaml", "--json", cwd=folder)
    assert finished.code == 0
    assert "is finished" in finished.err
    assert finished.json()["step"] == 8
    longer = run_cli("pretrain", "tiny.yaml", "train.max_steps=12", cwd=folder)
    assert longer.code == 0, longer.err
    assert "train.max_steps: 8 -> 12" in longer.out
    assert [row["step"] for row in lines(folder / "runs" / "tiny") if "loss" in row] == [1, 2, 4, 6, 8, 10, 12]


def test_a_changed_recipe_is_refused_with_code_4(undisturbed: Path, run_cli: Cli) -> None:
    folder = undisturbed.parent.parent
    done = run_cli("pretrain", "tiny.yaml", "train.optimizer=muon", "train.learning_rate=1e-3", cwd=folder)
    assert done.code == 4
    assert "train.learning_rate: 0.003 -> 0.001" in done.err
    assert "--allow-changes train.learning_rate" in done.err
    assert len(done.err.strip().splitlines()) <= 8


@pytest.mark.slow_fault
def test_a_run_killed_before_final_writes_it_and_reports_the_same_result(project: Path, run_cli: Cli) -> None:
    first = run_cli("pretrain", "tiny.yaml", "--json", cwd=project).json()
    shutil.rmtree(project / "runs" / "tiny" / "final")
    done = run_cli("pretrain", "tiny.yaml", "--json", cwd=project)
    assert done.code == 0, done.err
    assert (project / "runs" / "tiny" / "final" / "model.safetensors").exists()
    for key in ("step", "tokens", "loss", "validation"):
        assert done.json()[key] == first[key]


@pytest.mark.slow_fault
def test_overwrite_with_a_recipe_that_cannot_run_keeps_the_old_run(project: Path, run_cli: Cli) -> None:
    assert run_cli("pretrain", "tiny.yaml", "--quiet", cwd=project).code == 0
    done = run_cli("pretrain", "tiny.yaml", "data.train=gone.txt", "--overwrite", cwd=project)
    assert done.code == 3
    assert (project / "runs" / "tiny" / "final" / "model.safetensors").exists()


@pytest.mark.slow_fault
def test_a_mixture_of_experts_whose_files_have_other_names_goes_on(tmp_path: Path, run_cli: Cli) -> None:
    folder = make_project(tmp_path)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 32}
    model = {"type": "qwen3_moe", "config": {**sizes, "num_experts": 4, "num_experts_per_tok": 2}}
    command = ("pretrain", "tiny.yaml", "model=null", f"model={json.dumps(model)}")
    assert run_cli(*command, cwd=folder).code == 0
    whole, run = folder / "runs" / "whole", folder / "runs" / "tiny"
    shutil.copytree(run, whole)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-8")
    done = run_cli(*command, cwd=folder)
    assert done.code == 0, done.err
    assert "from checkpoint-4" in done.out
    assert_same_model(whole / "final", run / "final")
    assert lines(run) == lines(whole)
