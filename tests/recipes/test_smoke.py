"""Every recipe that ships works: `make test` smokes one of each folder, `make recipes` all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Cli

RECIPES = REPOSITORY / "recipes"
COMMANDS = {"finetune": "finetune", "eval": "eval"}


def all_recipes() -> list[str]:
    names = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
    return [name for name in names if Path(name).parts[0] != "cluster"]  # files for schedulers: test_cluster.py


def one_of_each_folder() -> list[str]:
    return sorted({Path(name).parent: name for name in reversed(all_recipes())}.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-recipes")
        metafunc.parametrize("recipe", all_recipes() if every else one_of_each_folder())


def test_a_recipe_passes_smoke_and_leaves_nothing_behind(recipe: str, tmp_path: Path, run_cli: Cli) -> None:
    command = COMMANDS.get(Path(recipe).parts[0], "pretrain")
    done = run_cli(command, recipe, "--smoke", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    result = done.json()
    assert result["status"] == "done"
    assert result["step"] == 4
    assert result["evaluation"] is None or result["evaluation"]["loss"] > 0
    assert list(tmp_path.iterdir()) == []


def test_every_recipe_is_headed_by_its_command_and_hardware() -> None:
    for name in all_recipes():
        head = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
        assert "gptcli " in head, name
        assert "Hardware:" in head, name


def test_smoke_replaces_what_needs_the_hub_and_says_so(tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "hub.yaml").write_text(
        "data: {train: {path: 'hub:some/set', text: content}, sequence_length: 32}\n"
        "model: {from: some/model, smoke_type: gpt2}\n"
        "train: {epochs: 1}\n"
    )
    done = run_cli("finetune", "hub.yaml", "--smoke", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "hub:some/set" in done.out
    assert "tiny random gpt2 stands in for some/model" in done.out
    assert not (tmp_path / "runs").exists()
