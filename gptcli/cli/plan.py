"""`gptcli plan`: what a recipe will do and cost, before anything is spent."""

from __future__ import annotations

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe will do: steps, tokens, parameters, FLOPs, memory, disk and time; nothing is trained."""
    del debug
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_available(loaded, "pretrain")
    loaded.require("plan", "data.train", "model", "train.max_tokens")

    from gptcli.cli.console import console
    from gptcli.train.estimate import estimate

    out = console(json=json, quiet=quiet)
    result = estimate(loaded, out)
    if json:
        out.print_json(result.as_dict())
        return
    for title, rows in result.tables():
        out.table([title, "", "because"] if len(rows[0]) == 3 else [title, ""], rows)
