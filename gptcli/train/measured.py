"""An evaluation during training beyond the loss: the recipe's tasks, by the functions of `gptcli eval`.

The model in memory answers them, on all processes, each row once; the metrics are those of all rows together, made once
by rank 0. A model that gives no numbers has no metrics then: the next step's guard decides what becomes of the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptcli.errors import DivergedError
from gptcli.evaluation.answers import Answers, Share, answer, encode, merged
from gptcli.evaluation.corpus import rows_in_training
from gptcli.evaluation.tasks import Task, measure, read_task, say_how, task_metrics, task_reader
from gptcli.train import group
from gptcli.train.validation import as_evaluated

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader
    from gptcli.evaluation.loss import LossResult
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.reporting import Reporter
    from gptcli.train.plan import Plan

# Of a task, where `eval.limit` does not say: a training run is not to be a row of evaluations.
ROWS = 256


def task_of(loaded: LoadedRecipe, tokenizer: Path, reporter: Reporter) -> Task | None:
    """The task that is measured at each evaluation; None where the recipe has none, or no rows for it.

    `tokenizer`: the folder of what the model is trained with, its processor too where it reads images or sounds.

    Raises:
        MissingError, DataError: a metric's package is not installed, or a row lacks something.
    """
    wanted = task_metrics(loaded)
    if not wanted:
        return None
    limit = loaded.recipe.eval.limit
    corpus = rows_in_training(loaded, limit=ROWS if limit is None else limit)
    if corpus is None:
        reporter.say(f"eval: {', '.join(wanted)} are not measured during training, there is no eval.data")
        return None
    task = read_task(corpus, loaded, reporter, task_reader(tokenizer, loaded))
    bound = " (eval.limit takes more)" if limit is None and len(task.examples) == ROWS else ""
    reporter.say(f"eval: {', '.join(wanted)} on {len(task.examples):,} rows of {task.name}{bound}, at each evaluation")
    return task


class Tasks:
    """A task and its prompts in the tokens of the model that is trained.

    Args:
        task: what is asked.
        model: the model, whose context the prompts have to fit.
        tokenizer: its tokenizer.
        plan: the run's plan.
        reporter: where progress goes.
        together: the model is divided, so that all processes make every text.
        reader: of the prompts' images and sounds.

    Raises:
        DataError: a prompt does not fit.
    """

    def __init__(
        self,
        task: Task,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        reporter: Reporter,
        *,
        together: bool,
        reader: MediaReader | None = None,
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._precision = plan.precision
        self._reporter = reporter
        self._reader = reader
        self._share = Share(*group.part(plan.processes), together)
        self._prompts = encode(model, tokenizer, task)
        say_how(model, task, self._prompts, reporter)

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        """The metrics of the model, the same on all processes; None each where its logits are no numbers."""
        own: Answers | DivergedError
        try:
            with as_evaluated(model, self._precision):
                about = (self._task, self._prompts, self._reporter, self._share)
                own = answer(model, self._tokenizer, *about, reader=self._reader)
        except DivergedError as error:
            own = error
        every = group.gathered(own)
        try:
            return group.from_first(lambda: self._measured(every))
        except DivergedError as error:
            self._reporter.warn(f"eval: {error.what}")
            return dict.fromkeys((*self._task.of_labels, *self._task.of_texts))

    def _measured(self, every: list[Answers | DivergedError]) -> dict[str, Any]:
        good: list[Answers] = []
        for each in every:
            if isinstance(each, DivergedError):
                raise each
            good.append(each)
        return measure(self._task, merged(good))[0]


def as_line(result: LossResult | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """The evaluation in metrics.jsonl: `metrics` where there are tasks, the rest null where nothing is held out."""
    line: dict[str, Any] = dict.fromkeys(("loss", "bits_per_byte", "tokens"))
    if result is not None:
        line = {"loss": result.loss, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens}
    return line if metrics is None else {**line, "metrics": metrics}


def as_text(line: dict[str, Any]) -> str:
    """The evaluation on the screen."""
    names = {"loss": "validation loss", "bits_per_byte": "bits per byte"}
    values = {name: line[key] for key, name in names.items()} | line.get("metrics", {})
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
