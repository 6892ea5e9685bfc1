from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptcli.cli.recipes import app
from gptcli.errors import GptcliError
from gptcli.recipe.catalog import builtin_recipes, recipes_root
from gptcli.recipe.reference import json_schema, markdown


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_as_json_names_every_recipe() -> None:
    listed = json.loads(run("list", "--json"))
    assert [item["name"] for item in listed] == [recipe.name for recipe in builtin_recipes()]


def test_show_prints_the_file_as_it_is() -> None:
    root = recipes_root()
    assert root is not None
    assert run("show", "quickstart") == (root / "quickstart.yaml").read_text(encoding="utf-8")


def test_a_file_for_a_cluster_is_listed_apart_shown_and_copied(here: Path) -> None:
    root = recipes_root()
    assert root is not None
    script = (root / "cluster" / "slurm.sbatch").read_text(encoding="utf-8")
    assert "cluster/slurm.sbatch" in run("list")
    assert not [item for item in json.loads(run("list", "--json")) if item["name"].startswith("cluster")]
    assert run("show", "cluster/slurm.sbatch") == script
    assert "validate" not in run("copy", "cluster/slurm.sbatch")
    assert (here / "slurm.sbatch").read_text(encoding="utf-8") == script
    with pytest.raises(GptcliError, match="no recipe cluster/slurm"):
        run("copy", "cluster/slurm")


def test_a_copied_recipe_is_valid_and_is_not_replaced(here: Path) -> None:
    run("copy", "quickstart")
    assert "ok" in run("validate", "quickstart.yaml", "train.max_steps=3")
    with pytest.raises(GptcliError, match="exists"):
        run("copy", "quickstart")
    run("copy", "quickstart", "--force")
    run("copy", "quickstart", "mine.yaml")
    assert (here / "mine.yaml").is_file()


def test_validate_as_json_has_the_whole_recipe() -> None:
    document = json.loads(run("validate", "quickstart", "train.max_steps=3", "--json"))
    assert document["ok"] is True
    assert "pretrain" in document["commands"]
    assert document["resolved"]["train"]["max_steps"] == 3


def test_validate_raises_what_is_wrong() -> None:
    with pytest.raises(GptcliError, match=r"unknown key train\.max_step"):
        run("validate", "quickstart", "train.max_step=3")


def test_schema_has_both_forms() -> None:
    assert json.loads(run("schema")) == json_schema()
    assert run("schema", "--markdown") == markdown()
