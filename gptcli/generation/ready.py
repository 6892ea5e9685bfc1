"""A model as a command asks for it: how its weights are held, and what goes beside its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import UsageError
from gptcli.model.load import Precision, check_precision, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """What decides the texts of a model beside its folder and the settings.

    Attributes:
        precision: of the weights.
        quantize: int8 or int4; None: not at all.
        draft: the folder of a smaller model that proposes tokens.
        prompt_lookup: how many tokens to propose from the prompt.
        json_schema: JSON Schema as JSON, which every text is held to.
        regex: an expression that every text matches whole.
    """

    precision: Precision = "auto"
    quantize: str | None = None
    draft: Path | None = None
    prompt_lookup: int | None = None
    json_schema: str | None = None
    regex: str | None = None

    def check(self) -> None:
        """Raise `UsageError` for what is no value, or does not go together."""
        check_precision(self.precision)
        if self.quantize is not None:
            from gptcli.model.quantize import check_kind

            check_kind(self.quantize)
        if self.draft is not None and self.prompt_lookup is not None:
            raise UsageError("--draft and --prompt-lookup are two ways to one end", remedy="Leave one of them out.")
        if self.prompt_lookup is not None and self.prompt_lookup < 1:
            raise UsageError(f"--prompt-lookup {self.prompt_lookup}: at least one token is looked up")
        if self.json_schema is not None and self.regex is not None:
            raise UsageError("--json-schema and --regex exclude each other")


@dataclass(frozen=True)
class Ready:
    """A model, its tokenizer, and what `complete` and `complete_batch` take beside them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    beside: dict[str, Any]

    @property
    def made_on(self) -> str:
        """The precision and the device."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{_SHORT.get(dtype, dtype)} on {self.model.device.type}"


_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def ready(
    folder: Path, asked: Asked, say: Callable[[str], None], *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Ready:
    """Load what was asked for; `say` gets a line about what was made of it. `tokenizer` is the model's, if it is there.

    Raises:
        UsageError: the draft is of another vocabulary, or the constraint is wrong.
        MissingError, CheckpointError: as `load_model`; a package is missing.
    """
    tokenizer = tokenizer or load_tokenizer(folder)
    model = load_model(folder, dtype=asked.precision)
    if asked.quantize is not None:
        from gptcli.model.quantize import quantize

        say(str(quantize(model, asked.quantize)))
    beside: dict[str, Any] = {}
    if asked.prompt_lookup is not None:
        beside["draft"] = asked.prompt_lookup
    if asked.draft is not None:
        beside["draft"] = _draft(asked.draft, tokenizer, asked.precision)
    if asked.json_schema is not None or asked.regex is not None:
        from gptcli.generation.constrain import compile_constraint
        from gptcli.generation.text import stop_ids

        beside["constraint"] = compile_constraint(
            tokenizer,
            json_schema=asked.json_schema,
            regex=asked.regex,
            vocab_size=model.config.get_text_config().vocab_size,
            stop_ids=stop_ids(model, tokenizer),
        )
    return Ready(model, tokenizer, beside)


def _draft(folder: Path, tokenizer: PreTrainedTokenizerBase, precision: Precision) -> PreTrainedModel:
    """The model that proposes tokens; one of another vocabulary would propose other texts."""
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            "the draft's tokenizer has another vocabulary than the model's",
            where=str(folder),
            remedy="A draft proposes tokens, so both need the same: train it with tokenizer: {from: MODEL}.",
        )
    return load_model(folder, dtype=precision)
