"""The whole contract of a recipe, as pydantic models: every key, its type, its default and what it means.

docs/recipe.md and the JSON schema are made from these models; nothing else holds a default. Keys whose feature does
not exist yet are here too: `availability` refuses them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from gptcli.recipe.fields import Section
from gptcli.recipe.sections_data import (
    Data,
    Model,
    PresetName,
    Source,
    Tail,
    Tokenizer,
    TokenizerTraining,
)
from gptcli.recipe.sections_rest import Eval, Fsdp, Generate, Launch, Parallel, Tokenize, Tracking
from gptcli.recipe.sections_rows import Messages, Preference
from gptcli.recipe.sections_train import Finetune, Lora, Profile, RegexReward, Train
from gptcli.recipe.template import PROMPT

__all__ = [
    "Data",
    "Eval",
    "Finetune",
    "Fsdp",
    "Generate",
    "Launch",
    "Lora",
    "Messages",
    "Model",
    "Parallel",
    "Preference",
    "PresetName",
    "Profile",
    "Recipe",
    "RegexReward",
    "Section",
    "Source",
    "Tail",
    "Tokenize",
    "Tokenizer",
    "TokenizerTraining",
    "Tracking",
    "Train",
]


MAX_NAME_BYTES = 200  # of 255 that file systems allow: temporary folders are called after a run's


class Recipe(Section):
    """A recipe. Each command needs only the sections it uses, checks the others and leaves them alone."""

    name: str = Field(
        default="", description="The run is written to <output_dir>/<name>; without it, the stem of the recipe's file."
    )
    extends: str | None = Field(
        default=None, description="A recipe (a file, or a built-in name) that this one changes."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=1337, description="The seed of every random choice.")
    output_dir: str = Field(
        default="runs", min_length=1, description="Where runs are written, relative to the current folder."
    )
    tokenizer: Tokenizer | None = Field(default=None, description="Without it, the tokenizer of `model.from`.")
    data: Data | None = Field(default=None, description="What is trained on, and what is held out.")
    model: Model | None = Field(default=None, description="What is trained.")
    train: Train = Field(default_factory=Train.model_construct, description="How it is trained.")
    finetune: Finetune = Field(
        default_factory=Finetune.model_construct, description="What fine-tuning does beyond `train`."
    )
    launch: Launch = Field(default_factory=Launch.model_construct, description="On how many processes and machines.")
    tokenize: Tokenize = Field(default_factory=Tokenize.model_construct, description="How texts become tokens.")
    tracking: Tracking = Field(
        default_factory=Tracking.model_construct, description="Where metrics go besides metrics.jsonl."
    )
    generate: Generate = Field(default_factory=Generate.model_construct, description="How texts are generated.")
    eval: Eval = Field(default_factory=Eval.model_construct, description="What is measured.")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if (why := _no_folder_name(name)) is not None:
            raise ValueError(f"{name[:100]!r} cannot be a folder's name: {why}")
        return name

    @property
    def asked(self) -> str:
        """The template of what a task asks the model: that of `eval`, else the one it is trained on."""
        trained = self.data.prompt if self.data is not None and self.data.format == "prompt" else None
        return self.eval.prompt or trained or PROMPT

    @property
    def validation_rows(self) -> list[Source]:
        """The sources of held-out rows that a task can be measured on; none where what is held out is no rows."""
        data = self.data
        if data is None or data.format != "prompt" or not isinstance(data.validation, list):
            return []
        return data.validation


def _no_folder_name(name: str) -> str | None:
    """What keeps a name from being that of a folder in `output_dir`, one that can be typed; None: nothing does."""
    if name in (".", "..") or "/" in name or "\\" in name:
        return "it leads to another one (set output_dir for that)"
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        return f"it has more than {MAX_NAME_BYTES} bytes"
    return None if name.isprintable() else "it holds characters that cannot be printed"
