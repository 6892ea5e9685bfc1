"""`gptcli finetune`: go on training a model that is there."""

from __future__ import annotations

from typing import Annotated

import typer

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument, Smoke, Verify
from gptcli.cli.pretrain import AllowChanges, Overwrite, Resume, train_command

Merge = Annotated[bool, typer.Option("--merge", help="finetune.merge: final/ is a whole model, the adapter merged in.")]


def finetune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Resume = "auto",
    overwrite: Overwrite = False,
    allow_changes: AllowChanges = None,
    verify: Verify = False,
    merge: Merge = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune the model of model.from on new text, all of it or an adapter."""
    del debug
    train_command(
        "finetune",
        recipe,
        [*(overrides or ()), "finetune.merge=true"] if merge else overrides,
        resume=resume,
        overwrite=overwrite,
        allow_changes=allow_changes,
        verify=verify,
        smoke=smoke,
        json=json,
        quiet=quiet,
    )
