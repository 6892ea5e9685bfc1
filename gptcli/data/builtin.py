"""Corpora that need no download, because every Python has them: `builtin:pydocs` and `builtin:stdlib`.

Sources are parsed with `ast` and never imported. The extracted text is kept in the cache folder as one .jsonl file
({"id", "text"} a line) under a fingerprint of the Python and its files, so that the 2 s of parsing are spent once.
"""

from __future__ import annotations

import ast
import gc
import io
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from gptcli.errors import DataError
from gptcli.files import cache_root, committed_folder, fingerprint

LEFT_OUT = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3"})
FORMAT = 1
_STATEMENT_LISTS = ("body", "handlers", "orelse", "finalbody", "cases")
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def builtin_file(name: str, *, where: str | None = None) -> Path:
    """The .jsonl file of a built-in corpus, extracted on first use. An unknown name is a `DataError`."""
    if name not in CORPORA:
        known = ", ".join(f"builtin:{corpus}" for corpus in CORPORA)
        raise DataError(
            f"there is no built-in corpus builtin:{name}", where=where, remedy=f"The built-in ones: {known}."
        )
    root = library_root()
    sources = source_files(root)
    folder = cache_root() / "builtin" / f"{name}-{_version(root, sources)}"
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        with committed_folder(folder) as work, (work / path.name).open("w", encoding="utf-8", newline="\n") as file:
            for identity, text in CORPORA[name](root, sources):
                file.write(json.dumps({"id": identity, "text": text}, ensure_ascii=False) + "\n")
    return path


def library_root() -> Path:
    """The folder of the standard library's source."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> list[str]:
    """The source files under `root` as sorted relative POSIX paths, without `LEFT_OUT` folders."""
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def pydocs(root: Path, sources: list[str]) -> Iterator[tuple[str, str]]:
    """One document a topic of `pydoc_data.topics`, then one a module: its docstrings joined by a blank line."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield f"pydocs:topic/{topic}", text
    for name in sources:
        found = docstrings((root / name).read_bytes())
        if found:
            yield f"pydocs:module/{module_name(name)}", "\n\n".join(found)


def stdlib(root: Path, sources: list[str]) -> Iterator[tuple[str, str]]:
    """One document a source file of the standard library, lines ended by LF."""
    for name in sources:
        raw = (root / name).read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            text = raw.decode(encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError):
            continue  # not a source file that Python itself could read
        if text.strip():
            yield f"stdlib:{name}", text.replace("\r\n", "\n")


def docstrings(source: bytes) -> list[str]:
    """The cleaned docstrings of a module, its classes and its functions, in source order; [] if it does not parse."""
    collecting = gc.isenabled()
    gc.disable()  # a parse makes no garbage, and collecting over its nodes takes a quarter of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    finally:
        if collecting:
            gc.enable()
    found: list[str] = []
    _collect(tree, found)
    return found


def module_name(path: str) -> str:
    """The dotted name of a module from its relative path: `asyncio/base_events.py` is `asyncio.base_events`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _collect(node: ast.AST, found: list[str]) -> None:
    # Only statements can hold a docstring: leaving expressions alone takes a tenth of the time of ast.walk.
    if isinstance(node, _WITH_DOCSTRING) and (text := ast.get_docstring(node)):
        found.append(text)
    for field in _STATEMENT_LISTS:
        children = getattr(node, field, ())
        if isinstance(children, list):
            for child in children:
                _collect(child, found)


def _version(root: Path, sources: list[str]) -> str:
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name in sources for stat in [(root / name).stat()]]
    return fingerprint([FORMAT, sys.version, str(root), stats])


CORPORA: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, str]]]] = {"pydocs": pydocs, "stdlib": stdlib}
