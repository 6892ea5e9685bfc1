"""`gptcli eval`: how good is a model, in numbers that can be compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet, Smoke

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.cli.console import Console
    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.evaluation.loss import LossResult
    from gptcli.recipe.load import LoadedRecipe

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL|RECIPE|KEY=VALUE",
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
Predictions = Annotated[
    str, typer.Option("--predictions", metavar="FILE", help="Tasks: write each row's answer and scores, as JSON lines.")
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
    predictions: Predictions = "",
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure loss, perplexity, bits per byte and a recipe's tasks: one or several models, files or held-out data."""
    del debug
    from gptcli.cli.console import console
    from gptcli.errors import DivergedError, UsageError

    if documents not in ("file", "line", "blank-line"):
        raise UsageError(f"--documents {documents} is not one of file, line, blank-line")
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is not one of auto, fp32, bf16")
    out = console(json=json, quiet=quiet)
    models, recipe, overrides = sort_arguments(arguments or [])
    loaded = _load(recipe, overrides)
    if smoke:
        if recipe is None:
            raise UsageError("--smoke proves a recipe, and none was given", remedy="gptcli eval RECIPE --smoke")
        from gptcli.train.smoke import smoke_run

        proof = smoke_run(recipe, overrides, "eval", out)
        if json:
            out.print_json(proof)
        return
    folders = _folders(models, recipe)
    from gptcli.cli.evaluation_tasks import measure_tasks, print_tasks
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
    tasks = measure_tasks(folders, chosen, loaded, out, precision=options.precision, predictions=predictions)
    wanted = not tasks or (loaded is not None and "perplexity" in loaded.recipe.eval.metrics)
    results = [score(folder, chosen, options, out, loaded) for folder in folders] if wanted else []
    if json:
        values: list[dict[str, Any]] = [result.as_dict() for result in results] or [task.as_dict() for task in tasks]
        for value, task in zip(values, tasks, strict=False):
            value["metrics"] = task.metrics
        out.print_json(values if len(values) > 1 else values[0])
    else:
        if results:
            _print(results, out)
        if tasks:
            print_tasks(tasks, out)
    if bad := [result.model for result in results if not math.isfinite(result.result.loss)]:
        raise DivergedError(
            f"the loss of {', '.join(bad)} is not a finite number",
            remedy="The model gives NaN or infinite logits: its weights are damaged, or --precision is too low.",
        )


def sort_arguments(arguments: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Tell models, recipe and overrides apart, as DEFINITIONS.md (Arguments) has it.

    A short name of a built-in recipe (`tiny` for `smoke/tiny`) that is also a run's is the run.

    Raises:
        UsageError: two recipes.
    """
    from gptcli.errors import UsageError

    overrides = [argument for argument in arguments if "=" in argument]
    others = [argument for argument in arguments if "=" not in argument]
    recipes = [argument for argument in others if _is_recipe(argument)]
    if len(recipes) > 1:
        raise UsageError(f"{' and '.join(recipes)} are both recipes; give one")
    return [argument for argument in others if argument not in recipes], recipes[0] if recipes else None, overrides


def _is_recipe(argument: str) -> bool:
    from gptcli.recipe.catalog import builtin_recipes, find_builtin

    if argument.endswith((".yaml", ".yml")) or any(recipe.name == argument for recipe in builtin_recipes()):
        return True
    return find_builtin(argument) is not None and not _is_run(argument)


def _is_run(name: str) -> bool:
    from gptcli.runs.folder import RunFolder, runs_root

    return RunFolder(runs_root() / name).exists()


def _load(recipe: str | None, overrides: list[str]) -> LoadedRecipe | None:
    if recipe is None:
        return None
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_available(loaded, "eval")
    return loaded


def _folders(models: list[str], recipe: str | None) -> list[Path]:
    """The models' folders; without a model the run that bears the built-in recipe's name, else the newest run."""
    from gptcli.runs.folder import RunFolder, resolve_model, runs_root

    if models:
        return [resolve_model(model) for model in models]
    named = None if recipe is None or recipe.endswith((".yaml", ".yml")) else RunFolder(runs_root() / recipe).weights()
    return [named or resolve_model(None)]


def _print(results: list[Evaluation], out: Console) -> None:
    """One model as a list of figures, several as a table."""
    shown = [_figures(evaluation.result) for evaluation in results]
    if len(results) == 1:
        out.table(["model", results[0].model], [["data", results[0].data], *map(list, shown[0].items())])
        return
    rows = [[result.model, *figures.values()] for result, figures in zip(results, shown, strict=True)]
    out.table(["model", *shown[0]], rows, title=results[0].data)


def _figures(result: LossResult) -> dict[str, str]:
    per_byte, perplexity = result.bits_per_byte, result.perplexity
    return {
        "loss": f"{result.loss:.4f}",
        "perplexity": f"{perplexity:.4g}" if perplexity >= 1e4 else f"{perplexity:.3f}",
        "bits/byte": "-" if per_byte is None else f"{per_byte:.4f}",
        "tokens": f"{result.tokens:,}",
        "bytes": "-" if result.bytes is None else f"{result.bytes:,}",
        "documents": f"{result.documents:,}",
    }
