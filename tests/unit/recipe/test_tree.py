from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.errors import RecipeError
from gptcli.recipe import tree
from gptcli.recipe.tree import dump_yaml, parse, parse_inline, plain


def read(text: str, **environment: str) -> Any:
    return plain(parse(text, "f.yaml", Path("/base"), environment))


def error_of(text: str, **environment: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text, **environment)
    lines = caught.value.lines()
    assert len(lines) <= 8
    assert lines[0].startswith("f.yaml")
    return lines


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = "a: 3e-4\nb: no\nc: true\nd: 0o17\ne: 010\nf: .5\ng: '3'\nh: 2024-01-01\ni: ~\nj: 1:30\nk: 0x1f\nl: -.inf"
    assert read(text) == {
        "a": 3e-4,
        "b": "no",
        "c": True,
        "d": 15,
        "e": 10,
        "f": 0.5,
        "g": "3",
        "h": "2024-01-01",
        "i": None,
        "j": "1:30",
        "k": 31,
        "l": -math.inf,
    }


def test_every_key_is_a_text() -> None:
    assert read("{0: negative, true: x}") == {"0": "negative", "true": "x"}


def test_a_key_knows_its_line() -> None:
    root = parse("a: 1\nb:\n  c: [1,\n    2]\n", "f.yaml", Path("/base"))
    assert isinstance(root.value, dict)
    b = root.value["b"]
    assert b.where == "f.yaml:2"
    assert isinstance(b.value, dict)
    assert b.value["c"].where == "f.yaml:3"


def test_the_environment_is_read_before_the_type_is_decided() -> None:
    text = "lr: ${LR}\npath: ${HOME_DIR}/x\nwith: ${MISSING:-7}\nempty: '${EMPTY:-e}'\nquoted: '${LR}'\nraw: $${LR}"
    assert read(text, LR="3e-4", HOME_DIR="/h", EMPTY="") == {
        "lr": 3e-4,
        "path": "/h/x",
        "with": 7,
        "empty": "e",
        "quoted": "3e-4",
        "raw": "${LR}",
    }


def test_the_environment_cannot_add_keys() -> None:
    assert read("a: ${X}", X="{b: 1}\nc: 2") == {"a": "{b: 1}\nc: 2"}


def test_a_missing_variable_names_the_line_and_the_default_form() -> None:
    lines = error_of("a: 1\nb: ${NOPE}")
    assert lines[0] == "f.yaml:2: the environment variable NOPE is not set"
    assert "${NOPE:-default}" in lines[1]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "twice, first at f.yaml:1"),
        ("a: {b: 1, b: 2}", 1, "twice"),
        ("a:\n\tb: 1\n", 2, "tab"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        ("a: !local x", 1, "tag"),
        ("a: b: c", 1, "colon"),
        ("a: @x", 1, "quotes"),
        ("a: *x", 1, "no anchor"),
        ("a: &x [*x]", 1, "no anchor"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("<<: {a: 1}", 1, "extends"),
        ("? [a]\n: b", 1, "plain word"),
        ("a: [1, 2", 1, "not valid YAML"),
        ("a: " + "9" * 5000, 1, "digits"),
    ],
)
def test_what_a_recipe_may_not_hold_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    lines = error_of(text)
    assert lines[0].startswith(f"f.yaml:{line}: ")
    assert words in " ".join(lines)


@pytest.mark.parametrize("text", ["", "\n\n", "# a comment\n", "---\n"])
def test_an_empty_recipe_says_so(text: str) -> None:
    assert "is empty" in error_of(text)[0]


def test_aliases_are_read() -> None:
    assert read("a: &x {b: 1}\nc: *x") == {"a": {"b": 1}, "c": {"b": 1}}


def bomb() -> str:
    names = "abcdefghijkl"
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]" for p, c in itertools.pairwise(names)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 100_000,
        "[" + "1," * 100_000 + "]",
        "".join(f"a{i}: 1\n" for i in range(20_000)),
        "? " * 100_000,
        ":" * 200_000,
        "%x\n" * 50_000,
        "a: \x01",
    ],
    ids=["bomb", "deep-list", "deep-map", "dashes", "wide", "keys", "questions", "colons", "directives", "control"],
)
def test_a_hostile_recipe_ends_in_an_error(text: str) -> None:
    error_of(text)


def test_a_file_of_ten_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_bytes(b"a: 1\n" * 2_000_000)
    with pytest.raises(RecipeError, match="larger than 256 KiB"):
        tree.read_text(path, "data.yaml")


def test_a_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        tree.read_text(path, "latin.yaml")
    assert caught.value.lines()[0].startswith("latin.yaml:2: is not UTF-8")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read(tree.read_text(path, "bom.yaml")) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("[1, 2]", [1, 2]),
        ("{tail: 10%}", {"tail": "10%"}),
        ("**/*.txt", "**/*.txt"),
        ("*.txt", "*.txt"),
        ("a #b", "a #b"),
        ("a: b", "a: b"),
        ('"3"', "3"),
        ("'#'", "#"),
        ("", None),
        ("null", None),
        ("true", True),
        ("!x", "!x"),
    ],
)
def test_the_value_of_an_override_is_a_scalar_unless_it_is_quoted_or_in_brackets(text: str, value: Any) -> None:
    assert plain(parse_inline(text, "override", Path("/"))) == value


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30),
    st.sampled_from(
        ["${X}", "$${X}", "$$${X}", "no", "1e3", "3e-4", "0o7", "1_000", "~", "null", "- a", "a: b", "#", "=", "<<"]
    ),
)
keys = st.text(st.characters(codec="ascii", categories=["L", "Nd"]), min_size=1, max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(keys, values, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back(value: dict[str, Any]) -> None:
    assert read(dump_yaml(value), X="wrong") == value


@given(st.dictionaries(keys, scalars, min_size=1, max_size=4))
def test_an_override_in_json_form_is_read_back(value: dict[str, Any]) -> None:
    import json

    finite = {key: item for key, item in value.items() if not isinstance(item, float) or math.isfinite(item)}
    text = json.dumps(finite, ensure_ascii=False)
    assert plain(parse_inline(text, "override", Path("/"))) == finite


@given(st.text(max_size=40))
def test_any_text_is_a_tree_or_a_recipe_error(text: str) -> None:
    try:
        read(text)
    except RecipeError as error:
        assert len(error.lines()) <= 8
