"""`gptcli recipes`: the built-in recipes, a check of one's own, and the schema for editors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument
from gptcli.reporting import visible

app = typer.Typer(name="recipes", help="List, show, copy and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A built-in recipe, such as quickstart.", show_default=False)]


@app.command("list")
def list_recipes(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the built-in recipes, and the files that start them on a cluster."""
    from gptcli.cli.console import console
    from gptcli.recipe.catalog import builtin_recipes, cluster_files

    del debug
    out = console(json=json, quiet=quiet)
    recipes = builtin_recipes()
    if json:
        out.print_json([{"name": item.name, "summary": item.summary, "path": str(item.path)} for item in recipes])
        return
    out.table(["recipe", "what it does"], [[item.name, item.summary] for item in recipes])
    out.table(["for a cluster (recipes copy)", "what it does"], [[item.name, item.summary] for item in cluster_files()])


@app.command("show")
def show(name: Name, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Print a recipe, or a file for a cluster, as it stands."""
    from gptcli.cli.console import console
    from gptcli.recipe.catalog import find_cluster_file
    from gptcli.recipe.load import find_recipe
    from gptcli.recipe.tree import read_text

    del debug
    path = find_cluster_file(name) or find_recipe(name)
    text = read_text(path, str(path))
    out = console(json=json, quiet=quiet)
    if json:
        out.print_json({"name": name, "path": str(path), "text": text})
        return
    whole = text if text.endswith("\n") else f"{text}\n"
    out.write(visible(whole) if sys.stdout.isatty() else whole)


@app.command("copy")
def copy(
    name: Name,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder.", show_default="./NAME.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a built-in recipe, or a file for a cluster, to change it."""
    from gptcli.cli.console import console
    from gptcli.recipe.catalog import copy_recipe, find_cluster_file

    del debug
    out = console(json=json, quiet=quiet)
    target = copy_recipe(name, destination, force=force)
    if json:
        out.print_json({"name": name, "path": str(target)})
        return
    if find_cluster_file(name):
        out.say(f"copied to {target}; its first lines say how it is started")
        return
    out.say(f"copied to {target}; check it after a change: gptcli recipes validate {target}")


@app.command("validate")
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a recipe without running it."""
    from gptcli.cli.console import console
    from gptcli.recipe.availability import usable_by
    from gptcli.recipe.load import load_recipe, resolved

    del debug
    out = console(json=json, quiet=quiet)
    loaded = load_recipe(recipe, overrides or [])
    commands = usable_by(loaded)
    if json:
        usable = [name for name, reason in commands.items() if reason is None]
        out.print_json({"ok": True, "recipe": str(loaded.path), "commands": usable, "resolved": resolved(loaded)})
        return
    out.say(f"{loaded.label}: ok")
    for name, reason in commands.items():
        out.say(f"  gptcli {name}: {reason or 'has what it needs'}")


@app.command("schema")
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/recipe.md.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json as json_module

    from gptcli.recipe import reference

    del json, quiet, debug
    text = (
        reference.markdown() if markdown else json_module.dumps(reference.json_schema(), indent=2, ensure_ascii=False)
    )
    typer.echo(text, nl=not text.endswith("\n"))
