from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.generation.given import recipe_section
from gptcli.generation.settings import Settings, settings
from gptcli.recipe.load import dump_yaml, load_recipe, resolved
from gptcli.runs.folder import RunFolder


def a_run(folder: Path, text: str) -> RunFolder:
    run = RunFolder(folder / "runs" / "one")
    run.update(name="one", status="done", started="2026-01-01T00:00:00+00:00")
    run.final.mkdir()
    run.resolved.write_text(text)
    return run


def test_what_a_resolved_recipe_says_is_what_its_schema_reads(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("generate: {prompts: [a, b], temperature: 1, top_k: 1K, stop: [x], min_p: 0.05}\n")
    loaded = load_recipe(str(tmp_path / "r.yaml"))
    run = a_run(tmp_path, dump_yaml(resolved(loaded)))
    given = recipe_section(run.final, pytest.fail)
    assert given == dict(loaded.recipe.generate)
    assert settings(given, {}, seed=1) == settings(dict(loaded.recipe.generate), {}, seed=1) != Settings(seed=1)


@pytest.mark.parametrize(
    "text",
    ["generate: {temperature: hot}", "generate: {stop: END}", "generate: [1]", "generate: {top_k: true}", "- 1", "{{"],
)
def test_one_that_cannot_be_read_is_told_and_the_usual_settings_are_taken(tmp_path: Path, text: str) -> None:
    told: list[str] = []
    assert recipe_section(a_run(tmp_path, text).final, told.append) == {}
    assert len(told) == 1 and "resolved.yaml" in told[0]


def test_a_model_of_no_run_has_none(tmp_path: Path) -> None:
    assert recipe_section(tmp_path, pytest.fail) == {}


def test_keys_of_another_version_are_left_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path, "generate: {temperature: 0.5, magic: 7}\ntrain: {unknown: [1]}\n")
    assert recipe_section(run.final, pytest.fail) == {"temperature": 0.5}
