from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from gptcli.data.builtin import builtin_file, docstrings, library_root, module_name, source_files
from gptcli.errors import DataError


def rows(path: Path) -> dict[str, str]:
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({value["id"] for value in values}) == len(values)
    return {value["id"]: value["text"] for value in values}


def test_pydocs_has_every_topic_and_the_docstrings_of_every_module_in_source_order() -> None:
    found = rows(builtin_file("pydocs"))
    assert [key for key in found if key.startswith("pydocs:topic/")] == [
        f"pydocs:topic/{key}" for key in sorted(topics)
    ]
    assert found["pydocs:topic/assert"] == topics["assert"]
    for path, name in (("asyncio/base_events.py", "asyncio.base_events"), ("json/__init__.py", "json")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse((library_root() / path).read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
        assert found[f"pydocs:module/{name}"] == "\n\n".join(text for n in nodes if (text := ast.get_docstring(n)))
    assert all(text.strip() for text in found.values())


def test_stdlib_has_one_document_a_source_file_and_is_extracted_once() -> None:
    path = builtin_file("stdlib")
    found = rows(path)
    source = (library_root() / "asyncio" / "base_events.py").read_text(encoding="utf-8")
    assert found["stdlib:asyncio/base_events.py"] == source
    written = path.stat().st_mtime_ns
    assert builtin_file("stdlib").stat().st_mtime_ns == written


def test_left_out_folders_are_not_read(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "b/c.py",
        "test/d.py",
        "b/tests/e.py",
        "site-packages/f.py",
        "lib2to3/g.py",
        "idlelib/h.py",
        "b/z.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert source_files(tmp_path) == ["a.py", "b/c.py"]


def test_docstrings_are_found_inside_every_kind_of_statement_without_warnings_on_the_screen() -> None:
    source = b'''"""module \\d"""
if 1:
    class A:
        """A"""
        async def f(self):
            "f"
            try:
                pass
            except E:
                def g(): "g"
            else:
                with x:
                    match y:
                        case 1:
                            def h(): "h"
x = lambda: "no"
'''
    assert docstrings(source) == ["module \\d", "A", "f", "g", "h"]
    assert docstrings(b"def (") == []


def test_modules_are_named_as_python_names_them() -> None:
    assert [module_name(path) for path in ("a.py", "a/__init__.py", "a/b.py")] == ["a", "a", "a.b"]


def test_an_unknown_corpus_names_the_known_ones() -> None:
    with pytest.raises(DataError, match="builtin:nope") as caught:
        builtin_file("nope")
    assert "builtin:pydocs" in str(caught.value.remedy)
