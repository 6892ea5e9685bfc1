"""`gptcli eval`: how good is a model, in numbers that can be compared."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet, Smoke

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.cli.console import Console
    from gptcli.evaluation.corpus import Corpus
    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.evaluation.loss import LossResult
    from gptcli.evaluation.overlap import Overlap
    from gptcli.evaluation.task_files import Asked
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
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAME|FILE.yaml,...",
        help="Tasks of lm-evaluation-harness, by name or as files (repeatable).",
    ),
]
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", min=0, help="Examples before a task's questions.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of what the tasks draw; default: lm-eval's seeds.")]
TrustTasks = Annotated[bool, typer.Option("--trust-tasks", help="Run the Python code that task files bring.")]
CheckOverlap = Annotated[
    str | None,
    typer.Option("--check-overlap", metavar="RECIPE", help="Find --data's documents in this recipe's training data."),
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
    tasks: TaskNames = None,
    num_fewshot: NumFewshot = None,
    seed: Seed = None,
    trust_tasks: TrustTasks = False,
    check_overlap: CheckOverlap = None,
    smoke: Smoke = False,
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
    out = console(json=json, quiet=quiet)
    models, recipe, overrides = sort_arguments(arguments or [])
    if check_overlap is not None:
        if models:
            raise UsageError(f"--check-overlap compares texts and takes no model, and {models[0]} was given")
        if smoke:
            raise UsageError("--smoke proves a recipe; --check-overlap reads all of its data")
        overlap(check_overlap, recipe, overrides, data, text, documents, limit, out)
        return
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
    from gptcli.evaluation import corpus, harness
    from gptcli.evaluation.evaluate import Options, run_recipe
    from gptcli.evaluation.evaluate import evaluate as score

    if loaded is None and (not data or overrides):
        loaded = run_recipe(folders[0], tuple(overrides))
    chosen: Corpus | None = None
    asked = asked_tasks(tasks, loaded)
    if data:
        chosen = corpus.from_files(data, text=text, documents=documents, limit=limit)
    elif loaded is not None and not tasks and (not asked or has_texts(loaded)):
        chosen = corpus.from_recipe(loaded, limit=limit)
    elif not asked:
        raise UsageError(
            f"nothing to score: {folders[0]} does not belong to a run, and there is no recipe",
            remedy="Give files (gptcli eval MODEL --data FILE) or a recipe (gptcli eval MODEL RECIPE).",
        )
    options = Options(sequence_length, stride, precision)  # type: ignore[arg-type]
    measure = None
    if asked:
        section = None if loaded is None else loaded.recipe.eval
        found = harness.find_tasks(asked, str(folders[0]), trusted=trust_tasks, reporter=out)
        measure = partial(
            harness.run_tasks,
            tasks=found,
            options=harness.HarnessOptions(
                num_fewshot if num_fewshot is not None or section is None else section.num_fewshot,
                limit if limit is not None or section is None else section.limit,
                seed,
                sequence_length,
                precision,  # type: ignore[arg-type]
                shown=out.is_terminal and not out.quiet,
            ),
            reporter=out,
        )
    results = [score(folder, chosen, options, out, loaded) for folder in folders] if chosen is not None else []
    measured = [measure(folder) for folder in folders] if measure is not None else []
    if json:
        values: list[dict[str, Any]] = [{"model": str(folder)} for folder in folders]
        for value, result in zip(values, results, strict=False):
            value |= result.as_dict()
        for value, tables in zip(values, measured, strict=False):
            value["harness"] = tables
        out.print_json(values if len(values) > 1 else values[0])
    else:
        if results:
            _print(results, out)
        _print_tasks(folders, measured, out)
    bad = [result.model for result in results if not math.isfinite(result.result.loss)]
    bad += [str(folder) for folder, tables in zip(folders, measured, strict=False) if harness.without_value(tables)]
    if bad:
        raise DivergedError(
            f"what was measured of {', '.join(dict.fromkeys(bad))} is not a finite number",
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


def asked_tasks(names: list[str] | None, loaded: LoadedRecipe | None) -> list[Asked]:
    """The tasks of a command line (with commas), else of a recipe; each once."""
    from gptcli.evaluation.task_files import Asked

    if names:
        given = [Asked(name.strip()) for part in names for name in part.split(",") if name.strip()]
    else:
        listed = [] if loaded is None else loaded.recipe.eval.tasks
        given = [Asked(name, loaded.where(f"eval.tasks.{i}")) for i, name in enumerate(listed) if loaded is not None]
    return list(dict.fromkeys(given))


def has_texts(loaded: LoadedRecipe) -> bool:
    """Whether a recipe names texts to score: `eval.data`, or data of which it holds something out."""
    recipe = loaded.recipe
    return bool(recipe.eval.data) or (recipe.data is not None and recipe.data.validation != 0)


def _print_tasks(folders: list[Path], measured: list[dict[str, Any]], out: Console) -> None:
    from gptcli.evaluation.harness import rows

    for folder, results in zip(folders, measured, strict=False):
        out.table(["task", "filter", "shots", "metric", "value", "stderr"], rows(results), title=str(folder))


def overlap(
    trained: str,
    recipe: str | None,
    overrides: list[str],
    data: list[str] | None,
    text: str,
    documents: str,
    limit: int | None,
    out: Console,
) -> None:
    """`gptcli eval --check-overlap`: the share of evaluation documents that a recipe's training data holds."""
    from gptcli.evaluation import corpus
    from gptcli.evaluation.overlap import check_overlap
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    # The changes are of the recipe that is named last: what is measured, where there is one.
    loaded = load_recipe(trained, overrides if recipe is None else [])
    check_available(loaded, "tokenize")
    if data:
        chosen = corpus.from_files(data, text=text, documents=documents, limit=limit)
    else:
        chosen = corpus.from_recipe(_load(recipe, overrides) or loaded, limit=limit)
    found = check_overlap(chosen, loaded, out)
    if out.json_output:
        out.print_json(found.as_dict())
    else:
        _print_overlap(found, out)


def _print_overlap(found: Overlap, out: Console) -> None:
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
