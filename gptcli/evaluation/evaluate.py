"""`gptcli eval`: one model on one corpus, from folders to numbers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli import __version__
from gptcli.data.media.reader import find_reader
from gptcli.device import best_device
from gptcli.errors import DataError, GptcliError, UsageError
from gptcli.evaluation.corpus import Corpus, Tokens, tokens_for
from gptcli.evaluation.curves import Collecting, Curves, keep_curves, kept_curves
from gptcli.evaluation.fuse import MeanOfTokens
from gptcli.evaluation.loss import LossResult, Watch, document_loss, loss_of
from gptcli.evaluation.scores import FORMAT, Scores, keep, kept
from gptcli.files import fingerprint
from gptcli.model.load import (
    Precision,
    context_of,
    load_config,
    load_model,
    memory_errors,
    model_home,
    tokenizer_home,
)
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
    """What a command line says; None leaves it to the recipe, then to the run, then to the default.

    `curves`: collect what a page of pictures needs.
    """

    sequence_length: int | None = None
    stride: int | None = None
    precision: Precision = "auto"
    curves: bool = False


@dataclass(frozen=True)
class Keeping:
    """How evaluations are kept.

    Attributes:
        fingerprint: of the content of a model's folder.
        reuse: take what is kept in place of scoring.
    """

    fingerprint: Callable[[Path], str]
    reuse: bool = False


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a corpus; with `curves`, where they were asked for, and the folder of its tokenizer."""

    model: str
    data: str
    scores: Scores
    curves: Curves | None = None
    tokenizer: Path | None = None

    @property
    def result(self) -> LossResult:
        """The loss and what it was summed over."""
        return self.scores.result

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `gptcli eval`: numbers that are not finite are null."""
        result, scores = self.result, self.scores
        sources = [{"source": name, **_figures(part)} for name, part in scores.by_source()]
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
                "bits_per_character": scores.bits_per_character,
                "characters": scores.total_characters,
                "interval": _interval(scores),
                "sources": sources if len(sources) > 1 else [],
            }
        )
        return value


def _figures(scores: Scores) -> dict[str, Any]:
    result = scores.result
    return {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "documents": result.documents,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "interval": _interval(scores),
    }


def _interval(scores: Scores) -> dict[str, list[float] | None]:
    found = {"loss": scores.loss_interval, "bits_per_byte": scores.byte_interval}
    return {name: None if each is None else [each.low, each.high] for name, each in found.items()}


def evaluate(
    folder: Path,
    corpus: Corpus,
    options: Options,
    reporter: Reporter,
    recipe: LoadedRecipe | None = None,
    keeping: Keeping | None = None,
    load: Callable[[], PreTrainedModel] | None = None,
    fusing: MeanOfTokens | None = None,
) -> Evaluation:
    """Score a corpus with the model of a folder (or Hub id).

    Args:
        folder: the model.
        corpus: what to score.
        options: the command line's.
        reporter: where progress goes.
        recipe: the recipe that the command names, or the run's own.
        keeping: keep the scores of the documents in the cache; None: do not.
        load: gives the folder's model, in place of loading it.
        fusing: what takes the probability of each token together with those of other models.

    Raises:
        MissingError, CheckpointError: the model cannot be loaded.
        UsageError: the window is longer than the model's context.
        DataError: the corpus is empty, or cannot be read.
    """
    tokens = tokens_for(corpus, *tokenizer_home(folder), reporter)
    home, revision = model_home(folder)
    context = context_of(load_config(home, revision=revision))
    length = window_length(context, folder, options, recipe, reporter)
    stride = options.stride or (recipe.recipe.eval.stride if recipe else None)
    device, key = best_device(), None
    if keeping is not None:
        code = [__version__, *map(version, ("torch", "transformers"))]
        settings = [length, stride or length, options.precision, device.type, code]
        key = fingerprint([FORMAT, keeping.fingerprint(folder), tokens.identity, settings])
        if keeping.reuse and fusing is None and (found := kept(key)) is not None:
            curves = kept_curves(key) if options.curves else None
            if curves is not None or not options.curves:
                reporter.say(f"{folder} on {corpus.name}: as kept of an earlier evaluation")
                return Evaluation(str(folder), corpus.name, found, curves, tokens.tokenizer)
            reporter.say(f"{folder} on {corpus.name}: kept without what the pictures show, so it is scored again")
    nats = array("d")
    # Pictures are of texts: of rows only the answers count, at places that differ.
    collecting = Collecting() if options.curves and tokens.windows is None else None
    watch: Watch | None = collecting if fusing is None else fusing.watch(tokens.sizes, collecting)
    with memory_errors("Try a shorter --sequence-length, or --precision bf16."):
        model = load() if load is not None else load_model(folder, dtype=options.precision, device=device)
        moved = "" if stride in (None, length) else f", moved by {stride:,}"
        precision = str(model.dtype).removeprefix("torch.")
        reporter.say(f"{folder} on {corpus.name}: windows of {length:,} tokens{moved}, {precision} on {model.device}")
        with _progress(tokens, reporter) as on_progress:
            if tokens.windows is not None:
                result = loss_of(
                    model,
                    tokens.windows(length),
                    reader=find_reader(tokens.tokenizer),
                    pad_id=tokens.prefix_id,
                    on_progress=on_progress,
                    per_document=nats,
                    watch=watch,
                )
            else:
                result = document_loss(
                    model,
                    tokens.documents if collecting is None else collecting.reading(tokens.documents),
                    prefix_id=tokens.prefix_id,
                    sequence_length=length,
                    stride=stride,
                    on_progress=on_progress,
                    per_document=nats,
                    watch=watch,
                )
    if not result.tokens:
        raise DataError(f"no text to score in {corpus.name}", remedy="Give a file with text: gptcli eval --data FILE")
    scores = tokens.sizes.scores(nats)
    collected = None if collecting is None else collecting.curves()
    _say_left_out(tokens, scores, reporter)
    if key is not None:
        try:
            keep(key, scores, {"model": str(folder), "data": corpus.name, "sequence_length": length, "stride": stride})
            if collected is not None:
                keep_curves(key, collected)
        except OSError as error:
            reporter.warn(f"the documents' losses could not be kept for a comparison: {error.strerror or error}")
    return Evaluation(str(folder), corpus.name, scores, collected, tokens.tokenizer)


def _say_left_out(tokens: Tokens, scores: Scores, reporter: Reporter) -> None:
    if empty := tokens.left_out.dropped["empty"]:
        reporter.say(f"{empty:,} documents without text were left out")
    if bad := sum(tokens.left_out.dropped.values()) - empty:
        reporter.say(f"{bad:,} rows that cannot be read were left out")
    if unscored := int((scores.tokens == 0).sum()):
        reporter.say(f"{unscored:,} documents have no token to score; their bytes and characters count")


def window_length(
    context: int | None, folder: Path, options: Options, recipe: LoadedRecipe | None, reporter: Reporter
) -> int:
    """The window: as asked, else the recipe's `data.sequence_length`, else the run's, else up to 1,024 tokens.

    `context` is the most positions that the model was made for, and of the latter three the most that is taken.

    Raises:
        UsageError: the asked one is longer than the model's context.
    """
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
            min(total, tokens.sizes.bytes * scored / max(1, tokens.sizes.tokens) / KILO), tokens=f"{scored:,}"
        )
