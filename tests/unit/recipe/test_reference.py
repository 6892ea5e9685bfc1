from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptcli.recipe.availability import TABLE
from gptcli.recipe.presets import PRESETS
from gptcli.recipe.problems import sections_of
from gptcli.recipe.reference import json_schema, markdown
from gptcli.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[3]


def parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, list):
        for item in value:
            yield from parts(item)


def test_the_page_of_the_recipe_is_current() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == markdown(), "make it again: gptcli recipes schema --markdown > docs/recipe.md"


def test_every_key_has_a_description() -> None:
    def missing(model: Any, path: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if not field.description:
                found.append(f"{path}.{name}")
            for inner in sections_of(field.annotation):
                found += missing(inner, f"{path}.{name}")
        return found

    assert missing(Recipe, "") == []


def test_the_page_marks_what_is_not_available() -> None:
    page = markdown()
    assert page.count("*Not available yet") >= len({row.key for row in TABLE}) // 2
    assert re.search(r"`objective`.*Not available yet: masked", page)


def test_the_page_has_every_preset() -> None:
    assert all(f"| `{name}` |" in markdown() for name in PRESETS)


def test_the_json_schema_is_whole() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    for part in parts(schema):
        reference = part.get("$ref")
        if isinstance(reference, str):
            assert reference.removeprefix("#/$defs/") in schema["$defs"]
        if isinstance(part.get("pattern"), str):
            re.compile(part["pattern"])
        assert "oneOf" not in part


def test_editors_accept_what_the_program_does() -> None:
    defs = json_schema()["$defs"]
    count = defs["Train"]["properties"]["max_tokens"]["anyOf"]
    patterns = [kind["pattern"] for kind in count if "pattern" in kind]
    assert any(re.search(pattern, "20M") for pattern in patterns)
    train = defs["Data"]["properties"]["train"]["anyOf"]
    assert {"type": "string"} in train
    assert any(kind.get("type") == "array" for kind in train)
    assert "required" not in defs["Data"]
