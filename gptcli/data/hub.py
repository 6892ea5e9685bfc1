"""Data sets of the Hugging Face Hub, streamed row by row by `datasets`, at one commit.

The commit is looked up once a run and remembered, so that the key of prepared data is content and a run without a
network still finds what it prepared before.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptcli.data.contents import remember_revision, remembered_revision
from gptcli.data.readers import BadRow, Layout, Rows, value_row
from gptcli.data.reading.columnar import plain_values
from gptcli.data.reading.row import whole_row
from gptcli.errors import DataError, MissingError

if TYPE_CHECKING:
    from gptcli.recipe.schema import Source

PREFIX = "hub:"


@dataclass(frozen=True)
class HubSet:
    """One split of a Hub data set at one commit, or one of its files: `shard` is (which, of how many)."""

    name: str
    config: str | None
    split: str
    commit: str
    shard: tuple[int, int] | None = None


def find(source: Source, *, where: str | None = None) -> HubSet:
    """The set that a source names, with its present commit.

    Raises `DataError` when the Hub does not have it and `MissingError` when the Hub cannot be reached and the commit is
    not known from an earlier run.
    """
    name = str(source.path).removeprefix(PREFIX)
    revision = source.revision or "main"
    commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else _commit(name, revision, where)
    return HubSet(name, source.config, source.split or "train", commit)


def divide(hub_set: HubSet, *, where: str | None = None) -> list[HubSet]:
    """A set as its files, one after the other."""
    count = int(getattr(_open(hub_set, where), "num_shards", 1))
    return [replace(hub_set, shard=(number, count)) for number in range(count)] if count > 1 else [hub_set]


def rows(hub_set: HubSet, layout: Layout, *, where: str | None = None) -> Rows:
    """The texts of a set (or its whole rows), in the set's order, one row at a time."""
    column = layout.text
    for number, values in enumerate(_stream(hub_set, where), start=1):
        if layout.whole:
            yield whole_row(number, plain_values(values))
        elif column not in values:
            reason = f"has no column {column!r}, only {', '.join(map(repr, values))}"
            yield BadRow(number, "wrong columns", reason)
        else:
            yield value_row(number, values[column], column)


def _stream(hub_set: HubSet, where: str | None) -> Iterator[dict[str, Any]]:
    stream = _open(hub_set, where)
    if hub_set.shard is not None:
        number, count = hub_set.shard
        stream = stream.shard(num_shards=count, index=number)
    with _understood(hub_set, where):
        yield from stream


def _open(hub_set: HubSet, where: str | None) -> Any:
    import datasets

    with _understood(hub_set, where):
        return datasets.load_dataset(
            hub_set.name, name=hub_set.config, split=hub_set.split, revision=hub_set.commit, streaming=True
        )


@contextlib.contextmanager
def _understood(hub_set: HubSet, where: str | None) -> Iterator[None]:
    """Turn the errors of `datasets` into ours."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:  # a wrong config or split, or a set without data files
        raise DataError(
            f"hub:{hub_set.name} cannot be read: {_first_line(error)}",
            where=where,
            remedy="Check the set's page on the Hub for its configurations (config:) and its splits (split:).",
        ) from None
    except (ConnectionError, OSError) as error:
        raise _unreachable(hub_set.name, error, where) from None


def _commit(name: str, revision: str, where: str | None) -> str:
    known = f"{name}@{revision}"
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise MissingError(
            f"hub: sources need the package {error.name}", where=where, remedy="pip install datasets"
        ) from None
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        commit = HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise DataError(
            f"the Hub has no data set {name!r} with revision {revision!r} ({_first_line(error)})",
            where=where,
            remedy="Check the spelling: hub:OWNER/NAME. A private or gated set needs `hf auth login`.",
        ) from None
    except Exception as error:  # every HTTP library has its own errors for a network that is not there
        if (commit := remembered_revision(known)) is None:
            raise _unreachable(name, error, where) from None
        return commit
    if commit is None:
        raise DataError(f"the Hub names no commit for {name!r}", where=where)
    remember_revision(known, commit)
    return commit


def _unreachable(name: str, error: Exception, where: str | None) -> MissingError:
    return MissingError(
        f"the Hub cannot be reached for the data set {name!r} ({_first_line(error)})",
        where=where,
        remedy="Connect to the network, or download the files on another machine and give their folder as path:.",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200]
