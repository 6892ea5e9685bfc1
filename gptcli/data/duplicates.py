"""Which documents have a text that another had before, from 16 bytes a document.

The digests lie in files and are looked at in as many passes as bound the memory: a bit more than one byte a document,
and some 200 MB for the part that is sorted. Equal digests of 128 bits are taken for equal texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SORTED_AT_ONCE = 4_000_000


def repeated(files: Sequence[Path]) -> list[NDArray[np.bool_]]:
    """For each file of digests (uint8, [documents, 16]): whether a document's text stood before, over all files."""
    digests = [np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 20 else None) for path in files]
    counts = [len(part) for part in digests]
    total = sum(counts)
    found = np.zeros(total, dtype=np.bool_)
    passes = 1 << max(0, (total // SORTED_AT_ONCE).bit_length())
    starts = np.cumsum([0, *counts])
    for number in range(passes):
        rows, indices = [], []
        for part, start in zip(digests, starts.tolist(), strict=False):
            # The last two bytes choose the pass: the first ones choose the side and the sample.
            last = np.ascontiguousarray(part[:, 14:]).view(np.uint16)[:, 0].astype(np.int64)
            chosen = np.flatnonzero(last % passes == number) if passes > 1 else np.arange(len(part))
            rows.append(np.ascontiguousarray(part[chosen]).view(np.uint64))
            indices.append(chosen + start)
        keys = np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.uint64)
        index = np.concatenate(indices) if indices else np.empty(0, dtype=np.int64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of the documents
        same = np.all(keys[order[1:]] == keys[order[:-1]], axis=1)
        found[index[order[1:][same]]] = True
    return np.split(found, starts[1:-1]) if counts else []
