"""The types that fields of a recipe share: the base of every section, and values with units.

Each type carries its JSON schema, so that editors accept `20M` where the program does. Validators are plain functions:
a union of models costs milliseconds to build, and a recipe error has to be printed at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from gptcli.recipe import units


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no silent conversion of types, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True, protected_namespaces=())


def _auto_or_count(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        result = units.count(value)
    except ValueError:
        raise ValueError("expected auto or a whole number such as 8") from None
    if result < 1:
        raise ValueError("expected auto or a whole number of at least 1")
    return result


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


class Accepts:
    """The JSON schema of a value that editors should accept, as one of several kinds.

    As pydantic's WithJsonSchema, without the import of `pydantic.types` (a sixth of the time to a recipe error).
    """

    def __init__(self, *kinds: dict[str, Any]) -> None:
        self.kinds = kinds

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        del core, handler
        return {"anyOf": list(self.kinds)}


_COUNT = {"type": "string", "pattern": units.COUNT_PATTERN}
SHARE = {"type": "string", "pattern": units.SHARE_PATTERN}
_TEXT_LIST = {"type": "array", "items": {"type": "string"}}

Count: TypeAlias = Annotated[
    int,
    BeforeValidator(units.count),
    Field(ge=1),
    Accepts({"type": "integer", "minimum": 1}, _COUNT),
]
CountOrZero: TypeAlias = Annotated[
    int,
    BeforeValidator(units.count),
    Field(ge=0),
    Accepts({"type": "integer", "minimum": 0}, _COUNT),
]
Share: TypeAlias = Annotated[
    float,
    BeforeValidator(units.share),
    Accepts({"type": "number", "minimum": 0, "maximum": 1}, SHARE),
]
Part: TypeAlias = Annotated[
    float,
    BeforeValidator(units.part),
    Accepts({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, SHARE),
]
StepsOrShare: TypeAlias = Annotated[
    int | float,
    PlainValidator(units.steps_or_share),
    Accepts({"type": "number", "minimum": 0}, _COUNT, SHARE),
]
Duration: TypeAlias = Annotated[
    int,
    BeforeValidator(units.duration),
    Accepts({"type": "integer", "minimum": 1}, {"type": "string", "pattern": units.DURATION_PATTERN}),
]
AutoOrCount: TypeAlias = Annotated[
    int | Literal["auto"],
    PlainValidator(_auto_or_count),
    Accepts({"const": "auto"}, {"type": "integer", "minimum": 1}, _COUNT),
]
AutoOrBool: TypeAlias = Annotated[
    bool | Literal["auto"],
    PlainValidator(_auto_or_bool),
    Accepts({"const": "auto"}, {"type": "boolean"}),
]
Texts: TypeAlias = Annotated[list[str], BeforeValidator(_texts), Accepts({"type": "string"}, _TEXT_LIST)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
