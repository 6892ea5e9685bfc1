from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CheckpointError, MissingError
from gptcli.recipe.schema import Recipe
from gptcli.runs import metrics
from gptcli.runs.folder import RunFolder
from gptcli.runs.report import page, write_report
from gptcli.runs.summary import ago, count, size, span, summarize
from gptcli.train.record import loss_unit

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects tags and links, and sees that everything that opens also closes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "demo")
    for step in range(10, 310, 10):
        line = {"step": step, "tokens": step * 100, "loss": 5 - step / 100, "learning_rate": 1e-3, "grad_norm": 1.0}
        metrics.append(run.metrics, {**line, "tokens_per_second": 41_000.0, "memory": step << 20, "seconds": step / 10})
    metrics.append(run.metrics, {"step": 300, "validation": {"loss": 2.25, "bits_per_byte": 1.5, "tokens": 10}})
    metrics.append(run.samples, {"step": 300, "prompt": "Once", "text": f" upon {HOSTILE} 世界"})
    run.resolved.write_text(f"name: demo # {HOSTILE}\n")
    run.update(
        name="demo",
        status="done",
        started="2026-01-01T10:00:00+00:00",
        command_line=f"gptcli pretrain {HOSTILE}",
        versions={"torch": "2.13.0", HOSTILE: HOSTILE},
        device=HOSTILE,
        parameters=11_534_336,
        plan={"steps": 300, "decisions": [{"key": "train.precision", "value": "fp32", "reason": HOSTILE}]},
        data={
            "train": {"documents": 1200, "tokens": 34_000, "media": {"image": {"count": 7, "rows": 5, "tokens": 112}}}
        },
        result={"step": 300, "loss": 2.0, "tokens_per_second": 40_000.0, "wall_seconds": 252.0, "peak_bytes": 3 << 30},
    )
    return run


def test_the_page_is_self_contained_well_formed_and_escaped(run: RunFolder) -> None:
    content = write_report(run).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(content)
    assert checker.open == []
    assert "script" not in checker.tags and not checker.links
    assert not re.search(r"https?:|@import|url\(|<script", content)
    assert "&lt;script&gt;" in content and "世界" in content


def test_the_page_has_figures_curves_samples_recipe_and_versions(run: RunFolder) -> None:
    content = page(run)
    for text in ("2.2500", "1.5000", "11.5M", "4 min 12 s", "3 GiB", "Once", "train.precision", "2.13.0", "name: demo"):
        assert text in content
    for text in ("<th>documents</th><td>1,200", "<th>images</th><td>7 in 5 rows, 112 tokens"):
        assert text in content
    for chart in ("Loss by step", "Validation loss by step", "Learning rate", "Gradient norm", "Tokens/s by step"):
        assert chart in content
    assert "prefers-color-scheme: dark" in content


@pytest.mark.parametrize(
    ("data", "unit"),
    [({}, "nats a token"), ({"format": "preference"}, "of dpo")],
)
def test_a_loss_is_labelled_by_what_it_is(run: RunFolder, data: dict[str, Any], unit: str) -> None:
    assert "nats" not in page(run), "a run that does not say"
    recipe = Recipe.model_validate({"name": "x", "data": {"train": "a.jsonl", **data}, "finetune": {"method": "dpo"}})
    run.update(loss_unit=loss_unit(recipe))
    assert summarize(run).loss_unit == unit
    content = page(run)
    for shown in (f"<small>{unit}</small>", f"<small>{unit}, last log step</small>", f"Loss ({unit})"):
        assert shown in content
    assert ("nats" in content) == (unit == "nats a token")


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "running"},
        {"status": "failed", "reason": HOSTILE, "result": None, "plan": [], "versions": "x", "fingerprints": 3},
        {"status": "stopped", "plan": {"decisions": [1, {}], "steps": "many"}, "result": {"loss": "low", "step": True}},
        {
            "status": "running",
            "data": {"train": {"media": {HOSTILE: {"count": 1, "rows": 1, "tokens": 2}, "image": 3}}},
        },
        {"status": "running", "data": {"train": {"documents": "many", "media": 3}}},
        {"status": "running", "started": "yesterday", "parameters": 1e400, "device": {"a": 1}},
    ],
)
def test_a_run_that_is_half_there_still_gives_a_page(tmp_path: Path, fields: dict[str, Any]) -> None:
    run = RunFolder(tmp_path / "half")
    run.update(**fields)
    metrics.append(run.metrics, {"step": 1, "loss": "x", "validation": 3})
    metrics.append(run.metrics, {"loss": 1.0})
    checker = Checker()
    checker.feed(page(run))
    assert checker.open == [] and "script" not in checker.tags


def test_no_run_and_damaged_metrics_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        write_report(RunFolder(tmp_path))
    run = RunFolder(tmp_path / "a")
    run.update(status="done")
    run.metrics.write_text("nonsense\n")
    with pytest.raises(CheckpointError):
        write_report(run)
    assert "nonsense" not in (summarize(run).problem or "") and summarize(run).problem


def test_the_summary_takes_the_result_or_what_is_further(run: RunFolder) -> None:
    done = summarize(run)
    assert (done.step, done.steps, done.loss, done.validation_loss, done.bits_per_byte) == (300, 300, 2.0, 2.25, 1.5)
    metrics.append(run.metrics, {"step": 310, "tokens": 31_000, "loss": 1.5, "memory": 5 << 30, "seconds": 300.0})
    further = summarize(run)
    assert (further.step, further.loss, further.wall_seconds, further.peak_bytes) == (310, 1.5, 300.0, 5 << 30)


def test_numbers_read_as_people_write_them() -> None:
    assert [count(n) for n in (None, 7, 999, 1000, 999_950, 11_534_336, 1.5e9)] == [
        "-", "7", "999", "1K", "1M", "11.5M", "1.5B",
    ]  # fmt: skip
    assert [size(n) for n in (None, 10, 1 << 20, 1_287_651_328)] == ["-", "10 B", "1 MiB", "1.2 GiB"]
    assert [span(n) for n in (None, 3.2, 59, 252, 7500, 90_000)] == [
        "-", "3.2 s", "59 s", "4 min 12 s", "2 h 5 min", "1 d 1 h",
    ]  # fmt: skip
    assert ago("nonsense") == ago(None) == "-"
