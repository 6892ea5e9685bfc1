"""Shards written as a job writes them, from documents that a test gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.data.encode import Encoded
from gptcli.data.shards import write_manifest
from gptcli.data.writer import ShardWriter


def write_side(
    folder: Path,
    dtype: np.dtype[Any],
    shard_tokens: int,
    sources: Sequence[tuple[str, Sequence[Encoded]]],
    **about: Any,
) -> None:
    """Write (name, batches) of each source, then the manifest; with supervision where the batches have it."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (name, batches) in enumerate(sources):
        supervised = any(batch.supervised is not None for batch in batches)
        with ShardWriter(folder, f"source-{number:03}-shard", dtype, shard_tokens, supervised=supervised) as writer:
            for batch in batches:
                writer.add(batch)
        listed.append({"name": name, **writer.written})
    write_manifest(folder, listed, dtype, **about)
