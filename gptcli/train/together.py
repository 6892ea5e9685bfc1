"""A folder that the processes of a run write together: each what it owns of a divided model, rank 0 the rest.

A tensor is brought together on the process that writes it and nowhere else, so that the host's memory and the disk's
time are divided as the model is. The files hold whole tensors, as transformers reads them (torch's own distributed
checkpoints hold parts). A process that does not see the folder, on a machine without a common disk, writes nothing;
the others take its share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from gptcli.files import sha256_file, system_errors
from gptcli.launch import rank
from gptcli.train import group

Write = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
# Files that come in parts where several processes write; all others are those of rank 0.
_PARTED = ("model*.safetensors", "optimizer*.pt")
_PART = ".part-"


def write_together(
    opened: AbstractContextManager[Path],
    collect: Callable[[list[int]], Write | None],
    rest: Write,
    digests: dict[str, str] | None = None,
) -> None:
    """Write a folder by all processes; for all of them to call.

    Args:
        opened: entered by rank 0 alone: yields the folder, and commits it at its end if there was no error.
        collect: called by every process with the ranks of those that write; brings together what this one owns, and
            returns what writes it into a folder.
        rest: what rank 0 writes beside that, last.
        digests: filled on rank 0, before `opened` ends, with the sha256 of files that their writers have computed.

    Raises:
        GptcliError: of `opened`, on all processes: also where another process could not write.
    """
    with ExitStack() as stack:
        folder = group.from_first(lambda: stack.enter_context(opened))
        seen = group.gathered(folder.is_dir())
        writers = group.from_first(lambda: [number for number, sees in enumerate(seen) if sees])
        write = collect(writers)  # all that goes between processes is done before the first of them can fail to write
        several = len(writers) > 1
        part = folder / f"{_PART}{rank():05d}" if several else folder
        outcomes = group.gathered(_written(write, part, hashed=several and digests is not None))

        def end() -> None:
            with stack:
                known: dict[str, str] = {}
                for outcome in outcomes:
                    if isinstance(outcome, OSError):
                        raise outcome
                    known |= outcome
                names = _join(folder) if several else {}
                if digests is not None:
                    digests.update({names[path]: digest for path, digest in known.items()})
                rest(folder)

        group.from_first(end)


def _written(write: Write | None, folder: Path, *, hashed: bool) -> dict[str, str] | OSError:
    """Write; the sha256 of each file where they are asked for, by its path, or the system's error that this met."""
    if write is None:
        return {}
    try:
        folder.mkdir(exist_ok=True)
        with system_errors(folder):
            write(folder)
        return {str(path): sha256_file(path) for path in folder.iterdir()} if hashed else {}
    except OSError as error:
        return OSError(error.errno, error.strerror or str(error))


def _join(folder: Path) -> dict[str, str]:
    """Bring the processes' files together under the names that transformers gives to several; the name of each path."""
    parts = sorted(folder.glob(f"{_PART}*"))
    names: dict[str, str] = {}
    for pattern in _PARTED:
        found = [path for part in parts for path in sorted(part.glob(pattern))]
        stem, suffix = pattern.split("*")
        for number, path in enumerate(found, 1):
            names[str(path)] = stem + (f"-{number:05d}-of-{len(found):05d}" if len(found) > 1 else "") + suffix
    for part in parts:
        for path in list(part.iterdir()):
            path.rename(folder / names.setdefault(str(path), path.name))
        part.rmdir()
    _write_index(folder)
    return names


def _write_index(folder: Path) -> None:
    """Write transformers' index of a folder's weights, where they are several files."""
    from safetensors import safe_open

    files = sorted(folder.glob("model-*.safetensors"))
    places: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    if files:
        size = sum(path.stat().st_size for path in files)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def owners(sizes: dict[str, int], writers: Sequence[int]) -> dict[str, int]:
    """Which process writes each tensor: a layer's together, since transformers may split or join them when it saves.

    Args:
        sizes: bytes of each tensor, by its name, in the same order on all processes.
        writers: ranks of those that write.
    """
    units: dict[str, int] = {}
    for name, size in sizes.items():
        units[_unit(name)] = units.get(_unit(name), 0) + size
    filled = dict.fromkeys(writers, 0)
    owner: dict[str, int] = {}
    for unit, size in sorted(units.items(), key=lambda item: -item[1]):  # the largest first, to who has least
        owner[unit] = min(filled, key=lambda number: filled[number])
        filled[owner[unit]] += size
    return {name: owner[_unit(name)] for name in sizes}


def _unit(name: str) -> str:
    """The layer of a tensor (`model.layers.3`), or its module."""
    words = name.split(".")
    at = next((index for index, word in enumerate(words) if word.isdigit()), len(words) - 2)
    return ".".join(words[: at + 1])
