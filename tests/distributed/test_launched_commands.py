"""The command line on several processes, up to the training: what is started, refused and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli

NO_FOLDER = "output_dir=text.txt"
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}


def test_an_error_of_two_processes_is_said_once_with_its_code(project: Path, run_cli: Cli) -> None:
    done = run_cli("pretrain", "tiny.yaml", "launch.processes=2", NO_FOLDER, cwd=project)
    assert done.code == 4
    assert done.err.startswith(f"error: {project}/text.txt/tiny: the run's folder cannot be written")
    assert done.err.count("error:") == 1


def test_debug_shows_the_workers_traceback(project: Path, run_cli: Cli) -> None:
    done = run_cli("pretrain", "tiny.yaml", "launch.processes=2", NO_FOLDER, "--debug", cwd=project)
    assert done.code == 4
    assert "gptcli.errors.CheckpointError" in done.err
    assert "gptcli/train/run.py" in done.err


@pytest.mark.parametrize(
    "variables",
    [
        {**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"},
        {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    ],
)
def test_a_worker_of_another_launcher_names_itself(project: Path, run_cli: Cli, variables: dict[str, str]) -> None:
    done = run_cli("pretrain", "tiny.yaml", "train.max_stps=1", cwd=project, **variables)
    assert done.code == 2
    assert done.err.startswith("error: process 1 of 2: override train.max_stps=1: ")


def test_eval_of_several_processes_works_in_the_first(project: Path, run_cli: Cli) -> None:
    where = {**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"}
    other = run_cli("eval", "gone", "--data", "text.txt", "--json", cwd=project, **where)
    assert (other.code, other.out, other.err) == (0, "", "")
    first = run_cli("eval", "gone", "--data", "text.txt", cwd=project, **{**where, "RANK": "0", "LOCAL_RANK": "0"})
    assert first.code != 0 and "eval works in one process" in first.out


@pytest.mark.parametrize(
    ("override", "variables", "words"),
    [
        ("launch.nodes=2", {}, ["launch.nodes is 2", "launch.rendezvous=HOST:PORT"]),
        ("launch.processes=1", {"RANK": "1"}, ["WORLD_SIZE is not set"]),
        ("launch.rendezvous=head", {}, ["launch.rendezvous is head: not host:port"]),
    ],
)
def test_what_cannot_be_started_is_a_usage_error(
    project: Path, run_cli: Cli, override: str, variables: dict[str, str], words: list[str]
) -> None:
    nodes = [] if override != "launch.rendezvous=head" else ["launch.nodes=2"]
    done = run_cli("pretrain", "tiny.yaml", override, *nodes, cwd=project, **variables)
    assert done.code == 2
    assert all(word in done.err for word in words), done.err
