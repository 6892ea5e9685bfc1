from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.runs import metrics
from gptcli.runs.folder import RunFolder
from tests.conftest import Cli


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for index, (name, status) in enumerate([("first", "done"), ("second", "stopped")]):
        run = RunFolder(tmp_path / "runs" / name)
        for step in range(10, 110, 10):
            metrics.append(run.metrics, {"step": step, "tokens": step * 64, "loss": 4 - step / 50})
        metrics.append(run.metrics, {"step": 100, "validation": {"loss": 2.1, "bits_per_byte": 1.25, "tokens": 5}})
        run.update(name=name, status=status, started=f"2026-01-0{index + 1}T00:00:00+00:00", plan={"steps": 100})
    return tmp_path


def test_list_has_a_line_a_run_newest_first(here: Path, run_cli: Cli) -> None:
    done = run_cli("runs", "list", cwd=here)
    assert done.code == 0, done.err
    assert done.out.index("second") < done.out.index("first")
    for text in ("done", "stopped", "100/100", "2.0000", "1.2500"):
        assert text in done.out
    listed = run_cli("runs", "list", "--json", cwd=here).json()
    assert [run["name"] for run in listed] == ["second", "first"]
    assert listed[0]["bits_per_byte"] == 1.25


def test_list_of_nothing_says_where_it_looked(tmp_path: Path, run_cli: Cli) -> None:
    done = run_cli("runs", "list", cwd=tmp_path)
    assert done.code == 0 and "no runs in runs/" in done.out
    assert run_cli("runs", "list", "--json", cwd=tmp_path).json() == []


def test_a_damaged_run_does_not_hide_the_others(here: Path, run_cli: Cli) -> None:
    (here / "runs" / "first" / "run.json").write_text("{")
    done = run_cli("runs", "list", cwd=here)
    assert done.code == 0 and "unreadable" in done.out and "second" in done.out
    assert "damaged" in done.err
    shown = run_cli("runs", "show", "first", cwd=here)
    assert shown.code == 4 and "Traceback" not in shown.err


def test_show_has_the_figures_and_a_curve(here: Path, run_cli: Cli) -> None:
    done = run_cli("runs", "show", "first", cwd=here)
    assert done.code == 0, done.err
    assert "bits per byte" in done.out and "step 100" in done.out
    assert any(0x2800 < ord(character) < 0x2900 for character in done.out)
    shown = run_cli("runs", "show", "runs/first", "--json", cwd=here).json()
    assert shown["run"]["status"] == "done" and shown["files"]["weights"] is None


def test_report_writes_the_page_and_prints_its_path(here: Path, run_cli: Cli) -> None:
    done = run_cli("runs", "report", "first", cwd=here)
    assert (done.code, done.out) == (0, "runs/first/report.html\n")
    assert "<svg" in (here / "runs" / "first" / "report.html").read_text()
    assert run_cli("runs", "report", "first", "--json", cwd=here).json() == {"report": "runs/first/report.html"}


def test_an_unknown_run_is_a_usage_error_with_the_nearest_name(here: Path, run_cli: Cli) -> None:
    done = run_cli("runs", "show", "frist", cwd=here)
    assert done.code == 2
    assert "Did you mean 'first'?" in done.err and "Traceback" not in done.err
