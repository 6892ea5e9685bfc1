"""`gptcli plan`: what a recipe will do and cost, before anything is spent."""

from __future__ import annotations

from typing import Annotated

import typer

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Plan for this card (h100, a100-80gb, l4, ...) or cpu.  [this machine's]"),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes a machine.  [launch.processes]")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Machines.  [launch.nodes]")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a recipe will do: steps, tokens, parameters, FLOPs, memory, disk and time; nothing is trained."""
    del debug
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ()).used_by("plan")
    check_available(loaded, "plan")
    loaded.require("plan", "data.train", "model", "train.max_tokens")

    from gptcli.cli.console import console
    from gptcli.train.estimate import estimate

    out = console(json=json, quiet=quiet)
    result = estimate(loaded, out, device=device, processes=processes, nodes=nodes)
    if json:
        out.print_json(result.as_dict())
        return
    for columns, rows in result.tables():
        out.table(columns, rows)
