"""Late fusion: several models answer the same rows or score the same texts, and the mean of their probabilities counts.

Each model is asked by itself, one after the other, so that they need not be alike: what comes together is the
probability of each label, or that of each token that stands in a text. The mean is the linear opinion pool (Stone 1961,
The Opinion Pool). Memory: the scores of labels; of texts 16 bytes a document, and 4 bytes a token in a temporary file,
which up to 64 MiB is in memory.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import UsageError, writing
from gptcli.evaluation.answers import Answers, label_scores
from gptcli.evaluation.classify import over_labels
from gptcli.evaluation.corpus import decides_ids
from gptcli.evaluation.loss import Forward, Watch, token_nats
from gptcli.evaluation.tasks import TaskResult, result_of
from gptcli.model.load import tokenizer_home

if TYPE_CHECKING:
    import torch

    from gptcli.evaluation.curves import Collecting
    from gptcli.evaluation.evaluate import Evaluation
    from gptcli.evaluation.scores import Sizes
    from gptcli.evaluation.windows import Window
    from gptcli.reporting import Reporter

IN_MEMORY = 64 << 20
LogProbs = NDArray[np.float64]


def fused_name(models: Sequence[str]) -> str:
    """What the models together are called."""
    return f"mean of {', '.join(models)}"


def mean_over_labels(scores: Sequence[LogProbs]) -> LogProbs:
    """Log of the mean over models of each label's probability, [rows, labels], of the models' scores of the labels.

    Probabilities are those over the labels alone, so that models count alike whatever else they find likely.
    """
    together: LogProbs = np.logaddexp.reduce([over_labels(each) for each in scores])
    return together - math.log(len(scores))


def fuse_labels(results: Sequence[TaskResult], reporter: Reporter, predictions: Path | None = None) -> TaskResult:
    """The models' answers to the same rows as those of one; `predictions`: a file for them, a line of JSON a row.

    Raises:
        UsageError: the models were not asked for labels of the same rows.
        CheckpointError: the answers cannot be written.
    """
    first = results[0].task
    scores = []
    for each in results:
        task, answers = each.task, each.answers
        if task is None or answers is None or answers.scores is None:
            raise UsageError(f"{each.model} gives labels no probabilities, so there is nothing to take the mean of")
        assert first is not None
        right = [(example.where, example.references) for example in task.examples]
        if task.labels != first.labels or right != [(one.where, one.references) for one in first.examples]:
            raise UsageError(f"{each.model} was not asked for the same labels of the same rows as {results[0].model}")
        scores.append(label_scores(answers, task))
    assert first is not None
    how = f"mean of probabilities by {first.label_scores}"
    found = Answers(mean_over_labels(scores), None, (), False, {})
    name = fused_name([each.model for each in results])
    return result_of(name, replace(first, label_scores=how), found, reporter, predictions)


def check_tokenizers(folders: Sequence[Path]) -> None:
    """Raise `UsageError` where models cut a text into other tokens than the first: there is no mean of these."""
    first, *others = [decides_ids(_tokenizer(folder)) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        if other != first:
            raise UsageError(
                f"the tokenizer of {folder} is not that of {folders[0]}, and there is no mean of the probabilities of "
                "different tokens",
                remedy="Fuse the loss of models with one tokenizer. Labels (eval.labels) can be fused whatever the "
                "tokenizers: leave perplexity out of eval.metrics.",
            )


def _tokenizer(folder: Path) -> Path:
    home, revision = tokenizer_home(folder)
    return import_tokenizer(str(home), revision=revision)


class MeanOfTokens:
    """Takes the probabilities of the tokens of the same documents together, of so many models one after the other.

    Each scores them with a `watch` of its own; windows may differ, as each token has its place in the documents.
    """

    def __init__(self, models: int) -> None:
        self._models = models
        self._begun = 0
        self._starts = array("Q", [0])
        self._sums = np.zeros(0)
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115

    def close(self) -> None:
        """Give the file up."""
        self._file.close()

    def watch(self, sizes: Sizes, inner: Collecting | None) -> Watch:
        """What the next model scores documents with; `sizes` are those of what it reads, `inner` sees them as well."""
        self._begun += 1
        if self._begun == self._models:
            self._sums = np.zeros(len(self._starts) - 1)
        return _Watched(self, sizes, inner)

    def add(self, window: Window, nats: LogProbs, lengths: Sequence[int]) -> None:
        """Take in what the model that is being scored makes of the tokens of a window.

        Raises:
            UsageError: the document has not the tokens that the models before saw.
            CheckpointError: the file cannot be written.
        """
        at = 4 * (self._start(window.document, lengths) + window.first)
        together = -nats
        with writing(Path(tempfile.gettempdir()), "the probabilities of tokens", "The folder is that of TMPDIR."):
            if self._begun > 1:
                self._file.seek(at)
                before = np.frombuffer(self._file.read(4 * len(nats)), np.float32)
                with np.errstate(invalid="ignore"):  # of a model whose logits are no numbers
                    together = np.logaddexp(before, together)
            if self._begun < self._models:
                self._file.seek(at)
                self._file.write(together.astype(np.float32).tobytes())
            else:
                self._sums[window.document] += float((math.log(self._models) - together).sum())

    def _start(self, document: int, lengths: Sequence[int]) -> int:
        """The number of the document's first token among all that are scored."""
        starts = self._starts
        if self._begun == 1:
            while len(starts) < document + 2:
                starts.append(starts[-1] + lengths[len(starts) - 1])
        if len(starts) < document + 2 or starts[document + 1] - starts[document] != lengths[document]:
            raise _other_tokens()
        return starts[document]

    def nats(self, documents: int) -> LogProbs:
        """The summed nats of each document under the mean of all models."""
        return np.concatenate((self._sums, np.zeros(documents - len(self._sums))))  # the last ones have no tokens


class _Watched:
    """The `Watch` of one model."""

    def __init__(self, mean: MeanOfTokens, sizes: Sizes, inner: Collecting | None) -> None:
        self._mean = mean
        self._sizes = sizes
        self._inner = inner

    def score(self, forward: Forward, batch: list[Window], device: torch.device, pad_id: int) -> list[Any]:
        """The nats of each token, or what the inner one has of it."""
        return (token_nats if self._inner is None else self._inner.score)(forward, batch, device, pad_id)

    def take(self, window: Window, scored: Any) -> float:
        """Add a window; returns its nats."""
        nats = scored if self._inner is None else scored.nats
        self._mean.add(window, nats, self._sizes.lengths)
        return float(nats.sum()) if self._inner is None else self._inner.take(window, scored)


def fuse_losses(results: Sequence[Evaluation], mean: MeanOfTokens) -> Evaluation:
    """The loss of the mean of models that were scored with the watches of `mean`; without curves.

    Raises:
        UsageError: they were not scored on the same tokens.
    """
    first, *others = results
    if not all(np.array_equal(first.scores.tokens, other.scores.tokens) for other in others):
        raise _other_tokens()
    scores = replace(first.scores, nats=mean.nats(first.result.documents))
    return replace(first, model=fused_name([each.model for each in results]), scores=scores, curves=None)


def _other_tokens() -> UsageError:
    return UsageError(
        "the models were not scored on the same tokens, so there is no mean of their probabilities",
        remedy="Rows that are longer than a model's window are cut: give one --sequence-length that all models have.",
    )
