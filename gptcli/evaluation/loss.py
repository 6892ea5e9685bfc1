"""The loss of a causal language model over documents: validation during training and `gptcli eval` are this function.

Each document is prefixed with one token that is never scored, then every token of it is scored once, in windows of
`sequence_length` inputs that move by `stride`. Memory: one buffer of windows and one block of logits (64 MiB), whatever
the size of the data; logits of a whole batch are never kept where the model's head can be applied piece by piece.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.reader import changed
from gptcli.device import keep_freed_memory
from gptcli.evaluation.windows import Document, Window, batches, padded, padded_ids, shared, windows_of
from gptcli.launch import world_size
from gptcli.model.load import evaluating
from gptcli.reporting import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gptcli.data.media.reader import MediaReader

LOGIT_BYTES = 64 << 20
BATCH_LOGIT_BYTES = 512 << 20
PROBE_TOKENS = 4
# On a CPU a batch of more leaves the cache, however many threads there are; two threads with a batch each wait for each
# other less than two that share every operation.
CPU_BATCH_TOKENS = 1024

# Inputs [rows, length] and the mask of the positions to score -> their logits in blocks of [positions, vocabulary].
Forward = Callable[["torch.Tensor", "torch.Tensor"], Iterator["torch.Tensor"]]
# The same with what else the model takes of the rows: their images and sounds.
FullForward = Callable[["torch.Tensor", "torch.Tensor", dict[str, "torch.Tensor"]], Iterator["torch.Tensor"]]
# (forward, batch, device, pad id) -> something for each window of the batch.
Scored = TypeVar("Scored")
Score = Callable[[Forward, "list[Window]", "torch.device", int], "list[Scored]"]


@dataclass(frozen=True)
class LossResult:
    """Summed natural-log loss and what it was summed over; `bytes` is None when a document's are unknown."""

    nats: float
    tokens: int
    bytes: int | None
    documents: int

    @property
    def loss(self) -> float:
        """Mean nats a scored token; NaN when nothing was scored."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Summed nats / ln 2 / UTF-8 bytes of the documents."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


class Watch(Protocol):
    """Looks closer while documents are scored: `score` in place of summing, and `take`, which gives a window's nats."""

    def score(self, forward: Forward, batch: list[Window], device: torch.device, pad_id: int) -> list[Any]:
        """Something for each window; called in several threads."""

    def take(self, window: Window, scored: Any) -> float:
        """The summed nats of what `score` made of a window; called in one thread, in the same order each time."""


def document_loss(
    model: PreTrainedModel,
    documents: Iterable[Document],
    *,
    prefix_id: int,
    sequence_length: int,
    stride: int | None = None,
    batch_tokens: int = 8192,
    part: tuple[int, int] = (0, 1),
    on_progress: Callable[[int], None] | None = None,
    per_document: array[float] | None = None,
    watch: Watch | None = None,
) -> LossResult:
    """Score documents, each an array of token ids without BOS and EOS and its size in UTF-8 bytes.

    `part` = (i, n): every n-th batch from the i-th (from 0) is scored, so that n processes share the work; each counts
    all documents and bytes, and the nats and scored tokens of its own windows. All of them run as many batches.

    The result does not depend on `batch_tokens` (the most inputs in one forward pass, at least one window). The model's
    train or eval mode is left as it was, and random state is not touched. `on_progress` gets the tokens scored so far,
    and an empty array `per_document` the summed nats of each document (of the windows of this part). `watch` sees every
    token, at the cost of some more work on each block of logits.

    Raises:
        UsageError: `sequence_length` or `stride` make no sense.
        DataError: a token id is outside the model's vocabulary.
    """
    stream = windows_of(documents, prefix_id, sequence_length, stride, _vocabulary(model))
    return loss_of(
        model,
        stream,
        pad_id=prefix_id,
        batch_tokens=batch_tokens,
        part=part,
        on_progress=on_progress,
        per_document=per_document,
        watch=watch,
    )


def loss_of(
    model: PreTrainedModel,
    stream: Iterable[tuple[int | None, Iterable[Window]]],
    *,
    pad_id: int,
    batch_tokens: int = 8192,
    part: tuple[int, int] = (0, 1),
    on_progress: Callable[[int], None] | None = None,
    per_document: array[float] | None = None,
    watch: Watch | None = None,
    reader: MediaReader | None = None,
) -> LossResult:
    """The loss over windows, which come with the bytes of each document; all else as for `document_loss`.

    `reader`: of the windows' images and sounds, for a model that takes some.
    """
    tally = _Tally(per_document)
    windows = tally.count(stream)
    nats, tokens = 0.0, 0
    with scoring(model):
        how: dict[str, Any] = {"pad_id": pad_id, "batch_tokens": batch_tokens, "part": part, "reader": reader}
        batches = score_windows(model, windows, watch=watch, **how)
        for batch, sums in batches:
            nats += math.fsum(sums)
            tokens += sum(window.scored for window in batch)
            if per_document is not None:
                for window, value in zip(batch, sums, strict=True):
                    per_document[window.document] += value
            if on_progress is not None:
                on_progress(tokens)
    return LossResult(nats=nats, tokens=tokens, bytes=tally.bytes, documents=tally.documents)


class _Tally:
    """Counts documents and bytes while windows stream by, with a 0 in `sums` for each document."""

    documents = 0
    bytes: int | None = 0

    def __init__(self, sums: array[float] | None) -> None:
        self.sums = sums

    def count(self, stream: Iterable[tuple[int | None, Iterable[Window]]]) -> Iterator[Window]:
        for size, windows in stream:
            self.documents += 1
            if self.sums is not None:
                self.sums.append(0.0)
            self.bytes = None if size is None or self.bytes is None else self.bytes + size
            yield from windows


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """What `score_windows` runs in: evaluation mode, no gradients, nothing of transformers on the screen."""
    import torch

    # Not inference_mode: what a model caches in it (rotary tables) could not be used by the training that goes on.
    with torch.no_grad(), evaluating(model), quiet():
        yield


def score_windows(
    model: PreTrainedModel,
    windows: Iterable[Window],
    *,
    pad_id: int,
    batch_tokens: int = 8192,
    part: tuple[int, int] = (0, 1),
    watch: Watch | None = None,
    reader: MediaReader | None = None,
) -> Iterator[tuple[list[Window], list[float]]]:
    """Score windows in batches of like length; yields each batch with its windows' summed nats (float64).

    More in `each_batch`.
    """
    how: dict[str, Any] = {"pad_id": pad_id, "batch_tokens": batch_tokens, "part": part, "reader": reader}
    if watch is None:
        yield from each_batch(model, windows, _score, **how)
        return
    for batch, scored in each_batch(model, windows, watch.score, **how):
        yield batch, [watch.take(window, each) for window, each in zip(batch, scored, strict=True)]


def each_batch(
    model: PreTrainedModel,
    windows: Iterable[Window],
    score: Score[Scored],
    *,
    pad_id: int,
    batch_tokens: int = 8192,
    part: tuple[int, int] = (0, 1),
    reader: MediaReader | None = None,
) -> Iterator[tuple[list[Window], list[Scored]]]:
    """Give windows to `score` in batches of like length; yields each batch with what it gave for each window.

    Rows are padded on the right, where a causal model cannot see it. The order of windows is not kept. `part`: as for
    `document_loss`. Use it inside `scoring`.
    """
    import torch

    forward = None
    threads = torch.get_num_threads()
    if model.device.type == "cpu":
        keep_freed_memory()
        batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS)
    limit = _batch_limit(model, batch_tokens)
    if reader is not None and reader.crossed:  # one by one, see `MediaReader.inputs`
        limit = 1

    def scored_by(forward: FullForward, batch: list[Window]) -> list[Scored]:
        more: dict[str, torch.Tensor] = {}
        if reader is not None:
            inputs = torch.from_numpy(padded_ids(batch, pad_id))
            try:
                made = reader.inputs([window.media for window in batch], inputs) | reader.beside(inputs)
            except MediaFault as fault:
                raise changed(fault, f"of document {batch[0].document} or one beside it") from None
            more = {name: _as_weights(values, model) for name, values in made.items()}
        return score(lambda inputs, mask: forward(inputs, mask, more), batch, model.device, pad_id)

    # The passes of a model that is divided over processes have to come in the same order on all of them.
    if model.device.type != "cpu" or threads < 2 or world_size() > 1:
        for batch, counts in shared(batches(windows, limit), *part):
            forward = forward or _choose_forward(model, pad_id)
            scored = scored_by(forward, batch)
            if counts:
                yield batch, scored
        return
    running: deque[tuple[list[Window], Future[list[Scored]]]] = deque()
    with ThreadPoolExecutor(2, "scoring", initializer=torch.set_num_threads, initargs=(threads // 2,)) as pool:
        for batch, counts in shared(batches(windows, limit), *part):
            forward = forward or _choose_forward(model, pad_id)
            if not counts:
                continue
            running.append((batch, pool.submit(scored_by, forward, batch)))
            if len(running) > 2:
                done, sums = running.popleft()
                yield done, sums.result()
        for done, sums in running:
            yield done, sums.result()


def _as_weights(values: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """What a model takes beside ids, on its device and in its precision."""
    return values.to(model.device, model.dtype if values.is_floating_point() else values.dtype)


def _batch_limit(model: PreTrainedModel, batch_tokens: int) -> int:
    """Inputs a batch: `batch_tokens`, or fewer where a batch's whole logits might be made."""
    vocabulary = _vocabulary(model) or 1
    return max(1, min(batch_tokens, BATCH_LOGIT_BYTES // (4 * vocabulary)))


def _score(forward: Forward, batch: list[Window], device: torch.device, pad_id: int) -> list[float]:
    import torch

    nats, rows = _nats(forward, batch, device, pad_id)
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows, nats)
    return [float(value) for value in sums]


def token_nats(forward: Forward, batch: list[Window], device: torch.device, pad_id: int) -> list[NDArray[np.float64]]:
    """The nats of each scored token of each window, in order: a `Score`."""
    nats, _ = _nats(forward, batch, device, pad_id)
    return np.split(nats.numpy(), np.cumsum([window.scored for window in batch])[:-1])


def _nats(
    forward: Forward, batch: list[Window], device: torch.device, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nats of the scored tokens of a batch, window after window, and the number of each one's window."""
    import torch
    from torch.nn.functional import cross_entropy

    inputs, targets, mask = padded(batch, pad_id)
    labels = targets[mask].to(device)
    nats, done = [], 0
    with torch.no_grad():  # which belongs to a thread
        for logits in forward(inputs.to(device), mask.to(device)):
            piece = labels[done : done + len(logits)]
            nats.append(cross_entropy(logits.float(), piece, reduction="none").cpu().double())
            done += len(logits)
    return torch.cat(nats), mask.nonzero()[:, 0]


def _choose_forward(model: PreTrainedModel, token: int) -> FullForward:
    """The way to the logits: the head on blocks of hidden states where that gives the model's own logits exactly.

    Some models scale or cap what their head returns. Whether this one does is not looked up but tried, on a few tokens,
    bit for bit; such a model makes its own logits for the whole batch (`_batch_limit` bounds them).
    """
    import torch

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ids = torch.full((1, PROBE_TOKENS), token, device=model.device)
    body = model.base_model
    if head is not None and body is not model:
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is not None and hidden.shape[-1] == getattr(head, "in_features", None):
            found = head(hidden)
            if found.shape == expected.shape and torch.equal(found, expected):
                return partial(_through_head, body, head)
    return partial(_through_model, model)


def _through_head(
    body: torch.nn.Module,
    head: torch.nn.Module,
    inputs: torch.Tensor,
    mask: torch.Tensor,
    more: dict[str, torch.Tensor],
) -> Iterator[torch.Tensor]:
    hidden = body(input_ids=inputs, use_cache=False, **more).last_hidden_state[mask]
    for piece in hidden.split(_block(int(head.out_features))):  # type: ignore[arg-type]
        yield head(piece)


def _through_model(
    model: PreTrainedModel, inputs: torch.Tensor, mask: torch.Tensor, more: dict[str, torch.Tensor]
) -> Iterator[torch.Tensor]:
    logits = model(input_ids=inputs, use_cache=False, **more).logits
    block = _block(logits.shape[-1])
    for row, wanted in zip(logits, mask, strict=True):
        for piece, chosen in zip(row.split(block), wanted.split(block), strict=True):
            yield piece[chosen]


def _block(vocabulary: int) -> int:
    return max(1, LOGIT_BYTES // (4 * vocabulary))


def _vocabulary(model: PreTrainedModel) -> int | None:
    embeddings = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None
