"""The files that a source names: a path, a glob, or a folder, in their sorted order."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gptcli.data.readers import is_readable, readable_suffixes, shown
from gptcli.errors import DataError


def find_files(pattern: str, *, split: str | None = None, where: str | None = None) -> list[str]:
    """The names of the files of a path, a glob (`**` too) or a folder (recursive), sorted; hidden files are left out.

    `split` chooses in a folder of splits: its subfolder of that name, or the files whose names begin with it.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        return _folder_files(path, split, where)
    if path.exists():
        if not is_readable(path.name):
            raise _unreadable(f"{shown(path)} has a suffix that is not read", where)
        return [str(path)]
    if glob.has_magic(pattern):
        files = [name for name in sorted(_matches(os.path.expanduser(pattern))) if os.path.isfile(name)]
        if not files:
            raise DataError(f"no file matches {pattern}", where=where, remedy="Check the pattern; ** matches folders.")
        if not (readable := [name for name in files if is_readable(os.path.basename(name))]):
            raise _unreadable(f"none of the {len(files)} files that match {pattern} can be read", where)
        return readable
    raise DataError(f"there is no file {shown(path)}", where=where, remedy=_nearest(path))


def _folder_files(folder: Path, split: str | None, where: str | None) -> list[str]:
    if split is not None and (folder / split).is_dir():
        folder, split = folder / split, None
    readable: list[str] = []
    others = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and is_readable(name):
                readable.append(os.path.join(parent, name))
            else:
                others += not name.startswith(".")
    if not readable:
        raise _unreadable(f"the folder {shown(folder)} holds no file that can be read ({others} others)", where)
    readable.sort()
    if split is None:
        return readable
    of_split = [name for name in readable if re.match(re.escape(split) + r"[-_.]", os.path.basename(name))]
    if not of_split:
        raise DataError(
            f"the folder {shown(folder)} has no split {split!r}",
            where=where,
            remedy=f"A split is a subfolder {split}/ or files named {split}.SUFFIX or {split}-*.SUFFIX.",
        )
    return of_split


def _matches(pattern: str) -> Iterator[str]:
    """What a glob matches, as `glob.glob` has it; but `**` enters each folder once, however many links lead there.

    A link to a folder above it is a circle, and two of them are more paths than can be walked.
    """
    if pattern == "**" or pattern.endswith("/**"):  # folders are no files, so this is the same
        pattern += "/*"
    begin, stars, rest = pattern.partition("**/")
    if not stars or (begin and not begin.endswith("/")):
        return iter(glob.glob(pattern, recursive=True))
    entered: set[tuple[int, int]] = set()
    found: set[str] = set()
    for root in sorted(glob.glob(begin)) if begin else [""]:
        for folder, folders, _ in os.walk(root or ".", followlinks=True):
            status = os.stat(folder)
            if (key := (status.st_dev, status.st_ino)) in entered:
                folders.clear()
                continue
            entered.add(key)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = os.path.relpath(folder, root or ".")
            at = root if inside == "." else os.path.join(root, inside, "")
            found.update(_matches(glob.escape(at) + rest))
    return iter(found)


def is_unicode(name: str) -> bool:
    """Whether the name of a file is text that manifests can hold."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _unreadable(what: str, where: str | None) -> DataError:
    return DataError(what, where=where, remedy=f"Files that are read: {readable_suffixes()}.")


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {shown(parent / near[0])}?"
    kind = "file" if is_readable(path.name) else "file or folder"
    return (
        f"{shown(parent) if str(shown(parent)) != '.' else 'The current folder'} holds no such {kind}. Check the path."
    )
