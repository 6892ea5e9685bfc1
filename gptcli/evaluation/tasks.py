"""Tasks by recipe: rows of files that a model answers, by the likelihood of labels or by a text, and their metrics.

Rows and answers are in memory, since metrics such as BLEU are those of all texts together; logits never are.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcli.device import best_device
from gptcli.errors import DataError, DivergedError, UsageError, writing
from gptcli.evaluation import metrics
from gptcli.evaluation.classify import (
    CONTENT_FREE,
    calibrated,
    label_ids,
    log_likelihoods,
    normalized,
    over_labels,
)
from gptcli.evaluation.curves import Calibration, calibration
from gptcli.evaluation.examples import Asked, Example, read_examples
from gptcli.files import write_atomic
from gptcli.generation.batches import UNIT_SEQUENCES, UNIT_TOKENS, plan_units
from gptcli.generation.settings import Settings, settings
from gptcli.model.load import Precision, context_length, load_model, load_tokenizer, memory_errors
from gptcli.recipe.template import PROMPT, Template, parse_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class TaskResult:
    """What a model's answers to the rows of a corpus are worth: `metrics` by name, and how many `rows` there were.

    `calibration` is of the probabilities of labels, taken over the labels alone; None where no label is asked for.
    """

    model: str
    data: str
    rows: int
    metrics: dict[str, Any]
    calibration: Calibration | None = None

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


def run_tasks(
    folder: Path,
    corpus: Corpus,
    recipe: LoadedRecipe,
    reporter: Reporter,
    *,
    precision: Precision = "auto",
    predictions: Path | None = None,
) -> TaskResult:
    """Ask the model of a folder (or Hub id) for the rows of a corpus, and measure what it answers.

    Args:
        folder: the model.
        corpus: files of rows.
        recipe: its `eval` says what is asked, `generate` how texts are made: greedily unless it has a temperature.
        reporter: where progress goes.
        precision: of the model.
        predictions: a file for the answers, a line of JSON a row.

    Raises:
        MissingError: a metric's package is not installed; the model cannot be loaded, see `load_model`.
        DataError: a row lacks something, or its prompt does not fit into the model's context.
        DivergedError: the model gives a label no number.
        CheckpointError: the answers cannot be written.
    """
    section, wanted = recipe.recipe.eval, task_metrics(recipe)
    of_labels = [each for each in wanted if section.labels is not None and each in metrics.OF_LABELS]
    of_texts = [each for each in wanted if each not in of_labels]
    metrics.require_packages(wanted, labels=section.labels is not None)
    template = parse_template(section.prompt or PROMPT)
    examples = read_examples(corpus, Asked(template, section.references, _check(section, of_texts)), reporter)
    tokenizer = load_tokenizer(folder)
    found: dict[str, Any] = {}
    sureness: Calibration | None = None
    lines: list[dict[str, Any]] = [
        {"where": each.where, "prompt": each.prompt, "references": list(each.references)} for each in examples
    ]
    with memory_errors("Try --precision bf16, or a smaller generate.max_new_tokens."):
        model = load_model(folder, dtype=precision, device=best_device())
        dtype = str(model.dtype).removeprefix("torch.")
        reporter.say(f"{folder} on {corpus.name}: {len(examples):,} rows, {dtype} on {model.device}")
        prompts = _encode(model, tokenizer, examples)
        if of_labels:
            assert section.labels is not None
            found, sureness = _classify(
                model, tokenizer, template, examples, prompts, section, of_labels, lines, reporter
            )
        if of_texts:
            how = _settings(recipe)
            reporter.say(f"texts of at most {how.max_new_tokens:,} tokens, {how.how}")
            completions = _generate(model, tokenizer, examples, prompts, how, reporter)
            found |= _measure_texts(examples, completions, of_texts, lines)
    if predictions is not None:
        with writing(predictions, "the answers", "Nothing else was changed."):
            write_atomic(predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        reporter.say(f"answers: {predictions}")
    return TaskResult(str(folder), corpus.name, len(examples), found, sureness)


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


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[int]]:
    from gptcli.generation.text import check_characters, encode_prompts

    context = context_length(model)
    for example in examples:
        try:
            check_characters(example.prompt, context)
        except UsageError as error:
            raise DataError(error.what, where=example.where, remedy=error.remedy) from None
    return encode_prompts(tokenizer, [example.prompt for example in examples])


def _check_room(model: PreTrainedModel, examples: Sequence[Example], prompts: Sequence[list[int]], more: int) -> None:
    """Raise `DataError` for the first row whose prompt leaves no room for `more` tokens in the model's context."""
    context = context_length(model)
    if context is None:
        return
    for example, ids in zip(examples, prompts, strict=True):
        if len(ids) + more > context:
            raise DataError(
                f"the prompt has {len(ids):,} tokens, and with {more:,} more that is above the model's context of "
                f"{context:,}",
                where=example.where,
                remedy="Shorten it, leave the row out, or use a model with a longer context.",
            )


def _classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    section: Eval,
    wanted: Sequence[str],
    lines: list[dict[str, Any]],
    reporter: Reporter,
) -> tuple[dict[str, Any], Calibration]:
    from gptcli.generation.text import encode_prompts

    assert section.labels is not None
    names = [label.strip() for label in section.labels]
    labels, ended = label_ids(tokenizer, section.labels, by=section.label_scores)
    if ended:
        reporter.say("a label begins another one, so the end of text counts as part of each label")
    # The last token of a label is predicted and never read.
    _check_room(model, examples, prompts, max(map(len, labels)) - 1)
    pad_id = prompts[0][0]
    with reporter.progress("scoring labels", len(prompts), "rows") as progress:
        scores = log_likelihoods(model, prompts, labels, pad_id=pad_id, on_scored=progress.update)
    if section.label_scores == "normalized":
        scores = normalized(scores, labels)
    elif section.label_scores == "calibrated":
        empty = [template.fill(lambda column, text=text: text) for text in CONTENT_FREE]  # type: ignore[misc]
        scores = calibrated(scores, log_likelihoods(model, encode_prompts(tokenizer, empty), labels, pad_id=pad_id))
    for example, row in zip(examples, scores, strict=True):
        _check_finite(row, example)
    chosen = [names[index] for index in scores.argmax(axis=1)]
    for line, label, row in zip(lines, chosen, scores, strict=True):
        shown = {name: float(score) if math.isfinite(score) else None for name, score in zip(names, row, strict=True)}
        line |= {"label": label, "label_scores": shown}
    references = [example.references[0].strip() for example in examples]
    right = np.array([label == reference for label, reference in zip(chosen, references, strict=True)])
    sureness = calibration(np.exp(over_labels(scores).max(axis=1)), right)
    every = metrics.of_labels(chosen, references, names)
    kept = {name: value for name, value in every.items() if name.split("_")[0] in (*wanted, "confusion")}
    return kept | {"label_scores": section.label_scores + (" with the end of text" if ended else "")}, sureness


def _check_finite(scores: NDArray[np.float64], example: Example) -> None:
    if np.isnan(scores).any() or not np.isfinite(scores.max()):
        raise DivergedError(
            f"the likelihood of what follows the prompt is not a finite number: {example.where}",
            remedy="The model gives NaN or infinite logits: its weights are damaged, or --precision is too low.",
        )


def _settings(recipe: LoadedRecipe) -> Settings:
    """One text a prompt, by the likeliest tokens unless the recipe writes a temperature or beams."""
    written = recipe.written.get("generate") or {}
    chosen = settings(
        written, {"num_return_sequences": 1}, seed=recipe.recipe.seed, greedy="temperature" not in written
    )
    chosen.check()
    return chosen


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    how: Settings,
    reporter: Reporter,
) -> list[Completion]:
    from gptcli.generation.text import complete_batch

    _check_room(model, examples, prompts, 1)
    context = context_length(model)
    if context is not None and (cut := sum(len(ids) + how.max_new_tokens > context for ids in prompts)):
        reporter.warn(f"{cut:,} prompts leave room for fewer than {how.max_new_tokens:,} new tokens in the context")
    # Of logits that are no numbers a text is made all the same, so the longest prompt is looked at first.
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    ends = log_likelihoods(model, [prompts[longest]], [prompts[longest][:1]], pad_id=prompts[longest][0])
    _check_finite(ends[0], examples[longest])
    units = plan_units(
        np.array([len(ids) for ids in prompts]),
        new_tokens=how.max_new_tokens,
        copies=1,
        context=context,
        most_prompts=UNIT_SEQUENCES,
        most_tokens=UNIT_TOKENS,
    )
    found: dict[int, Completion] = {}
    with reporter.progress("generating", len(prompts), "rows") as progress:
        for unit in range(len(units)):
            numbers = units.prompts(unit)
            completed = complete_batch(model, tokenizer, [prompts[number] for number in numbers], how)
            found |= {number: each[0] for number, each in zip(numbers, completed, strict=True)}
            progress.update(len(found))
    return [found[number] for number in range(len(prompts))]


def _measure_texts(
    examples: Sequence[Example], completions: Sequence[Completion], wanted: Sequence[str], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """The metrics of texts without white space around them; those of rows are written into the lines, too."""
    texts = [each.text.strip() for each in completions]
    references = [example.references for example in examples]
    for line, each, text in zip(lines, completions, texts, strict=True):
        line |= {"prediction": text, "tokens": each.tokens, "finish_reason": each.finish_reason}
    found: dict[str, Any] = {}
    for name in wanted:
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
