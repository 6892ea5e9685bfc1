"""The keys and values of the rows that are decoded together, in buffers with room to grow.

transformers' dynamic cache copies all that it holds for every new token. Here a token is written into a buffer that is
doubled when it is full, rows come and go without the others being moved, and columns that only finished rows used are
dropped. All rows end in the same column: a shorter one begins later, and what stands before it is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [rows, heads, columns, dim]. With a window, only the last `window - 1` are kept."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self._window = window
        self._length = 0  # columns that the mask counts; a window keeps fewer
        self._end = 0  # of the columns in the buffers
        self._buffers: tuple[torch.Tensor, torch.Tensor]

    @property
    def kept(self) -> int:
        """How many columns are kept."""
        return self._length if self._window is None else min(self._length, self._window - 1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the shapes, the dtype and the device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        room = max(LEAST_ROOM, 2 * key_states.shape[-2])
        self._buffers = (_zeros_like(key_states, room), _zeros_like(value_states, room))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [rows, heads, n, dim]; return what is kept with them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self._end + new > self._buffers[0].shape[-2]:
            self._move(0, max(LEAST_ROOM, 2 * (self.kept + new)))
        begin = self._end - self.kept
        keys, values = self._buffers
        keys.narrow(2, self._end, new).copy_(key_states)
        values.narrow(2, self._end, new).copy_(value_states)
        self._end += new
        self._length += new
        self.keys, self.values = keys.narrow(2, begin, self._end - begin), values.narrow(2, begin, self._end - begin)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the columns before the next token."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns the mask of the next tokens has, and the first one's number."""
        return self.kept + query_length, self._length - self.kept

    def trim(self, length: int) -> None:
        """Count only the last `length` columns."""
        self._length = min(self._length, length)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self._buffers = (self._buffers[0].index_select(0, rows), self._buffers[1].index_select(0, rows))

    def insert(self, rows: torch.Tensor, other: GrowingLayer, total: int) -> None:
        """Put all rows of another layer in the place of these; afterwards there are at least `total` rows."""
        if total > self._buffers[0].shape[0]:
            self._buffers = (_more_rows(self._buffers[0], total), _more_rows(self._buffers[1], total))
        columns = other.kept
        if self._end < columns:
            self._move(columns - self.kept, max(LEAST_ROOM, 2 * columns))
        for buffer, source in zip(self._buffers, other._buffers, strict=True):
            buffer[rows, :, self._end - columns : self._end] = source[:, :, other._end - columns : other._end]
        self._length = max(self._length, other._length)

    def _move(self, left: int, room: int) -> None:
        """Into new buffers of `room` columns, with `left` of them free in front."""
        kept, old = self.kept, self._buffers
        self._buffers = (_zeros_like(old[0], room), _zeros_like(old[1], room))
        for buffer, source in zip(self._buffers, old, strict=True):
            buffer[:, :, left : left + kept] = source[:, :, self._end - kept : self._end]
        self._end = left + kept


def make_cache(config: PreTrainedConfig) -> DynamicCache | None:
    """An empty cache for a model; None when some layer of it keeps anything but keys and values."""
    cache = DynamicCache(config=config)
    if getattr(config.get_text_config(decoder=True), "attention_chunk_size", None):
        return None  # such a mask depends on where a row begins
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    if cache.layers:
        cache.layers = [GrowingLayer(getattr(layer, "sliding_window", None)) for layer in cache.layers]
    else:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def used_layers(cache: Cache) -> Sequence[GrowingLayer]:
    """The layers that hold something; some models let layers share those of others."""
    return [layer for layer in cache.layers if isinstance(layer, GrowingLayer) and layer.is_initialized]


def _zeros_like(states: torch.Tensor, columns: int) -> torch.Tensor:
    """Zeros, since what is masked is multiplied by 0, and that is not 0 for what is not finite."""
    return states.new_zeros((*states.shape[:-2], columns, states.shape[-1]))


def _more_rows(buffer: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([buffer, buffer.new_zeros((rows - buffer.shape[0], *buffer.shape[1:]))])
