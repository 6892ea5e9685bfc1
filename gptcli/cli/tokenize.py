"""`gptcli tokenize`: turn a recipe's sources into verified token shards, and say what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument, Smoke

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.data.tokenize import Prepared


def tokenize(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the tokenizer if the recipe asks for it, write verified token shards, print the data report."""
    del debug
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_available(loaded, "tokenize")
    loaded.require("tokenize", "data")

    from gptcli.cli.console import console

    out = console(json=json, quiet=quiet)
    result: dict[str, Any]
    if smoke:
        from gptcli.train.smoke import smoke_run

        result = smoke_run(recipe, overrides or (), "tokenize", out)
    else:
        from gptcli.data.tokenize import prepare

        prepared = prepare(loaded, out)
        result = _result(prepared)
        if not json:
            _print(prepared, out)
    if json:
        out.print_json(result)


def _result(prepared: Prepared) -> dict[str, Any]:
    return {
        **prepared.report,
        "reused": prepared.reused,
        "tokenizer_folder": str(prepared.tokenizer),
        "train_folder": str(prepared.train.folder),
        "validation_folder": str(prepared.validation.folder) if prepared.validation is not None else None,
    }


def _print(prepared: Prepared, out: Console) -> None:
    from gptcli.data.report import report_lines

    for line in report_lines(prepared.report):
        out.say(line)
    out.say(f"tokenizer: {prepared.report['tokenizer']['vocab_size']:,} entries, {prepared.tokenizer}")
    found = "found in the cache" if prepared.reused else "written"
    out.say(f"shards {found} (fingerprint {prepared.fingerprint}): {prepared.train.folder.parent}")
