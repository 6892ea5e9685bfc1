from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.errors import UsageError
from gptcli.recipe.availability import SECTIONS, check_available
from gptcli.recipe.catalog import builtin_recipes, copy_recipe, find_builtin, recipes_root, summary
from gptcli.recipe.load import load_recipe

NAMES = [recipe.name for recipe in builtin_recipes()]


def test_the_quickstart_is_listed_first() -> None:
    assert NAMES[0] == "quickstart"


@pytest.mark.parametrize("name", NAMES)
def test_every_builtin_recipe_is_valid_available_and_has_a_summary(name: str) -> None:
    loaded = load_recipe(name)
    preference = loaded.recipe.data is not None and loaded.recipe.data.format == "preference"
    for command in ("finetune", "plan", "generate") if preference else SECTIONS:
        check_available(loaded, command)
    assert summary(loaded.path)


def test_the_last_part_of_a_name_is_enough() -> None:
    for name in NAMES:
        assert find_builtin(name.rpartition("/")[2]) == find_builtin(name)


@pytest.mark.parametrize("name", ["../pyproject", "/etc/passwd", "", "nowhere", "..", "~"])
def test_a_name_never_leaves_the_folder(name: str) -> None:
    assert find_builtin(name) is None


def test_a_copy_goes_to_a_folder_or_a_file_and_never_replaces_one(tmp_path: Path) -> None:
    copied = copy_recipe("quickstart", tmp_path, force=False)
    root = recipes_root()
    assert root is not None
    assert copied == tmp_path / "quickstart.yaml"
    assert copied.read_bytes() == (root / "quickstart.yaml").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        copy_recipe("quickstart", copied, force=False)
    copied.write_text("changed", encoding="utf-8")
    assert copy_recipe("quickstart", copied, force=True).read_text(encoding="utf-8") != "changed"


def test_a_copy_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written"):
        copy_recipe("quickstart", tmp_path / "file" / "x.yaml", force=False)
