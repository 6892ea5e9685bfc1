"""Rows that are decoded together, while others wait for their place.

Prompts are read several at a time, and every step then makes one token of each row. A row that is done leaves at once
and the next one that waits takes its place, so that no step works for rows that have ended (Yu et al. 2022, "Orca").
What a row's text is depends on that row alone but for rounding: a product of more rows may be rounded differently in
the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from gptcli.generation.cache import make_cache, used_layers
from gptcli.generation.media_prompt import media_inputs, media_of

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from gptcli.data.media.reader import MediaReader
    from gptcli.generation.row import Row

# Of prompts that are read at once: enough to fill the cores, little enough to take no more memory than the rows do.
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class Budget:
    """How much is decoded together: rows, and tokens of their prompts and texts at full length."""

    rows: int = 32
    tokens: int = 65_536


def decode(
    model: PreTrainedModel,
    rows: Iterable[Row],
    choose: Callable[[torch.Tensor, Sequence[Row]], object],
    budget: Budget | None = None,
    *,
    reader: MediaReader | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> None:
    """Make tokens until every row is done; rows that follow each other are decoded together, as the budget allows.

    Args:
        model: one that `decodable` allows.
        rows: in the order in which they begin.
        choose: pushes a token to each of the rows it gets, whose logits [rows, vocabulary] it gets too.
        budget: its tokens are passed only by a single row that is longer.
        reader: of the prompts' images and sounds, where they have some.
        on_tokens: gets the number of tokens of each step.
    """
    budget = budget or Budget()
    waiting = deque(rows)
    batch = _Batch(model, reader)
    while waiting or batch.active:
        chosen = _next(waiting, batch.active, budget)
        logits = batch.admit(chosen) if chosen else batch.step()
        chosen = chosen or batch.active
        choose(logits, chosen)
        if on_tokens is not None:
            on_tokens(len(chosen))
        batch.release_done(shrink=not waiting)


def decodable(model: PreTrainedModel) -> bool:
    """Whether a model's past is keys and values that `decode` knows how to keep."""
    names = signature(model.forward).parameters
    return "past_key_values" in names and make_cache(model.config) is not None


def pads_well(model: PreTrainedModel, *, vocabulary: int) -> bool:
    """Whether rows of different lengths can be decoded together: tried, since a model's code may count columns.

    A short row beside a longer one, and after that one has left, must get the logits that it gets alone.
    """
    from gptcli.model.load import evaluating

    ids = torch.arange(17) * 7919 % max(1, vocabulary)
    long, short = ids[:11].tolist(), ids[11:15].tolist()
    together, alone = _Batch(model), _Batch(model)
    with torch.no_grad(), evaluating(model):
        pairs = [(together.prefill([long, short])[1], alone.prefill([short])[0])]
        for next_id in ids[15:].tolist():
            pairs.append((together.forward([next_id] * together.size)[-1], alone.forward([next_id])[0]))
            together.keep([together.size - 1])
    return all(_near(one, other) for one, other in pairs)


def media_pad_well(model: PreTrainedModel, reader: MediaReader, prompts: Sequence[list[int]]) -> bool:
    """Whether prompts with images and sounds can be decoded together: tried with the longest and shortest of them.

    Each must get the logits that it gets alone; models lay out the media of several rows in their own ways.
    """
    from gptcli.model.load import evaluating

    by_length = sorted(prompts, key=len)
    seeing = [prompt for prompt in by_length if media_of(prompt)]
    tried = list({id(each): each for each in (by_length[-1], seeing[-1], seeing[0], by_length[0])}.values())
    together, alone = _Batch(model, reader), [_Batch(model, reader) for _ in tried]
    with torch.no_grad(), evaluating(model):
        pairs = [*zip(together.prefill(tried), map(_first_logits, alone, tried), strict=True)]
        pairs += zip(together.forward([0] * len(tried)), (one.forward([0])[0] for one in alone), strict=True)
    return all(_near(one, other) for one, other in pairs)


def _first_logits(batch: _Batch, prompt: list[int]) -> torch.Tensor:
    return batch.prefill([prompt])[0]


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits are equal but for rounding in their dtype."""
    allowed = 1e-4 if one.dtype == torch.float32 else 0.1
    spread = other.float().std().clamp(min=1e-6)
    return bool(((one.float() - other.float()).abs().max() <= allowed * spread).item())


def _next(waiting: deque[Row], active: Sequence[Row], budget: Budget) -> list[Row]:
    """Take from the rows that wait those that begin now: none until an eighth of the places is free."""
    free = budget.rows - len(active)
    if not waiting or (active and free < max(1, budget.rows // 8)):
        return []
    new: list[Row] = []
    longest = max((_full(row) for row in active), default=0)
    reading = 0
    while waiting and len(new) < free:
        row = waiting[0]
        longest = max(longest, _full(row))
        if (active or new) and longest * (len(active) + len(new) + 1) > budget.tokens:
            break
        if not new or row.prompt is not new[-1].prompt:
            reading += len(row.prompt)
            if new and reading > PREFILL_TOKENS:
                break
        new.append(waiting.popleft())
    return new


def _full(row: Row) -> int:
    return len(row.prompt) + row.most


class _Batch:
    """The rows that are decoded now and the cache that they share: row i of the cache is that of `_rows[i]`.

    The place of a row that left is None until another row takes it; what is computed there is masked and thrown away.
    """

    def __init__(self, model: PreTrainedModel, reader: MediaReader | None = None) -> None:
        self._model: Any = model
        self._reader = reader
        self._names = frozenset(signature(model.forward).parameters)
        self._cache: DynamicCache = self._new_cache()
        self._lengths: list[int] = []  # tokens of each place in the cache
        self._rows: list[Row | None] = []

    @property
    def size(self) -> int:
        return len(self._lengths)

    @property
    def active(self) -> list[Row]:
        return [row for row in self._rows if row is not None]

    def admit(self, new: list[Row]) -> torch.Tensor:
        """Read the prompts of rows; the logits of their first tokens, [new rows, vocabulary]."""
        prompts = [list(rows) for _, rows in groupby(new, key=lambda row: id(row.prompt))]
        which = [index for index, rows in enumerate(prompts) for _ in rows]
        other = _Batch(self._model, self._reader) if self.active else self
        logits = other.prefill([rows[0].prompt for rows in prompts])
        if len(which) > len(prompts):
            other.keep(which)
            logits = logits[which]
        if other is self:
            self._rows = [*new]
        else:
            self._insert(other, new)
        return logits

    def step(self) -> torch.Tensor:
        """The logits of the next token of each active row, [rows, vocabulary]."""
        taken = [index for index, row in enumerate(self._rows) if row is not None]
        logits = self.forward([0 if row is None else row.tokens[-1] for row in self._rows])
        return logits if len(taken) == self.size else logits[taken]

    def release_done(self, *, shrink: bool) -> None:
        """Free the places of rows that are done; give a quarter of the places up when nobody will take them."""
        self._rows = [None if row is None or row.done else row for row in self._rows]
        taken = [index for index, row in enumerate(self._rows) if row is not None]
        if len(taken) == self.size:
            return
        if not taken or (shrink and len(taken) <= self.size * 3 // 4):
            self.keep(taken)
            self._rows = [self._rows[index] for index in taken]
        self._lengths = [0 if row is None else length for row, length in zip(self._rows, self._lengths, strict=True)]
        for layer in used_layers(self._cache):
            layer.trim(max(self._lengths, default=0))

    def prefill(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Read prompts into the empty cache; the logits after each, [prompts, vocabulary]."""
        device, longest = self._model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        self._lengths = [len(prompt) for prompt in prompts]
        more: dict[str, Any] = {}
        if "position_ids" in self._names:
            more["position_ids"] = (self._columns(longest) - self._pads(longest)).clamp(min=0)
        if self._reader is not None and (media := media_inputs(self._model, self._reader, prompts, ids)):
            more |= media
            if "attention_mask" in self._names:  # some ask for it where a sound is one token (qwen2_audio)
                more["attention_mask"] = torch.ones_like(ids)
        return self._run(ids, longest, more)

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """One more token of each row; the logits after it, [rows, vocabulary]."""
        device = self._model.device
        more: dict[str, Any] = {}
        if "position_ids" in self._names:
            more["position_ids"] = torch.tensor(self._lengths, device=device).unsqueeze(1)
        self._lengths = [length + 1 for length in self._lengths]
        return self._run(torch.tensor(tokens, device=device).unsqueeze(1), max(self._lengths), more)

    def keep(self, indices: list[int]) -> None:
        """Keep these places of the cache, in this order; one may be named several times."""
        self._lengths = [self._lengths[index] for index in indices]
        if not indices:
            self._cache = self._new_cache()
            return
        chosen = torch.tensor(indices, device=self._model.device)
        for layer in used_layers(self._cache):
            layer.select(chosen)
            layer.trim(max(self._lengths))

    def _insert(self, other: _Batch, new: list[Row]) -> None:
        free = [index for index, row in enumerate(self._rows) if row is None]
        places = [*free, *range(self.size, self.size + len(new))][: len(new)]
        total = max(self.size, places[-1] + 1)
        where = torch.tensor(places, device=self._model.device)
        for layer, source in zip(used_layers(self._cache), used_layers(other._cache), strict=True):
            layer.insert(where, source, total)
        self._rows += [None] * (total - self.size)
        self._lengths += [0] * (total - self.size)
        for place, row, length in zip(places, new, other._lengths, strict=True):
            self._rows[place], self._lengths[place] = row, length

    def _run(self, ids: torch.Tensor, columns: int, more: dict[str, Any]) -> torch.Tensor:
        if "attention_mask" in self._names and min(self._lengths) < columns:
            more["attention_mask"] = (self._columns(columns) >= self._pads(columns)).long()
        if "logits_to_keep" in self._names:
            more["logits_to_keep"] = 1
        logits: torch.Tensor = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **more).logits
        return logits[:, -1]

    def _columns(self, columns: int) -> torch.Tensor:
        return torch.arange(columns, device=self._model.device)

    def _pads(self, columns: int) -> torch.Tensor:
        return columns - torch.tensor(self._lengths, device=self._model.device).unsqueeze(1)

    def _new_cache(self) -> DynamicCache:
        cache = make_cache(self._model.config)
        if cache is None:
            raise ValueError("this model keeps more than keys and values")
        return cache
