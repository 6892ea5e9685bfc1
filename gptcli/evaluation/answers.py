"""What a model answers to the rows of a task: how likely it finds each label, and a text. In memory, logits never are.

The processes of a run share the rows: of labels the batches of one process go round, of texts row i is that of process
i mod n. What they found is put together by `merged`, and does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcli.errors import DataError, DivergedError, UsageError
from gptcli.evaluation.classify import CONTENT_FREE, calibrated, label_ids, log_likelihoods, normalized
from gptcli.generation.batches import UNIT_SEQUENCES, UNIT_TOKENS, plan_units
from gptcli.generation.media_prompt import MediaPrompt
from gptcli.model.load import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader
    from gptcli.evaluation.examples import Example
    from gptcli.evaluation.tasks import Task
    from gptcli.generation.row import Completion
    from gptcli.reporting import Reporter


@dataclass(frozen=True)
class Share:
    """Which rows this process answers.

    Attributes:
        part: of `parts`, from 0.
        parts: among which the rows are dealt out.
        together: the model is divided over processes, whose passes have to be the same: each makes every text.
    """

    part: int = 0
    parts: int = 1
    together: bool = False


@dataclass(frozen=True)
class Answers:
    """What was found of the rows of a share.

    Attributes:
        scores: log-likelihood of each label after each prompt, [rows, labels]; NaN where another process has it.
        empty: the same after prompts without content, where scores are calibrated by them.
        labels: the tokens of each.
        with_end: the end of text counts as part of each label.
        texts: by the number of the row.
    """

    scores: NDArray[np.float64] | None
    empty: NDArray[np.float64] | None
    labels: Sequence[Sequence[int]]
    with_end: bool
    texts: dict[int, Completion]


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[list[int]]:
    """The ids of the rows' prompts, with their media where they have some (`MediaPrompt`).

    Raises:
        DataError: one leaves no room for an answer in the model's context, by file and line.
        UsageError: the labels are none to this tokenizer.
    """
    from gptcli.generation.text import check_characters, encode_prompts

    context = context_length(model)
    for example in task.examples:
        try:
            check_characters(example.text, context)
        except UsageError as error:
            raise DataError(error.what, where=example.where, remedy=error.remedy) from None
    prompts = encode_prompts(tokenizer, [example.text for example in task.examples])
    media = [example.media for example in task.examples]
    prompts = [MediaPrompt(ids, shown) if shown else ids for ids, shown in zip(prompts, media, strict=True)]
    if task.of_labels:
        labels, _ = label_ids(tokenizer, task.labels, by=task.label_scores)
        # The last token of a label is predicted and never read.
        _check_room(context, task.examples, prompts, max(map(len, labels)) - 1)
    if task.of_texts:
        _check_room(context, task.examples, prompts, 1)
    return prompts


def _check_room(context: int | None, examples: Sequence[Example], prompts: Sequence[list[int]], more: int) -> None:
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


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[list[int]],
    reporter: Reporter,
    share: Share = Share(),
    *,
    reader: MediaReader | None = None,
) -> Answers:
    """What the model answers to the rows of a share. Its mode and the random state of the process are left alone.

    Args:
        model: the model, of which weights may be divided over processes.
        tokenizer: the model's.
        task: what is asked.
        prompts: see `encode`.
        reporter: where progress goes.
        share: the rows of this process.
        reader: of the prompts' media.

    Raises:
        DivergedError: what follows a prompt has no likelihood.
        DataError: an image or sound is not what it was when the rows were read.
    """
    found = Answers(None, None, (), False, {})
    if task.of_labels:
        found = _likelihoods(model, tokenizer, task, prompts, reporter, share, reader)
    if task.of_texts:
        found = replace(found, texts=_texts(model, tokenizer, task, prompts, reporter, share, reader))
    return found


def _likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[list[int]],
    reporter: Reporter,
    share: Share,
    reader: MediaReader | None,
) -> Answers:
    from gptcli.generation.text import encode_prompts

    labels, with_end = label_ids(tokenizer, task.labels, by=task.label_scores)
    # Any token of a text: a prompt may begin with a placeholder, and there are as many of these as its media have.
    about: dict[str, Any] = {"pad_id": labels[0][0], "reader": reader}
    with reporter.progress("scoring labels", len(prompts) / share.parts, "rows") as progress:
        part = (share.part, share.parts)
        scores = log_likelihoods(model, prompts, labels, on_scored=progress.update, part=part, **about)
    empty = None
    if task.label_scores == "calibrated":
        blank = [task.template.fill(lambda column, text=text: text) for text in CONTENT_FREE]  # type: ignore[misc]
        empty = log_likelihoods(model, encode_prompts(tokenizer, blank), labels, **about)
    return Answers(scores, empty, labels, with_end, {})


def _texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[list[int]],
    reporter: Reporter,
    share: Share,
    reader: MediaReader | None,
) -> dict[int, Completion]:
    from gptcli.generation.text import complete_batch, stop_ids

    rows = range(len(prompts)) if share.together else range(share.part, len(prompts), share.parts)
    if not rows:
        return {}
    # Of logits that are no numbers a text is made all the same, so the longest prompt is looked at first.
    longest = max(rows, key=lambda row: len(prompts[row]))
    token = (stop_ids(model, tokenizer) or prompts[longest])[0]
    ends = log_likelihoods(model, [prompts[longest]], [[token]], pad_id=token, reader=reader)
    check_finite(ends[0], task.examples[longest])
    units = plan_units(
        np.array([len(prompts[row]) for row in rows]),
        new_tokens=task.settings.max_new_tokens,
        copies=1,
        context=context_length(model),
        most_prompts=UNIT_SEQUENCES,
        most_tokens=UNIT_TOKENS,
    )
    found: dict[int, Completion] = {}
    with reporter.progress("generating", len(rows), "rows") as progress:
        for unit in range(len(units)):
            numbers = [rows[number] for number in units.prompts(unit)]
            given = [prompts[number] for number in numbers]
            completed = complete_batch(model, tokenizer, given, task.settings, reader=reader)
            found |= {number: each[0] for number, each in zip(numbers, completed, strict=True)}
            progress.update(len(found))
    return found


def merged(every: Sequence[Answers]) -> Answers:
    """The answers of all shares together; at least one."""
    first, *others = every
    scores, texts = first.scores, dict(first.texts)
    for other in others:
        if scores is not None and other.scores is not None:
            scores = np.where(np.isnan(scores), other.scores, scores)
        texts |= other.texts
    return replace(first, scores=scores, texts=texts)


def label_scores(answers: Answers, task: Task) -> NDArray[np.float64]:
    """The scores of the labels [rows, labels] by which a row's label is chosen.

    Raises:
        DivergedError: a row has none.
    """
    scores = answers.scores
    assert scores is not None
    if task.label_scores == "normalized":
        scores = normalized(scores, answers.labels)
    elif answers.empty is not None:
        scores = calibrated(scores, answers.empty)
    for example, row in zip(task.examples, scores, strict=True):
        check_finite(row, example)
    return scores


def check_finite(scores: NDArray[np.float64], example: Example) -> None:
    """Raise `DivergedError` where the likelihoods of what follows a row's prompt are no numbers."""
    if np.isnan(scores).any() or not np.isfinite(scores.max()):
        raise DivergedError(
            f"the likelihood of what follows the prompt is not a finite number: {example.where}",
            remedy="The model gives NaN or infinite logits: its weights are damaged, or --precision is too low.",
        )
