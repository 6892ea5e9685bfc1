"""The base of a run's adapter: where it is, and whether it is still the model that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.files import fingerprint, sha256_file
from gptcli.model.adapt import Base
from gptcli.model.folder import check_weights, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Recipe

BASE = "base"


def find_base(loaded: LoadedRecipe, config: PreTrainedConfig) -> Base | None:
    """The base of the recipe's adapter, whose weights are read for their fingerprint; None without an adapter.

    That of a model of the Hub is its commit.
    """
    recipe = loaded.recipe
    if recipe.finetune.adapter == "none":
        return None
    assert recipe.model is not None and recipe.model.from_ is not None
    folder, options = Path(recipe.model.from_), recipe.model
    if folder.is_dir():
        files = check_weights(folder, read_config(folder, trust_remote_code=options.trust_remote_code))
        print_ = fingerprint({path.name: sha256_file(path) for path in (folder / "config.json", *files)})
    else:
        print_ = str(getattr(config, "_commit_hash", None) or options.revision or options.from_)
    return Base(str(options.from_), options.revision, print_)


def base_in(recipe: Recipe, fingerprints: Mapping[str, str]) -> Base | None:
    """The same, from a run's fingerprints."""
    if recipe.finetune.adapter == "none":
        return None
    assert recipe.model is not None
    return Base(str(recipe.model.from_), recipe.model.revision, fingerprints.get(BASE, ""))
