from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CheckpointError, MissingError, UsageError
from gptcli.runs.folder import RunFolder, find_runs, owner, resolve_model, resolve_run, runs_root, status


def make_run(root: Path, name: str, *, weights: bool = False, **fields: Any) -> RunFolder:
    run = RunFolder(root / name)
    run.path.mkdir(parents=True)
    run.update(**{"name": name, "status": "done", "started": "2026-01-01T00:00:00+00:00", **fields})
    if weights:
        make_weights(run.final)
    return run


def make_weights(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path


def test_updates_are_merged_and_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.update(status="running", pid=1)
    run.update(status="done")
    assert run.read() == {"status": "done", "pid": 1}
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_only_complete_checkpoints_count_by_step_and_not_by_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for index, name in enumerate(
        ("checkpoint-1000", "checkpoint-90", "checkpoint-2000", "checkpoint-x", ".checkpoint-5")
    ):
        make_weights(tmp_path / name)
        if name != "checkpoint-2000":
            (tmp_path / name / "MANIFEST.json").touch()
        os.utime(tmp_path / name, (index, 10_000 - index))
    assert [step for step, _ in run.checkpoints()] == [90, 1000]
    assert run.weights() == tmp_path / "checkpoint-1000"
    make_weights(run.final)
    assert run.weights() == run.final


def test_a_run_whose_process_is_gone_has_died(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    run = make_run(tmp_path, "a", status="running", pid=child.pid, host=platform.node())
    assert status(run) == "died"
    run.update(host="another-machine")
    assert status(run) == "running"
    run.update(host=platform.node(), pid=os.getpid())
    assert status(run) == "running"
    run.update(pid=-1)
    assert status(run) == "died"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_recycled_process_id_is_not_taken_for_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", status="running", pid=os.getpid(), host=platform.node())
    os.utime(run.run_json, (1, 1))
    assert status(run) == "died"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"status": "flying"}', "[" * 100_000, "\x00\xff"])
def test_a_damaged_run_json_is_a_typed_error_and_still_listed(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path, "a")
    run.run_json.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError):
        status(run)
    assert find_runs(tmp_path) == [run]


def test_a_folder_without_run_json_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert find_runs(tmp_path) == []
    assert find_runs(tmp_path / "absent") == []
    with pytest.raises(MissingError):
        RunFolder(tmp_path / "a").read()


def test_the_newest_run_is_the_last_started_or_ended(tmp_path: Path) -> None:
    make_run(tmp_path, "old", started="2026-01-02T00:00:00")
    make_run(tmp_path, "resumed", started="2026-01-01T00:00:00+00:00", ended="2026-01-05T00:00:00+00:00")
    make_run(tmp_path, "new", started="2026-01-04T00:00:00+02:00")
    assert [run.name for run in find_runs(tmp_path)] == ["resumed", "new", "old"]


def test_runs_are_looked_for_here_then_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCLI_RUNS", str(tmp_path / "elsewhere"))
    assert runs_root() == tmp_path / "elsewhere"
    (tmp_path / "runs").mkdir()
    assert runs_root() == Path("runs")


def test_a_model_is_a_run_or_a_folder_of_it_or_any_folder(here: Path) -> None:
    run = make_run(here / "runs", "a", weights=True)
    make_weights(run.checkpoint(5))
    (run.checkpoint(5) / "MANIFEST.json").touch()
    make_weights(here / "plain")
    final = Path("runs/a/final")
    assert resolve_model("a") == resolve_model("runs/a") == resolve_model("runs/a/") == final
    assert resolve_model("a/final") == final
    assert resolve_model("a/checkpoint-5") == resolve_model("runs/a/checkpoint-5") == Path("runs/a/checkpoint-5")
    assert resolve_model(str(run.path)) == run.final
    assert resolve_model("plain") == Path("plain")
    assert resolve_model("openai-community/gpt2") == Path("openai-community/gpt2")
    assert owner(final) == RunFolder(run.path) == owner(run.path)
    assert owner(here / "plain") is None


def test_without_a_name_the_newest_run_with_weights_is_taken(here: Path) -> None:
    with pytest.raises(MissingError, match="no runs"):
        resolve_model(None)
    make_run(here / "runs", "old", weights=True)
    make_run(here / "runs", "new", started="2026-02-01T00:00:00+00:00")
    assert resolve_model(None) == Path("runs/old/final")


@pytest.mark.parametrize(
    "argument", ["quikstart", "runs/absent", "runs/absent/final", "./x", "/absent", "a/b/c", "a=b"]
)
def test_what_is_not_there_is_named_and_not_asked_of_the_hub(here: Path, argument: str) -> None:
    make_run(here / "runs", "quickstart", weights=True)
    with pytest.raises(MissingError) as caught:
        resolve_model(argument)
    assert argument in caught.value.what
    if argument == "quikstart":
        assert "quickstart" in (caught.value.remedy or "")


def test_a_file_or_an_empty_name_is_no_model(here: Path) -> None:
    (here / "model.safetensors").touch()
    for argument in ("model.safetensors", "", " "):
        with pytest.raises(UsageError):
            resolve_model(argument)


def test_a_run_without_weights_says_so(here: Path) -> None:
    make_run(here / "runs", "a")
    with pytest.raises(MissingError, match="no weights yet"):
        resolve_model("a")


def test_a_run_is_found_by_name_or_path(here: Path) -> None:
    run = make_run(here / "runs", "a")
    assert resolve_run("a") == resolve_run("runs/a") == RunFolder(Path("runs/a"))
    assert resolve_run(str(run.path)) == run
    for wrong in ("b", "../runs/b", "", str(here)):
        with pytest.raises(UsageError):
            resolve_run(wrong)
