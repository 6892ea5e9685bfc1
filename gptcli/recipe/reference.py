"""The schema in two other forms: docs/recipe.md for people, JSON schema (draft 2020-12) for editors.

Both are made from the models, so that no default and no meaning is written twice; a test holds docs/recipe.md to it.
"""

from __future__ import annotations

import json
from typing import Any

from gptcli.recipe.availability import is_available, unavailable_values
from gptcli.recipe.presets import MEDIA_PRESETS, PRESETS, Shape, body_parameters
from gptcli.recipe.schema import Recipe

INTRODUCTION = """\
# The recipe

<!-- Made by `gptcli recipes schema --markdown`; change the schema in gptcli/recipe, then make this page again. -->

A recipe is YAML 1.2. Every key is checked: an unknown one is an error that names its line and the nearest valid key.
`gptcli recipes validate RECIPE` checks one, `gptcli recipes schema` prints the JSON schema; an editor that speaks
YAML takes it from a first line `# yaml-language-server: $schema=recipe.schema.json`.

- **Units.** `20M` is 20 000 000, `64Ki` is 65 536 (K M B T are powers of ten, Ki Mi Gi powers of two); `2%` is a share;
  `11h30m` is a time.
- **Layers.** `extends: FILE` (or a built-in name) < the recipe < `KEY=VALUE` on the command line. Mappings are merged,
  lists are replaced, `null` removes a key. Of keys that exclude each other, the nearer layer's choice removes the
  farther one's.
- **Environment.** `${VAR}` and `${VAR:-default}` are replaced; `$${` is a literal `${`.
- **Paths** are relative to the file they stand in; in `KEY=VALUE`, and `output_dir` always, to the current folder.
- **Sole sources.** `data.train=FILE` sets the only source, `data.train.text=body` changes the only one,
  `data.train.0.path=FILE` one of several.
"""


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file: `data.train` may come from `extends`, so no section requires a key."""
    schema = _for_editors(Recipe.model_json_schema(by_alias=True))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "recipe.schema.json", **schema}


def _for_editors(value: Any) -> Any:
    """Alternatives of which several may fit, and recipes of which a part stands in another file."""
    if isinstance(value, list):
        return [_for_editors(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {("anyOf" if key == "oneOf" else key): _for_editors(item) for key, item in value.items()}
    if "train" in changed.get("required", []):
        del changed["required"]
    return changed


def markdown() -> str:
    """docs/recipe.md."""
    schema = json_schema()
    parts = [INTRODUCTION]
    top = [name for name, field in schema["properties"].items() if not _reference(field)]
    parts.append(_section("Top level", "", {name: schema["properties"][name] for name in top}, schema))
    for name, field in schema["properties"].items():
        if reference := _reference(field):
            parts += _described(f"`{name}`", name, schema["$defs"][reference], schema)
    parts.append(_presets())
    return "\n".join(parts)


def _described(title: str, path: str, section: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """A section's table, and those of the sections inside it."""
    parts = [_section(title, section.get("description", ""), section["properties"], schema, path)]
    for name, field in section["properties"].items():
        for reference in dict.fromkeys(_references(field)):
            inner = schema["$defs"][reference]
            if reference == "Source" and (path, name) != ("data", "train"):
                continue
            inner_path = f"{path}.{name}" + (".*" if reference == "Source" else "")
            parts += _described(f"`{path}.{name}`", inner_path, inner, schema)
    return parts


def _section(title: str, text: str, fields: dict[str, Any], schema: dict[str, Any], path: str = "") -> str:
    level = "###" if "." in path else "##"
    lines = [f"{level} {title}", "", *([" ".join(text.split()), ""] if text else [])]
    lines += ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        key = f"{path}.{name}" if path else name
        meaning = field.get("description", "")
        missing = unavailable_values(key, _options(field))
        if not is_available(key):
            meaning += " *Not available yet.*"
        elif missing:
            meaning += f" *Not available yet: {', '.join(missing)}.*"
        cells = (f"`{name}`", _kind(field, schema), _default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _options(field: dict[str, Any]) -> list[str]:
    inner = field.get("items", field)
    return [str(option) for option in inner.get("enum", [])] + [
        option for variant in inner.get("anyOf", []) for option in _options(variant)
    ]


def _references(field: Any) -> list[str]:
    if isinstance(field, list):
        return [name for item in field for name in _references(item)]
    if not isinstance(field, dict):
        return []
    own = [field["$ref"].rpartition("/")[2]] if "$ref" in field else []
    return own + [name for item in field.values() for name in _references(item)]


def _reference(field: dict[str, Any]) -> str | None:
    found = _references(field)
    return found[0] if found else None


def _kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The values of a field, in words."""
    if "$ref" in field:
        return "keys"
    if "enum" in field:
        return ", ".join(f"`{option}`" for option in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        kinds = [_kind(variant, schema) for variant in field["anyOf"] if variant.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = field.get("type", "any")
    if kind == "string" and "%" in field.get("pattern", ""):
        return "percentage"
    if kind == "string" and "Ki" in field.get("pattern", "").replace("[KMG]i", "Ki"):
        return "whole number"
    if kind == "string" and "d)?" in field.get("pattern", ""):
        return "time"
    if kind == "array":
        return f"list of {_kind(field.get('items', {}), schema)}"
    words = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`", "object": "keys"}
    return words.get(kind, kind) if isinstance(kind, str) else "percentage or number"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "" if _reference(field) else "required"
    value = field["default"]
    return "" if value in (None, "") else f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _presets() -> str:
    lines = [
        "## Presets",
        "",
        "`model.preset` fixes depth, width and heads; `model.config` wins over it. The embedding dominates the",
        "small ones, so the parameters are given without it, and with that of a vocabulary of 8 192, tied to the head.",
        "They are those of GPT-style layers (12 width² each); a type's own feed-forward width changes them a little.",
        "",
        "| preset | layers | width | heads | parameters of the layers | with a vocabulary of 8 192 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in PRESETS.items():
        body = body_parameters(shape)
        lines.append(
            f"| `{name}` | {shape.num_hidden_layers} | {shape.hidden_size} | {shape.num_attention_heads} "
            f"| {_millions(body)} | {_millions(body + _embedding(shape))} |"
        )
    lines += [
        "",
        "Of types that see or hear (docs/multimodal.md) the text model, the tower and what this is cut by are fixed:",
        "",
        "| preset | text model: layers, width, heads | tower | of the tower |",
        "| --- | --- | --- | --- |",
    ]
    for name, media in MEDIA_PRESETS.items():
        sizes = ", ".join(f"`{key}: {value}`" for key, value in media.sizes.items())
        lines.append(f"| `{name}` | {_numbers(media.text)} | {_numbers(media.tower)} | {sizes} |")
    return "\n".join([*lines, ""])


def _numbers(shape: Shape) -> str:
    return f"{shape.num_hidden_layers}, {shape.hidden_size}, {shape.num_attention_heads}"


def _embedding(shape: Shape) -> int:
    return 8192 * shape.hidden_size


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
