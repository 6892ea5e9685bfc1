"""The built-in recipes: where they lie, what they are called, and the nearest name to a mistyped one.

They are <repository>/recipes in a checkout and gptcli/_recipes in a wheel; `recipes_root` is the one place that knows.
The folder cluster/ holds files for schedulers: they ship, and can be shown and copied, but are no recipes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from gptcli.errors import UsageError

CLUSTER = "cluster"


@dataclass(frozen=True)
class BuiltIn:
    """A recipe that ships with gptcli: `pretrain/llama-30m` lies in pretrain/llama-30m.yaml."""

    name: str
    path: Path
    summary: str


def recipes_root() -> Path | None:
    """The folder of the built-in recipes; None where there is none."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    return None


@functools.cache
def builtin_recipes() -> tuple[BuiltIn, ...]:
    """The built-in recipes, those at the top first, then by name."""
    root = recipes_root()
    if root is None:
        return ()
    files = sorted(_recipes(root), key=lambda path: (len(path.relative_to(root).parts), path.as_posix()))
    return tuple(BuiltIn(_name(path, root), path, summary(path)) for path in files)


def cluster_files() -> tuple[BuiltIn, ...]:
    """The files that start gptcli under a scheduler, such as `cluster/slurm.sbatch`, by name."""
    root = recipes_root()
    files = [] if root is None else sorted(path for path in (root / CLUSTER).glob("*") if path.is_file())
    return tuple(BuiltIn(f"{CLUSTER}/{path.name}", path, summary(path)) for path in files)


def find_cluster_file(name: str) -> Path | None:
    """The file of that name, `cluster/` and ending included; None: there is none."""
    return next((item.path for item in cluster_files() if item.name == name), None)


def _recipes(root: Path) -> list[Path]:
    return [path for path in root.rglob("*.yaml") if path.relative_to(root).parts[0] != CLUSTER]


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def summary(path: Path) -> str:
    """The first sentence of the comment at the head of a recipe ("" without one)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and text.strip("# ") and "yaml-language-server" not in text and text[:2] != "#!":
            return text.strip("# ").split(". ")[0].rstrip(".")
        if text and not text.startswith("#"):
            break
    return ""


def find_builtin(name: str) -> Path | None:
    """The file of a built-in recipe; its last part is enough where only one has it. None: there is none."""
    root = recipes_root()
    if root is None or not name or name.startswith(("/", ".", "~")):
        return None
    recipes = _recipes(root)
    exact = root / f"{name}.yaml"
    if exact in recipes:
        return exact
    stem = f"{name}.yaml"
    same = [path for path in recipes if path.name == stem]
    return same[0] if len(same) == 1 else None


def not_found(argument: str) -> UsageError:
    """The error for an argument that is neither a file nor a built-in recipe."""
    import difflib

    stem = Path(argument).with_suffix("").as_posix() if argument.endswith((".yaml", ".yml")) else argument
    by_word = {word: recipe.name for recipe in builtin_recipes() for word in (recipe.name.split("/")[-1], recipe.name)}
    near = difflib.get_close_matches(stem, list(by_word), n=3, cutoff=0.5)
    names = list(dict.fromkeys(by_word[word] for word in near))
    hint = f"did you mean {' or '.join(names)}?\n" if names else ""
    return UsageError(
        f"no recipe {argument}: neither a file nor a built-in recipe",
        remedy=f"{hint}`gptcli recipes list` shows the built-in recipes",
    )


def copy_recipe(name: str, destination: Path | None, *, force: bool) -> Path:
    """Copy a built-in recipe or a file for a cluster to a file, or into a folder (default: the current one).

    Returns the copy's path.

    Raises:
        UsageError: there is no such recipe, or the file exists and `force` is not given.
    """
    from gptcli.files import write_atomic

    source = find_cluster_file(name) or find_builtin(name)
    if source is None:
        raise not_found(name)
    target = Path(source.name) if destination is None else destination
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise UsageError(f"{target} exists", remedy="name another file, or add --force to replace it")
    try:
        write_atomic(target, source.read_bytes())
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None
    return target
