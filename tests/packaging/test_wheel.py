"""The wheel: what a user installs holds the recipes, and finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_the_wheel_carries_the_recipes_and_runs_without_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("gptcli-*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-m", "gptcli", "recipes", "list", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    recipes = {item["name"]: Path(item["path"]) for item in json.loads(done.stdout)}
    there, installed = REPOSITORY / "recipes", target / "gptcli" / "_recipes"
    shipped = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()} == shipped
    listed = {str(path.relative_to(installed)) for path in recipes.values()}
    assert listed == {name for name in shipped if not name.startswith("cluster/")}
    assert "quickstart" in recipes
