"""`gptcli pretrain`: train a model from a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument, Smoke, Verify

Resume = Annotated[str, typer.Option("--resume", metavar="auto|never|PATH", help="Go on with the run that is there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that is there and start anew.")]
AllowChanges = Annotated[
    list[str] | None,
    typer.Option("--allow-changes", metavar="KEY,...", help="Resume although these keys of the recipe changed."),
]


def pretrain(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Resume = "auto",
    overwrite: Overwrite = False,
    allow_changes: AllowChanges = None,
    verify: Verify = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model from scratch (or on from model.from); tokenizes first when needed, resumes by itself."""
    del debug
    train_command(
        "pretrain",
        recipe,
        overrides,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
        verify=verify,
        smoke=smoke,
        json=json,
        quiet=quiet,
    )


def train_command(
    command: str,
    recipe: str,
    overrides: list[str] | None,
    *,
    resume: str,
    overwrite: bool,
    allow_changes: list[str] | None,
    verify: bool,
    smoke: bool,
    json: bool,
    quiet: bool,
) -> None:
    """What `pretrain` and `finetune` share: load, check, train, print the result."""
    import sys

    from gptcli.errors import StoppedError
    from gptcli.launch import join, launch, processes_to_start
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    whole = load_recipe(recipe, overrides or ())
    loaded = whole.used_by(command)
    check_available(loaded, command)
    model = "model.from" if command == "finetune" else "model"
    loaded.require(command, "data.train", model, "train.max_tokens")

    from gptcli.cli.console import console

    out = console(json=json, quiet=quiet)
    if whole.recipe.finetune.model_dump() != loaded.recipe.finetune.model_dump():
        out.say("finetune: left aside; gptcli finetune uses that section")
    asked = loaded.recipe.launch
    here = 0 if smoke else processes_to_start(asked.processes, asked.nodes, asked.rendezvous)
    if here:
        name = f"{command}-{loaded.recipe.name}"
        launch(sys.argv[1:], processes=here, nodes=asked.nodes, rendezvous=asked.rendezvous, name=name, warn=out.warn)
        return
    result: dict[str, Any]
    if smoke:
        from gptcli.train.smoke import smoke_run

        result = smoke_run(recipe, overrides or (), command, out)
    else:
        join()
        from gptcli.train.begin import Options, allowed_keys
        from gptcli.train.run import train

        try:
            result = train(loaded, Options(command, resume, overwrite, allowed_keys(allow_changes), verify), out)
        except StoppedError as stopped:
            if json and stopped.result is not None:
                out.print_json(stopped.result)
            raise
    if json:
        out.print_json(result)
