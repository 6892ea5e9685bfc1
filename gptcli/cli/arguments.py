"""The arguments and options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.max_steps=100.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, the rest on standard error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Prove the recipe in a minute: a toy of it through every stage, on CPU.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read all sources and shards again, also those that seem unchanged.")
]
