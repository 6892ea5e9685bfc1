"""The loss of documents of which a part is to be learnt: of their completions, or of a chat's answers.

Each document is a row by itself and as training has it: with its BOS and EOS, cut or left out as `data.overlong` says,
and scored where training would learn, the end of the text or turn included. How many bytes that stands for is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gptcli.data.packed import packing_of
from gptcli.data.packing import pieces
from gptcli.evaluation.windows import Window

if TYPE_CHECKING:
    from gptcli.data.packing import Packing
    from gptcli.data.shards import Shards
    from gptcli.recipe.schema import Recipe

READ_DOCUMENTS = 4096
Stream = Iterator[tuple[int | None, list[Window]]]


def packing_for(shards: Shards, recipe: Recipe) -> Packing | None:
    """How held-out documents are cut whose supervised part is scored; None: all of each text is (`document_loss`)."""
    return packing_of(recipe, media=shards.has_media) if shards.has_supervision else None


def supervised_windows(shards: Shards, packing: Packing) -> Stream:
    """What `evaluation.loss.loss_of` scores: the windows of each document, in order; memory is some documents."""
    number = 0
    for source, stream in enumerate(shards.streams):
        offsets = shards.document_offsets(source)
        for first in range(0, len(offsets) - 1, READ_DOCUMENTS):
            ends = np.asarray(offsets[first : first + READ_DOCUMENTS + 1], dtype=np.int64)
            begins, lengths, _ = pieces(ends, packing.sequence_length, packing.overlong)
            homes = np.searchsorted(ends, begins, side="right") - 1
            firsts = np.searchsorted(homes, np.arange(len(ends)))
            for document in range(len(ends) - 1):
                windows, before = [], 0
                for piece in range(int(firsts[document]), int(firsts[document + 1])):
                    begin, end = int(begins[piece]), int(begins[piece] + lengths[piece])
                    ids = stream.read(begin, end).astype(np.int64)
                    if packing.every_label:
                        wanted = np.ones(len(ids) - 1, dtype=np.bool_)
                    else:
                        wanted = stream.read_supervised(begin + 1, end)
                    if scored := int(wanted.sum()):
                        media = shards.media(source, begins[piece : piece + 1])[0] if shards.has_media else []
                        windows.append(Window(number, ids, scored, wanted, before, tuple(media)))
                        before += scored
                yield None, windows
                number += 1
