"""The types that fields of a recipe share: the base of every section, and values with units.

Each type carries its JSON schema, so that editors accept `20M` where the program does. Validators are plain functions:
a union of models costs milliseconds to build, and a recipe error has to be printed at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from gptcli.recipe import units


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no silent conversion of types, immutable.

    A section that is not written is made by `model_construct`: its defaults need no validator, and building one apiece
    would cost a third of the time to a recipe error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, protected_namespaces=())


def _auto_or_count(value: object, least: int = 1) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        result = units.count(value)
    except ValueError:
        raise ValueError("expected auto or a whole number such as 8") from None
    if result < least:
        raise ValueError(f"expected auto or a whole number of at least {least}")
    return result


def _auto_or_count_or_zero(value: object) -> int | Literal["auto"]:
    return _auto_or_count(value, least=0)


def _auto_or_bool(value: object) -> bool | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool):
        return value
    raise ValueError("expected auto, true or false")


def _texts(value: object) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("expected a text or a list of texts")
    return items


def accepts(*kinds: dict[str, Any]) -> WithJsonSchema:
    """The JSON schema of a value that editors should accept, as one of several kinds."""
    return WithJsonSchema({"anyOf": list(kinds)})


_COUNT = {"type": "string", "pattern": units.COUNT_PATTERN}
SHARE = {"type": "string", "pattern": units.SHARE_PATTERN}
_TEXT_LIST = {"type": "array", "items": {"type": "string"}}

Count: TypeAlias = Annotated[
    int,
    BeforeValidator(units.count),
    Field(ge=1),
    accepts({"type": "integer", "minimum": 1}, _COUNT),
]
CountOrZero: TypeAlias = Annotated[
    int,
    BeforeValidator(units.count),
    Field(ge=0),
    accepts({"type": "integer", "minimum": 0}, _COUNT),
]
Share: TypeAlias = Annotated[
    float,
    BeforeValidator(units.share),
    accepts({"type": "number", "minimum": 0, "maximum": 1}, SHARE),
]
Part: TypeAlias = Annotated[
    float,
    BeforeValidator(units.part),
    accepts({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, SHARE),
]
StepsOrShare: TypeAlias = Annotated[
    int | float,
    PlainValidator(units.steps_or_share),
    accepts({"type": "number", "minimum": 0}, _COUNT, SHARE),
]
Duration: TypeAlias = Annotated[
    int,
    BeforeValidator(units.duration),
    accepts({"type": "integer", "minimum": 1}, {"type": "string", "pattern": units.DURATION_PATTERN}),
]
AutoOrCount: TypeAlias = Annotated[
    int | Literal["auto"],
    PlainValidator(_auto_or_count),
    accepts({"const": "auto"}, {"type": "integer", "minimum": 1}, _COUNT),
]
AutoOrCountOrZero: TypeAlias = Annotated[
    int | Literal["auto"],
    PlainValidator(_auto_or_count_or_zero),
    accepts({"const": "auto"}, {"type": "integer", "minimum": 0}, _COUNT),
]
AutoOrBool: TypeAlias = Annotated[
    bool | Literal["auto"],
    PlainValidator(_auto_or_bool),
    accepts({"const": "auto"}, {"type": "boolean"}),
]
Texts: TypeAlias = Annotated[list[str], BeforeValidator(_texts), accepts({"type": "string"}, _TEXT_LIST)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
