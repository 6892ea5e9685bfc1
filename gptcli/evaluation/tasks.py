"""Tasks by recipe: rows of files that a model answers, by the likelihood of labels or by a text, and their metrics.

Rows and answers are in memory, since metrics such as BLEU are those of all texts together; logits never are. `gptcli
eval` and the evaluations of training are these functions: read the rows, answer them, measure the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcli.data.formats import RowFormat
from gptcli.data.media.reader import find_reader
from gptcli.device import best_device
from gptcli.errors import UsageError, writing
from gptcli.evaluation import metrics
from gptcli.evaluation.answers import Answers, answer, encode, label_scores
from gptcli.evaluation.classify import over_labels
from gptcli.evaluation.curves import Calibration, calibration
from gptcli.evaluation.examples import Asked, Example, read_examples
from gptcli.files import write_atomic
from gptcli.generation.settings import Settings, settings
from gptcli.model.load import Precision, context_length, load_model, load_tokenizer, memory_errors, tokenizer_home
from gptcli.recipe.template import Template, parse_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from gptcli.data.media.reader import MediaReader
    from gptcli.evaluation.corpus import Corpus
    from gptcli.generation.row import Completion
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Eval
    from gptcli.reporting import Reporter

OF_ROWS = {"exact_match": metrics.exact_match, "f1": metrics.token_f1, "numeric_match": metrics.numeric_match}
OF_ALL = {"bleu": metrics.bleu, "chrf": metrics.chrf, "rouge": metrics.rouge}
OF_ERRORS = {"wer": metrics.word_error_rate, "cer": metrics.character_error_rate}
# SQuAD's metrics know an answer that is empty; the others have nothing to compare with.
WITH_EMPTY = ("exact_match", "f1", "quality")

SHOWN = 20  # rows with media on a page: which, what is right, what was answered


@dataclass(frozen=True)
class Task:
    """What a recipe asks of which rows, and what is measured of the answers.

    Attributes:
        name: of the rows.
        template: of what the model is asked.
        examples: the rows.
        labels: between which the model chooses; empty: it makes texts alone.
        label_scores: by what it chooses.
        of_labels: metrics of the labels.
        of_texts: metrics of the texts.
        settings: how the texts are made.
    """

    name: str
    template: Template
    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    label_scores: str
    of_labels: tuple[str, ...]
    of_texts: tuple[str, ...]
    settings: Settings


@dataclass(frozen=True)
class TaskResult:
    """What a model's answers to the rows of a corpus are worth: `metrics` by name, and how many `rows` there were.

    `calibration` is of the probabilities of labels, taken over the labels alone; None where no label is asked for.
    `task` and `answers` are what was measured, `shown` those to the first rows with media: their names, what
    is right, what was answered.
    """

    model: str
    data: str
    rows: int
    metrics: dict[str, Any]
    calibration: Calibration | None = None
    task: Task | None = field(default=None, repr=False, compare=False)
    answers: Answers | None = field(default=None, repr=False, compare=False)
    shown: tuple[tuple[str, str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `gptcli eval` where no loss was asked for."""
        none = dict.fromkeys(("loss", "perplexity", "bits_per_byte"))
        counts = {"documents": self.rows, "tokens": None, "bytes": None}
        return {"model": self.model, "data": self.data, **none, **counts, "metrics": self.metrics}


def task_metrics(recipe: LoadedRecipe | None) -> list[str]:
    """The metrics of a recipe that are of tasks, each once."""
    return (
        [] if recipe is None else [each for each in dict.fromkeys(recipe.recipe.eval.metrics) if each != "perplexity"]
    )


def of_labels_and_texts(recipe: LoadedRecipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The metrics of a recipe's tasks: those of labels, and those of texts."""
    wanted = task_metrics(recipe)
    of_labels = tuple(each for each in wanted if recipe.recipe.eval.labels and each in metrics.OF_LABELS)
    return of_labels, tuple(each for each in wanted if each not in of_labels)


def read_task(corpus: Corpus, recipe: LoadedRecipe, reporter: Reporter, reader: MediaReader | None = None) -> Task:
    """What a recipe's `eval` asks of the rows of a corpus; texts are made as `generate` has it (see `Task`).

    `reader`: of the rows' images and sounds, see `task_reader`.

    Raises:
        MissingError: a metric's package is not installed.
        UsageError: the corpus has no rows of files.
        DataError: a row lacks something, or its media cannot be used, by file and line.
    """
    section, labels = recipe.recipe.eval, tuple(recipe.recipe.eval.labels or ())
    of_labels, of_texts = of_labels_and_texts(recipe)
    metrics.require_packages(task_metrics(recipe), labels=bool(labels))
    row = asked_row(recipe)
    examples = read_examples(corpus, Asked(row, section.references, _check(section, of_texts), reader), reporter)
    how = _settings(recipe)
    return Task(corpus.name, row.prompt, tuple(examples), labels, section.label_scores, of_labels, of_texts, how)


def asked_row(recipe: LoadedRecipe) -> RowFormat:
    """What a recipe's tasks ask of a row."""
    template, data = parse_template(recipe.recipe.asked), recipe.recipe.data
    if data is None:
        return RowFormat("prompt", template)
    reach: dict[str, Any] = {"allow_urls": data.allow_urls, "allow_outside": data.allow_outside}
    return RowFormat("prompt", template, media=data.media, **reach)


def task_reader(folder: Path, recipe: LoadedRecipe) -> MediaReader | None:
    """The reader of a model's folder for the images and sounds that a recipe's tasks ask about; None: there are none.

    Raises:
        UsageError: the model reads text alone, or none of that kind.
        MissingError, CheckpointError: see `load_processor`.
    """
    kinds = asked_row(recipe).placed
    if not kinds:
        return None
    reader = find_reader(tokenizer_home(folder)[0])
    if unread := [kind for kind in kinds if reader is None or kind not in reader.tokens]:
        reads = "text alone" if reader is None else ", ".join(f"{kind}s" for kind in reader.tokens) + " alone"
        raise UsageError(
            f"the recipe's prompt has a place for {unread[0]}s, and this model reads {reads}",
            where=str(folder),
            remedy="Name a model that reads them, whose processor stands in its folder, or another eval.prompt.",
        )
    return reader


def run_tasks(
    folder: Path,
    corpus: Corpus,
    recipe: LoadedRecipe,
    reporter: Reporter,
    *,
    precision: Precision = "auto",
    predictions: Path | None = None,
    load: Callable[[], PreTrainedModel] | None = None,
) -> TaskResult:
    """Ask the model of a folder (or Hub id) for the rows of a corpus, and measure what it answers.

    Args:
        folder: the model.
        corpus: files of rows.
        recipe: its `eval` says what is asked, `generate` how texts are made: greedily unless it has a temperature.
        reporter: where progress goes.
        precision: of the model.
        predictions: a file for the answers, a line of JSON a row.
        load: gives the folder's model, in place of loading it.

    Raises:
        MissingError: a metric's package is not installed; the model cannot be loaded, see `load_model`.
        UsageError: the recipe asks about media that the model does not read.
        DataError: a row lacks something, or its prompt does not fit into the model's context.
        DivergedError: the model gives a label no number.
        CheckpointError: the answers cannot be written.
    """
    reader = task_reader(folder, recipe)
    task = read_task(corpus, recipe, reporter, reader)
    tokenizer = load_tokenizer(folder)
    with memory_errors("Try --precision bf16, or a smaller generate.max_new_tokens."):
        model = load() if load is not None else load_model(folder, dtype=precision, device=best_device())
        dtype = str(model.dtype).removeprefix("torch.")
        reporter.say(f"{folder} on {corpus.name}: {len(task.examples):,} rows, {dtype} on {model.device}")
        prompts = encode(model, tokenizer, task)
        say_how(model, task, prompts, reporter)
        answers = answer(model, tokenizer, task, prompts, reporter, reader=reader)
    if answers.with_end:
        reporter.say("a label begins another one, so the end of text counts as part of each label")
    return result_of(str(folder), task, answers, reporter, predictions)


def result_of(
    model: str, task: Task, answers: Answers, reporter: Reporter, predictions: Path | None = None
) -> TaskResult:
    """Measure the answers of a model to all rows, and write them as lines of JSON if a file is named.

    Raises:
        DivergedError: the model gave a label no number.
        CheckpointError: the answers cannot be written.
    """
    found, lines = measure(task, answers)
    if predictions is not None:
        with writing(predictions, "the answers", "Nothing else was changed."):
            write_atomic(predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        reporter.say(f"answers: {predictions}")
    sureness = _sureness(task, answers) if task.of_labels else None
    first = _first_answers(lines)
    return TaskResult(model, task.name, len(task.examples), found, sureness, task, answers, first)


def _first_answers(lines: Sequence[dict[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    rows = [line for line in lines if "media" in line][:SHOWN]
    answered = [line.get("label", line.get("prediction", "")) for line in rows]
    named = [(", ".join(line["media"]), " | ".join(line["references"])) for line in rows]
    return tuple((*each, answer) for each, answer in zip(named, answered, strict=True))


def _check(section: Eval, of_texts: Sequence[str]) -> Any:
    """What a row's references must be, for the metrics that are asked for."""
    labels = None if section.labels is None else [label.strip() for label in section.labels]
    filled = next((metric for metric in of_texts if metric not in WITH_EMPTY), None)
    numbers = "numeric_match" in of_texts

    def check(references: tuple[str, ...]) -> str | None:
        if labels is not None and (len(references) > 1 or references[0].strip() not in labels):
            return f"{', '.join(map(repr, references))} is none of the labels {', '.join(map(repr, labels))}"
        if filled is not None and not all(reference.strip() for reference in references):
            return f"the reference is empty, and {filled} has nothing to compare with"
        if numbers and (none := next((each for each in references if metrics.number_in(each) is None), None)):
            return f"there is no number in the reference {none[:80]!r}"
        return None

    return check


def _settings(recipe: LoadedRecipe) -> Settings:
    """One text a prompt, by the likeliest tokens unless the recipe writes a temperature or beams."""
    written = recipe.written.get("generate") or {}
    chosen = settings(
        written, {"num_return_sequences": 1}, seed=recipe.recipe.seed, greedy="temperature" not in written
    )
    chosen.check()
    return chosen


def say_how(model: PreTrainedModel, task: Task, prompts: Sequence[list[int]], reporter: Reporter) -> None:
    """Say how texts are made, and for how many prompts there is less room than was wanted."""
    if not task.of_texts:
        return
    reporter.say(f"texts of at most {task.settings.max_new_tokens:,} tokens, {task.settings.how}")
    context, most = context_length(model), task.settings.max_new_tokens
    if context is not None and (cut := sum(len(ids) + most > context for ids in prompts)):
        reporter.warn(f"{cut:,} prompts leave room for fewer than {most:,} new tokens in the context")


def measure(task: Task, answers: Answers) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of the answers to all rows, by name, and a line of each row for a file.

    Raises:
        DivergedError: the model gave no number for what follows a prompt.
    """
    lines: list[dict[str, Any]] = [
        {"where": each.where, "prompt": each.prompt, "references": list(each.references)} for each in task.examples
    ]
    for line, each in zip(lines, task.examples, strict=True):
        if each.media:
            line["media"] = [medium.name for medium in each.media]
    found: dict[str, Any] = {}
    if task.of_labels:
        found |= _measure_labels(task, answers, lines)
    if task.of_texts:
        found |= _measure_texts(task, [answers.texts[row] for row in range(len(task.examples))], lines)
    return found, lines


def _measure_labels(task: Task, answers: Answers, lines: list[dict[str, Any]]) -> dict[str, Any]:
    names = [label.strip() for label in task.labels]
    scores = label_scores(answers, task)
    chosen = [names[index] for index in scores.argmax(axis=1)]
    for line, label, row in zip(lines, chosen, scores, strict=True):
        shown = {name: float(score) if math.isfinite(score) else None for name, score in zip(names, row, strict=True)}
        line |= {"label": label, "label_scores": shown}
    every = metrics.of_labels(chosen, [example.references[0].strip() for example in task.examples], names)
    kept = {name: value for name, value in every.items() if name.split("_")[0] in (*task.of_labels, "confusion")}
    return kept | {"label_scores": task.label_scores + (" with the end of text" if answers.with_end else "")}


def _sureness(task: Task, answers: Answers) -> Calibration:
    """How often the chosen label is right, by its probability among the labels."""
    scores = label_scores(answers, task)
    chosen = scores.argmax(axis=1)
    names = [label.strip() for label in task.labels]
    pairs = zip(chosen, task.examples, strict=True)
    right = np.array([names[index] == example.references[0].strip() for index, example in pairs])
    return calibration(np.exp(over_labels(scores).max(axis=1)), right)


def _measure_texts(task: Task, completions: Sequence[Completion], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of texts without white space around them; those of rows are written into the lines, too."""
    texts = [each.text.strip() for each in completions]
    references = [example.references for example in task.examples]
    for line, each, text in zip(lines, completions, texts, strict=True):
        line |= {"prediction": text, "tokens": each.tokens, "finish_reason": each.finish_reason}
    found: dict[str, Any] = {}
    for name in task.of_texts:
        if name in OF_ROWS:
            scores = [OF_ROWS[name](text, each) for text, each in zip(texts, references, strict=True)]
            for line, score in zip(lines, scores, strict=True):
                line[name] = score
            found[name] = fmean(scores)
        elif name in OF_ALL:
            found |= OF_ALL[name](texts, references)
        elif name in OF_ERRORS:
            found[name] = OF_ERRORS[name](texts, references)
        else:
            found |= metrics.quality(texts, [each.finish_reason == "stop" for each in completions])
    empty = sum(not text for text in texts)
    return found | ({"empty_predictions": empty} if empty else {})
