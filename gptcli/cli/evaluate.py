"""`gptcli eval`: how good is a model, in numbers that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import eval_fuse as of_fusing
from gptcli.cli import eval_harness as of_harness
from gptcli.cli.arguments import Debug, Json, Quiet, Smoke
from gptcli.cli.eval_overlap import CheckOverlap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.cli.console import Console
    from gptcli.evaluation.corpus import Corpus
    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.evaluation.fuse import MeanOfTokens
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
Markdown = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write the results as a Markdown table, too.")
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the results as one HTML page with pictures, too."),
]
Predictions = Annotated[
    Path | None,
    typer.Option("--predictions", metavar="FILE", help="Tasks: write each row's answer and scores, as JSON lines."),
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
    markdown: Markdown = None,
    html: Html = None,
    predictions: Predictions = None,
    tasks: of_harness.TaskNames = None,
    num_fewshot: of_harness.NumFewshot = None,
    seed: of_harness.Seed = None,
    trust_tasks: of_harness.TrustTasks = False,
    check_overlap: CheckOverlap = None,
    fuse: of_fusing.Fuse = None,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure loss, perplexity, bits per byte and a recipe's tasks: one or several models, files or held-out data."""
    del debug
    from gptcli.cli.console import console
    from gptcli.cli.evaluation_tasks import has_tasks
    from gptcli.errors import UsageError
    from gptcli.launch import is_main_process, world_size

    options = Options(data, text, documents, stride, limit, sequence_length, precision, markdown, html)
    options.check()
    out = console(json=json, quiet=quiet)
    if not smoke and (processes := world_size()) > 1:
        if not is_main_process():
            return
        out.say(f"eval works in one process: this one, and the other {processes - 1} end at once")
    models, recipe, overrides = sort_arguments(arguments or [])
    of_fusing.check(fuse, models, smoke=smoke, check_overlap=check_overlap)
    if html is not None and (smoke or check_overlap is not None):
        raise UsageError(
            "--html is a page of what a model was measured at, which --smoke and --check-overlap do not do"
        )
    if check_overlap is not None:
        if models or smoke:
            what = models[0] if models else "--smoke"
            raise UsageError(f"--check-overlap compares texts and takes no model, and {what} was given")
        _overlap(check_overlap, recipe, overrides, options, out)
        return
    loaded = load_for(recipe, overrides)
    if smoke:
        if recipe is None:
            raise UsageError("--smoke proves a recipe, and none was given", remedy="gptcli eval RECIPE --smoke")
        from gptcli.train.smoke import smoke_run

        proof = smoke_run(recipe, overrides, "eval", out)
        if json:
            out.print_json(proof)
        return
    from gptcli.cli.evaluation_told import tell
    from gptcli.evaluation.fuse import MeanOfTokens, fuse_labels, fuse_losses
    from gptcli.evaluation.tasks import run_tasks

    folders = model_folders(models, recipe)
    loaded, chosen = what_to_score(folders, loaded, overrides, options, texts=not tasks)
    answering = chosen is not None and has_tasks(folders, loaded, predictions, fused=fuse is not None)
    scoring = chosen is not None and (
        not answering or (loaded is not None and "perplexity" in loaded.recipe.eval.metrics)
    )
    asked = of_harness.asked_tasks(tasks, loaded)
    if fuse is not None:
        of_fusing.check_measured(folders, loaded, asked, answering=answering, scoring=scoring)
    fusing = MeanOfTokens(len(folders)) if fuse is not None and scoring else None
    of_lm_eval = of_harness.find(
        folders,
        asked,
        loaded,
        out,
        num_fewshot=num_fewshot,
        seed=seed,
        trusted=trust_tasks,
        limit=limit,
        sequence_length=sequence_length,
        precision=precision,
    )
    answered, results, harness = [], [], []
    for folder in folders:
        load = model_once(folder, precision)
        if answering:
            assert chosen is not None and loaded is not None
            file = predictions if fuse is None else None
            answered.append(run_tasks(folder, chosen, loaded, out, predictions=file, load=load))
        if scoring:
            assert chosen is not None
            results += score_models([folder], chosen, loaded, options, out, load=load, fusing=fusing)
        if of_lm_eval is not None:
            harness.append(of_lm_eval(folder, load))
    if fuse is not None and answering:
        answered.append(fuse_labels(answered, out, predictions))
    if fusing is not None:
        results.append(fuse_losses(results, fusing))
        fusing.close()
    tell(folders, results, out, tasks=answered, harness=harness, markdown=markdown, html=html)


@dataclass(frozen=True)
class Options:
    """What is to be scored and how, as the command line has it."""

    data: list[str] | None
    text: str
    documents: str
    stride: int | None
    limit: int | None
    sequence_length: int | None
    precision: str
    markdown: Path | None
    html: Path | None = None

    def check(self) -> None:
        """Raise `UsageError` for a value that is none."""
        from gptcli.errors import UsageError
        from gptcli.model.load import check_precision

        if self.documents not in ("file", "line", "blank-line"):
            raise UsageError(f"--documents {self.documents} is not one of file, line, blank-line")
        check_precision(self.precision)
        for name, path in (("--markdown", self.markdown), ("--html", self.html)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise UsageError(f"{name} {path}: no file can be there", remedy="Name one in a folder that is.")


def what_to_score(
    folders: list[Path], loaded: LoadedRecipe | None, overrides: list[str], options: Options, *, texts: bool = True
) -> tuple[LoadedRecipe | None, Corpus | None]:
    """The corpus of --data, else of the recipe, else of the first model's run; with the recipe that it belongs to.

    There is none where nothing but tasks of lm-evaluation-harness are asked for: without `texts`, or by a recipe.
    """
    from gptcli.errors import UsageError
    from gptcli.evaluation import corpus
    from gptcli.evaluation.evaluate import run_recipe

    data = options.data
    if loaded is None and texts and (not data or overrides):
        loaded = run_recipe(folders[0], tuple(overrides))
    if data:
        return loaded, corpus.from_files(data, text=options.text, documents=options.documents, limit=options.limit)
    if not texts or (loaded is not None and loaded.recipe.eval.tasks and not _has_texts(loaded)):
        return loaded, None
    if loaded is not None:
        return loaded, corpus.from_recipe(loaded, limit=options.limit)
    raise UsageError(
        f"nothing to score: {folders[0]} does not belong to a run, and there is no recipe",
        remedy="Give files (gptcli eval MODEL --data FILE) or a recipe (gptcli eval MODEL RECIPE).",
    )


def _has_texts(loaded: LoadedRecipe) -> bool:
    """Whether a recipe names texts to score: `eval.data`, or data of which it holds something out."""
    recipe = loaded.recipe
    return bool(recipe.eval.data) or (recipe.data is not None and recipe.data.validation != 0)


def _overlap(trained: str, recipe: str | None, overrides: list[str], options: Options, out: Console) -> None:
    """Changes are of the recipe that is named last: of what is measured, where there is one."""
    from gptcli.cli.eval_overlap import overlap
    from gptcli.evaluation import corpus
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(trained, overrides if recipe is None else [])
    check_available(loaded, "tokenize")
    if options.data:
        chosen = corpus.from_files(options.data, text=options.text, documents=options.documents, limit=options.limit)
    else:
        chosen = corpus.from_recipe(load_for(recipe, overrides) or loaded, limit=options.limit)
    overlap(loaded, chosen, out)


def score_models(
    folders: list[Path],
    chosen: Corpus,
    loaded: LoadedRecipe | None,
    options: Options,
    out: Console,
    *,
    reuse: bool = False,
    load: Callable[[], PreTrainedModel] | None = None,
    fusing: MeanOfTokens | None = None,
) -> list[Evaluation]:
    """Score one corpus with each model.

    `reuse`: take the scores that an earlier evaluation kept. `load` gives the model, where there is but one. `fusing`
    takes what it makes of each token together with what others do.
    """
    from gptcli.evaluation import corpus
    from gptcli.evaluation.evaluate import Keeping
    from gptcli.evaluation.evaluate import Options as Windows
    from gptcli.evaluation.evaluate import evaluate as score
    from gptcli.generation.file_job import model_fingerprint

    precision: Any = options.precision
    windows = Windows(options.sequence_length, options.stride, precision, curves=options.html is not None)
    keeping = Keeping(model_fingerprint, reuse)
    results = [score(folder, chosen, windows, out, loaded, keeping, load, fusing) for folder in folders]
    for result in results:
        if len(bad := result.scores.not_finite()):
            where, count = corpus.place_of(chosen, int(bad[0])), result.result.documents
            out.warn(f"{result.model}: no finite loss of {len(bad):,} of {count:,} documents; the first: {where}")
    return results


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


def load_for(recipe: str | None, overrides: list[str]) -> LoadedRecipe | None:
    """The recipe to evaluate by, if one is named."""
    if recipe is None:
        return None
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_available(loaded, "eval")
    return loaded


def model_once(folder: Path, precision: str) -> Callable[[], PreTrainedModel]:
    """Loads a model when it is first asked for: whatever is measured of it, it is loaded once."""
    from functools import cache

    from gptcli.device import best_device
    from gptcli.model.load import load_model

    return cache(lambda: load_model(folder, dtype=precision, device=best_device()))  # type: ignore[arg-type]


def model_folders(models: list[str], recipe: str | None) -> list[Path]:
    """The models' folders; without a model the run that bears the built-in recipe's name, else the newest run."""
    from gptcli.runs.folder import RunFolder, resolve_model, runs_root

    if models:
        return [resolve_model(model) for model in models]
    named = None if recipe is None or recipe.endswith((".yaml", ".yml")) else RunFolder(runs_root() / recipe).weights()
    return [named or resolve_model(None)]
