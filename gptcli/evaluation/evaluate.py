"""`gptcli eval`: one model on one corpus, from folders to numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.device import best_device
from gptcli.errors import DataError, GptcliError, UsageError
from gptcli.evaluation.corpus import Corpus, Tokens, tokens_for
from gptcli.evaluation.loss import LossResult, document_loss
from gptcli.model.load import Precision, context_length, load_model, memory_errors, tokenizer_home
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.runs.folder import owner
from gptcli.runs.metrics import finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.reporting import Reporter

DEFAULT_LENGTH = 1024
KILO = 1e3


@dataclass(frozen=True)
class Options:
    """What a command line says; None leaves it to the recipe, then to the run, then to the default."""

    sequence_length: int | None = None
    stride: int | None = None
    precision: Precision = "auto"


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a corpus."""

    model: str
    data: str
    result: LossResult

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `gptcli eval`: numbers that are not finite are null."""
        result = self.result
        value: dict[str, Any] = finite(
            {
                "model": self.model,
                "data": self.data,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "documents": result.documents,
                "tokens": result.tokens,
                "bytes": result.bytes,
                "metrics": {},
            }
        )
        return value


def evaluate(
    folder: Path, corpus: Corpus, options: Options, reporter: Reporter, recipe: LoadedRecipe | None = None
) -> Evaluation:
    """Score a corpus with the model of a folder (or Hub id).

    Args:
        folder: the model.
        corpus: what to score.
        options: the command line's.
        reporter: where progress goes.
        recipe: the recipe that the command names, or the run's own.

    Raises:
        MissingError, CheckpointError: the model cannot be loaded.
        UsageError: the window is longer than the model's context.
        DataError: the corpus is empty, or cannot be read.
    """
    tokens = tokens_for(corpus, *tokenizer_home(folder), reporter)
    with memory_errors("Try a shorter --sequence-length, or --precision bf16."):
        model = load_model(folder, dtype=options.precision, device=best_device())
        length = window_length(model, folder, options, recipe, reporter)
        stride = options.stride or (recipe.recipe.eval.stride if recipe else None)
        moved = "" if stride in (None, length) else f", moved by {stride:,}"
        precision = str(model.dtype).removeprefix("torch.")
        reporter.say(f"{folder} on {corpus.name}: windows of {length:,} tokens{moved}, {precision} on {model.device}")
        with _progress(tokens, reporter) as on_progress:
            result = document_loss(
                model,
                tokens.documents,
                prefix_id=tokens.prefix_id,
                sequence_length=length,
                stride=stride,
                on_progress=on_progress,
            )
    if not result.tokens:
        raise DataError(f"no text to score in {corpus.name}", remedy="Give a file with text: gptcli eval --data FILE")
    return Evaluation(str(folder), corpus.name, result)


def window_length(
    model: PreTrainedModel, folder: Path, options: Options, recipe: LoadedRecipe | None, reporter: Reporter
) -> int:
    """The window: as asked, else the recipe's `data.sequence_length`, else the run's, else up to 1,024 tokens.

    Raises:
        UsageError: the asked one is longer than the model's context.
    """
    context = context_length(model)
    asked = options.sequence_length
    if asked is not None:
        if asked < 1 or (context is not None and asked > context):
            limit = "" if context is None else f" and {context:,}, the model's context"
            raise UsageError(f"--sequence-length is {asked:,}; it must lie between 1{limit}")
        return asked
    known = _written_length(recipe) or _run_length(folder, reporter) or DEFAULT_LENGTH
    return known if context is None else min(known, context)


def run_recipe(folder: Path, overrides: tuple[str, ...] = ()) -> LoadedRecipe | None:
    """The resolved recipe of the run that a model folder belongs to; None when it belongs to none.

    Raises:
        RecipeError: it cannot be read, or an override does not fit it.
    """
    run = owner(folder)
    return load_recipe(str(run.resolved), overrides) if run is not None and run.resolved.is_file() else None


def _run_length(folder: Path, reporter: Reporter) -> int | None:
    try:
        return _written_length(run_recipe(folder))
    except GptcliError as error:
        reporter.warn(f"the run's recipe cannot be read, so its sequence_length is not known: {error.lines()[0]}")
        return None


def _written_length(loaded: LoadedRecipe | None) -> int | None:
    if loaded is None or loaded.recipe.data is None or "sequence_length" not in (loaded.written.get("data") or {}):
        return None
    return loaded.recipe.data.sequence_length


@contextmanager
def _progress(tokens: Tokens, reporter: Reporter) -> Iterator[Callable[[int], None] | None]:
    """A bar of the kilobytes that the tokens scored so far stand for; none where the size is not known."""
    if not tokens.total_bytes:
        yield None
        return
    total = tokens.total_bytes / KILO
    with reporter.progress("evaluating", total, "KB") as progress:
        yield lambda scored: progress.update(
            min(total, tokens.read.bytes * scored / max(1, tokens.read.tokens) / KILO), tokens=f"{scored:,}"
        )
