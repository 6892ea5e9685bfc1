"""`gptcli eval`: how good is a model, in numbers that can be compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.recipe.load import LoadedRecipe

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]... [RECIPE] [KEY=VALUE]...",
        help="Models (a run's name, a folder, a Hub id; default: the newest run), a recipe, overrides.",
        show_default=False,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="A file to score (repeatable): text, jsonl, csv, parquet, .gz, .zst."),
]
Text = Annotated[str, typer.Option("--text", metavar="COLUMN", help="The column of --data that holds the text.")]
Documents = Annotated[
    str, typer.Option("--documents", metavar="file|line|blank-line", help="What one document of a plain text is.")
]
Stride = Annotated[int | None, typer.Option("--stride", min=1, help="How far a window moves; default: its length.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Score at most this many documents.")]
SequenceLength = Annotated[
    int | None, typer.Option("--sequence-length", min=1, help="Tokens of a window; default: as in training.")
]
Precision = Annotated[str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Of the model's weights.")]


def evaluate(
    arguments: Arguments = None,
    data: Data = None,
    text: Text = "text",
    documents: Documents = "file",
    stride: Stride = None,
    limit: Limit = None,
    sequence_length: SequenceLength = None,
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure loss, perplexity and bits per byte of one or several models on files or held-out data."""
    del debug
    from gptcli.cli.console import console
    from gptcli.errors import DivergedError, UsageError

    if documents not in ("file", "line", "blank-line"):
        raise UsageError(f"--documents {documents} is not one of file, line, blank-line")
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is not one of auto, fp32, bf16")
    models, recipe, overrides = sort_arguments(arguments or [])
    loaded = _load(recipe, overrides)
    folders = _folders(models)
    out = console(json=json, quiet=quiet)
    from gptcli.evaluation import corpus
    from gptcli.evaluation.evaluate import Options, run_recipe
    from gptcli.evaluation.evaluate import evaluate as score

    if loaded is None and (not data or overrides):
        loaded = run_recipe(folders[0], tuple(overrides))
    if data:
        chosen = corpus.from_files(data, text=text, documents=documents, limit=limit)
    elif loaded is not None:
        chosen = corpus.from_recipe(loaded, limit=limit)
    else:
        raise UsageError(
            f"nothing to score: {folders[0]} does not belong to a run, and there is no recipe",
            remedy="Give files (gptcli eval MODEL --data FILE) or a recipe (gptcli eval MODEL RECIPE).",
        )
    options = Options(sequence_length, stride, precision)  # type: ignore[arg-type]
    results = [score(folder, chosen, options, out, loaded) for folder in folders]
    if json:
        values: list[dict[str, Any]] = [result.as_dict() for result in results]
        out.print_json(values if len(values) > 1 else values[0])
    else:
        out.table(["model", "loss", "perplexity", "bits/byte", "tokens", "bytes", "documents"], _rows(results))
    if bad := [result.model for result in results if not math.isfinite(result.result.loss)]:
        raise DivergedError(
            f"the loss of {', '.join(bad)} is not a finite number",
            remedy="The model gives NaN or infinite logits: its weights are damaged, or --precision is too low.",
        )


def sort_arguments(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Tell models, recipe and overrides apart, as DEFINITIONS.md (Arguments) has it.

    Raises:
        UsageError: two recipes.
    """
    from gptcli.errors import UsageError
    from gptcli.recipe.catalog import find_builtin

    overrides = [argument for argument in arguments if "=" in argument]
    others = [argument for argument in arguments if "=" not in argument]
    recipes = [argument for argument in others if argument.endswith((".yaml", ".yml")) or find_builtin(argument)]
    if len(recipes) > 1:
        raise UsageError(f"{' and '.join(recipes)} are both recipes; give one")
    return [argument for argument in others if argument not in recipes], recipes[0] if recipes else None, overrides


def _load(recipe: str | None, overrides: list[str]) -> LoadedRecipe | None:
    if recipe is None:
        return None
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_available(loaded, "eval")
    return loaded


def _folders(models: list[str]) -> list[Path]:
    from gptcli.runs.folder import resolve_model

    return [resolve_model(model) for model in models] or [resolve_model(None)]


def _rows(results: list[Evaluation]) -> list[list[str]]:
    rows = []
    for evaluation in results:
        result = evaluation.result
        per_byte = result.bits_per_byte
        rows.append(
            [
                evaluation.model,
                f"{result.loss:.4f}",
                f"{result.perplexity:,.4g}" if result.perplexity >= 1e4 else f"{result.perplexity:.3f}",
                "-" if per_byte is None else f"{per_byte:.4f}",
                f"{result.tokens:,}",
                "-" if result.bytes is None else f"{result.bytes:,}",
                f"{result.documents:,}",
            ]
        )
    return rows
