"""What a row of data is, where it is more than a text: conversations, templates, preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gptcli.recipe.fields import Section
from gptcli.recipe.template import parse_template


class Messages(Section):
    """Which column holds a conversation, and in which shape."""

    column: str | None = Field(
        default=None,
        description="The column of the conversation: `messages` (openai), `conversations` (sharegpt). None in alpaca.",
    )
    shape: Literal["openai", "sharegpt", "alpaca"] = Field(
        default="openai",
        description="openai: messages of role and content; sharegpt: of from and value; alpaca: the columns "
        "instruction, input and output.",
    )

    @model_validator(mode="after")
    def _alpaca_has_its_columns(self) -> Messages:
        if self.shape == "alpaca" and self.column is not None:
            raise ValueError("shape alpaca has the columns instruction, input and output; remove column")
        return self


def as_messages(value: object) -> object:
    """The name of a column as keys."""
    return {"column": value} if isinstance(value, str) else value


EXAMPLES = {"prompt": "question", "completion": "answer"}


def checked_template(value: str | None) -> str | None:
    """The template, if it can be read; else raises `ValueError`."""
    if value is not None:
        parse_template(value)
    return value


class Preference(Section):
    """The columns of preference data: chosen and rejected, or completion and label (kto)."""

    prompt: str = Field(default="prompt", description="The column of the prompt.")
    chosen: str | None = Field(default=None, description="The column of the better answer.")
    rejected: str | None = Field(default=None, description="The column of the worse answer.")
    completion: str | None = Field(default=None, description="kto: the column of the answer.")
    label: str | None = Field(default=None, description="kto: the column that says whether the answer is good.")
    reference: str = Field(
        default="reference", description="grpo: the column of the right answer, for the reward exact_match."
    )
