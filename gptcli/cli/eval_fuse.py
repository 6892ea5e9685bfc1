"""`gptcli eval A B --fuse mean`: the models' result together, as one more beside theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.evaluation.task_files import Asked
    from gptcli.recipe.load import LoadedRecipe

WAYS = ("mean",)
WHAT = "What can be fused are labels (eval.labels with accuracy, precision, recall, f1) and the loss of texts."

Fuse = Annotated[
    str | None,
    typer.Option(
        "--fuse",
        metavar="|".join(WAYS),
        help="Two models or more: also the result of all together, by the mean of their probabilities (late fusion).",
    ),
]


def check(fuse: str | None, models: list[str], *, smoke: bool, check_overlap: str | None) -> None:
    """Raise `UsageError` for a way of fusing that there is not, or where it is not several models that are measured."""
    from gptcli.errors import UsageError

    if fuse is None:
        return
    if fuse not in WAYS:
        raise UsageError(f"--fuse {fuse} is no way of fusing; there is {', '.join(WAYS)}")
    if smoke or check_overlap is not None:
        raise UsageError("--fuse is of models' results, and --smoke and --check-overlap have none")
    if len(models) < 2:
        raise UsageError(
            f"--fuse takes two models or more, and {'one was' if models else 'none was'} named",
            remedy="gptcli eval MODEL OTHER RECIPE --fuse mean",
        )


def check_measured(
    folders: list[Path], loaded: LoadedRecipe | None, harness: list[Asked], *, answering: bool, scoring: bool
) -> None:
    """Raise `UsageError` where something is measured that cannot be fused; before a model is loaded."""
    from gptcli.errors import UsageError
    from gptcli.evaluation.fuse import check_tokenizers
    from gptcli.evaluation.tasks import of_labels_and_texts

    if harness:
        raise UsageError(
            f"--fuse: lm-evaluation-harness asks one model at a time, and {harness[0].name} is a task of it",
            where=harness[0].where,
            remedy=WHAT,
        )
    if answering:
        assert loaded is not None
        _, texts = of_labels_and_texts(loaded)
        if texts:
            raise UsageError(
                f"--fuse: {', '.join(texts)} {'is' if len(texts) == 1 else 'are'} measured on texts that a model "
                "writes, and texts have no mean",
                where=loaded.where("eval.metrics"),
                remedy=WHAT,
            )
    if scoring:
        check_tokenizers(folders)
