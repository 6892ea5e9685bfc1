"""The face of `gptcli eval --check-overlap`: the share of evaluation documents that training data holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.evaluation.corpus import Corpus
    from gptcli.evaluation.overlap import Overlap
    from gptcli.recipe.load import LoadedRecipe

CheckOverlap = Annotated[
    str | None,
    typer.Option("--check-overlap", metavar="RECIPE", help="Find --data's documents in this recipe's training data."),
]


def overlap(trained: LoadedRecipe, chosen: Corpus, out: Console) -> None:
    """Look for the documents of a corpus in the training data of a recipe, and print what was found."""
    from gptcli.evaluation.overlap import check_overlap

    found = check_overlap(chosen, trained, out)
    if out.json_output:
        out.print_json(found.as_dict())
    else:
        _print(found, out)


def _print(found: Overlap, out: Console) -> None:
    share = "-" if found.share is None else f"{found.share:.2%}"
    rows = [
        ["training data", f"{found.recipe}: {found.training_documents:,} documents, {found.training_bytes:,} bytes"],
        ["documents", f"{found.documents:,}"],
        ["of fewer than 13 words", f"{found.short:,} (not judged)"],
        ["with 13 words in a row in the training data", f"{found.overlapping:,} ({share} of those judged)"],
        ["runs of 13 words", f"{found.grams:,}, of which {found.overlapping_grams:,} in the training data"],
    ]
    out.table(["data", found.data], rows)
    if found.worst:
        worst = [[each.where, f"{each.overlapping:,}/{each.grams:,}", each.example] for each in found.worst]
        out.table(["document", "runs found", "the first"], worst, title="most overlapping")
