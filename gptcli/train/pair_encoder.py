"""What becomes of a preference row: its columns checked, its prompt and its answers as ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from gptcli.data.columns import mapped
from gptcli.data.named_rows import named_rows
from gptcli.data.readers import BadRow
from gptcli.data.reading.row import kind_of, listed
from gptcli.errors import DataError, GptcliError, RecipeError
from gptcli.recipe.schema import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Source

_NAME_IT = "Name the columns there are in data.preference, for example preference: {{prompt: {hint}}}"
_COLUMNS = "Name the columns there are in data.preference: {prompt: ..., chosen: ..., rejected: ...}"
_MEND = "Mend it, or leave such rows out: data.on_bad_row: skip (they are counted)."
_TRUE, _FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")
# What trl calls a reward function with, and columns that it would take for pictures.
_OF_TRL = (
    *("prompts", "completion", "completions", "completion_ids", "image", "images"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)
Messages = list[dict[str, Any]]


def columns_of(loaded: LoadedRecipe) -> dict[str, str]:
    """The column of each part of a row, by what the method calls it.

    Raises:
        RecipeError: columns that belong to another method.
    """
    method, data = loaded.recipe.finetune.method, loaded.recipe.data
    given = (data.preference if data else None) or Preference()
    pairs, single = (given.chosen, given.rejected), (given.completion, given.label)
    where = loaded.where("data.preference")
    if method == "grpo":
        if any((*pairs, *single)):
            raise RecipeError(
                "data.preference: grpo writes the answers itself and reads no column of answers",
                where=where,
                remedy="For example: preference: {prompt: question}",
            )
        return {"prompt": given.prompt}
    if method == "kto" and not any(pairs):
        return {"prompt": given.prompt, "completion": single[0] or "completion", "label": single[1] or "label"}
    if any(single):
        raise RecipeError(
            f"data.preference: completion and label are kto's columns, and the method is {method}"
            if method != "kto"
            else "data.preference: kto reads completion and label, or chosen and rejected, not both",
            where=where,
        )
    return {"prompt": given.prompt, "chosen": pairs[0] or "chosen", "rejected": pairs[1] or "rejected"}


class Encoder:
    """Checks rows and makes ids of them, by the method and the columns of a recipe."""

    def __init__(self, loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
        from gptcli.data.templater import end_of_turn
        from gptcli.generation.window import has_template

        data, recipe = loaded.recipe.data, loaded.recipe
        assert data is not None
        self._data = data
        self.method = recipe.finetune.method
        self._columns = columns_of(loaded)
        self._tokenizer = tokenizer
        self._has_template = has_template(tokenizer)
        self._end = _end_of_text(tokenizer)
        self._end_of_turn = next(iter(end_of_turn(tokenizer)), self._end)
        self._room = data.sequence_length - (recipe.generate.max_new_tokens if self.method == "grpo" else 0)
        self._reference = data.preference.reference if data.preference else "reference"
        self._needs_reference = self.method == "grpo" and recipe.finetune.reward == "exact_match"
        if self._room < 1:
            raise RecipeError(
                f"data.sequence_length: {data.sequence_length:,} leaves no room for a prompt beside "
                f"generate.max_new_tokens, {recipe.generate.max_new_tokens:,}",
                where=loaded.where("data.sequence_length"),
            )

    def rows(
        self, source: Source, where: str | None, dropped: Counter[str]
    ) -> Iterator[tuple[str, dict[str, Any], str]]:
        """(place, encoded row, what tells its prompt) of the rows of a source; what is left out is counted."""
        first = self._columns["prompt"]
        for place, found, _ in islice(named_rows(source, first, _NAME_IT, where), source.limit):
            row = found.reason if isinstance(found, BadRow) else mapped(found.values or {}, source.map or {})
            made = row if isinstance(row, str) else self._made(row)
            if isinstance(made, str):
                if self._data.on_bad_row == "error":
                    remedy = f"{_COLUMNS}\n{_MEND}" if made.startswith("has no column") else _MEND
                    raise DataError(made, where=place, remedy=remedy)
                dropped["left out: they are bad (data.on_bad_row: skip)"] += 1
                continue
            for each in made:
                key = json.dumps(row[first], sort_keys=True) if isinstance(row, dict) else ""
                fitted = self._fitted(each, place, dropped)
                if fitted is not None:
                    yield place, fitted, key

    def lengths(self, row: dict[str, Any]) -> tuple[int, ...]:
        """Tokens of each sequence of an encoded row."""
        if self.method == "grpo":
            return (len(self.prompt_ids(row["prompt"])),)
        names = ("chosen_ids", "rejected_ids") if "chosen_ids" in row else ("completion_ids",)
        return tuple(len(row["prompt_ids"]) + len(row[name]) for name in names)

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """The ids of a prompt, as `generate` has them."""
        from gptcli.generation.text import encode_prompt
        from gptcli.generation.window import template_ids

        return (
            encode_prompt(self._tokenizer, prompt) if isinstance(prompt, str) else template_ids(self._tokenizer, prompt)
        )

    def _made(self, row: dict[str, Any]) -> list[dict[str, Any]] | str:
        """The encoded rows of a row (a pair gives two for kto), or the sentence that says what is wrong with it."""
        for column in self._columns.values():
            if column not in row:
                return f"has no column {column!r}, only {listed(row)}"
        try:
            prompt = self._prompt(row)
            if self.method == "grpo":
                return self._with_prompt(row, prompt)
            return self._with_answers(row, prompt)
        except _Bad as error:
            return str(error)
        except GptcliError as error:
            return f"cannot be encoded: {error.what}"

    def _prompt(self, row: dict[str, Any]) -> str | Messages:
        column = self._columns["prompt"]
        value = row[column]
        if isinstance(value, str):
            return value
        messages = self._messages(value, column)
        if messages[-1]["role"] == "assistant":
            raise _Bad(f"column {column!r} ends with an answer, and the answers are in columns of their own")
        return messages

    def _with_prompt(self, row: dict[str, Any], prompt: str | Messages) -> list[dict[str, Any]] | str:
        if self._needs_reference:
            if self._reference not in row:
                return (
                    f"has no column {self._reference!r} to compare with (data.preference.reference), only {listed(row)}"
                )
            if not isinstance(row[self._reference], str | int | float | list):
                return f"column {self._reference!r} holds {kind_of(row[self._reference])}, no reference"
        return [{**{name: value for name, value in row.items() if name not in _OF_TRL}, "prompt": prompt}]

    def _with_answers(self, row: dict[str, Any], prompt: str | Messages) -> list[dict[str, Any]]:
        names = [name for name in ("chosen", "rejected", "completion") if name in self._columns]
        found = [self._answer(row[self._columns[name]], self._columns[name], prompt) for name in names]
        prompts = [asked for asked, _ in found]
        answers = [answer for _, answer in found]
        if any(asked != prompts[0] for asked in prompts):
            raise _Bad("its answers come after different messages")
        if len(answers) == 2 and answers[0] == answers[1]:
            raise _Bad(f"columns {self._columns['chosen']!r} and {self._columns['rejected']!r} hold the same answer")
        ids = self.prompt_ids(prompts[0])
        end = self._end if isinstance(prompts[0], str) else self._end_of_turn
        encoded = [[*self._plain(answer), end] for answer in answers]
        if self.method != "kto":
            return [{"prompt_ids": ids, "chosen_ids": encoded[0], "rejected_ids": encoded[1]}]
        labels = [True, False] if len(encoded) == 2 else [self._label(row)]
        return [
            {"prompt_ids": ids, "completion_ids": answer, "label": label}
            for answer, label in zip(encoded, labels, strict=True)
        ]

    def _answer(self, value: Any, column: str, prompt: str | Messages) -> tuple[str | Messages, str]:
        """(what an answer comes after, its text); messages may repeat the prompt before the answer."""
        if isinstance(value, str):
            text, asked = value, prompt
        else:
            messages = self._messages(value, column)
            if messages[-1]["role"] != "assistant":
                raise _Bad(f"column {column!r} does not end with a message of the assistant")
            before, text = messages[:-1], messages[-1]["content"]
            whole: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if before and [_said(each) for each in before[-len(whole) :]] != [_said(each) for each in whole]:
                raise _Bad(f"column {column!r} comes after other messages than the prompt")
            asked = before or whole
        if not text.strip():
            raise _Bad(f"column {column!r} holds an empty answer")
        return asked, text

    def _messages(self, value: Any, column: str) -> Messages:
        if not isinstance(value, list):
            raise _Bad(f"column {column!r} holds {kind_of(value)}, neither a text nor a list of messages")
        if not value:
            raise _Bad(f"column {column!r} holds no messages")
        for each in value:
            known = isinstance(each, dict) and isinstance(each.get("role"), str)
            if not known or not isinstance(each.get("content"), str):
                raise _Bad(f"column {column!r} holds a list of something else than messages of role and content")
        if not self._has_template:
            raise _Bad(f"column {column!r} holds messages, and the tokenizer has no chat template (set tokenizer)")
        return [_said(each) for each in value]

    def _plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Bad("holds a lone surrogate, which no UTF-8 text can") from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _label(self, row: dict[str, Any]) -> bool:
        column = self._columns["label"]
        text = str(row[column]).strip().lower()
        if text not in (*_TRUE, *_FALSE):
            raise _Bad(f"column {column!r} holds {row[column]!r:.60}, neither true nor false")
        return text in _TRUE

    def _fitted(self, row: dict[str, Any], place: str, dropped: Counter[str]) -> dict[str, Any] | None:
        """The row where it fits `data.sequence_length`, else what `data.overlong` makes of it; None: it is dropped."""
        longest, room = max(self.lengths(row)), self._room
        if longest <= room:
            return row
        policy = self._data.overlong
        prompt = longest if self.method == "grpo" else len(row["prompt_ids"])
        if policy == "error":
            raise DataError(
                f"has {longest:,} tokens, and data.sequence_length leaves room for {room:,}",
                where=place,
                remedy="data.overlong: drop leaves such rows out, truncate cuts their answers.",
            )
        if policy == "drop" or prompt >= room:
            why = "the prompt alone fills data.sequence_length" if prompt >= room else "data.overlong: drop"
            dropped[f"left out: too long ({why})"] += 1
            return None
        dropped["cut at data.sequence_length (data.overlong: truncate)"] += 1
        cut = {
            name: ids[: room - prompt] for name, ids in row.items() if name.endswith("_ids") and name != "prompt_ids"
        }
        return {**row, **cut}


class _Bad(Exception):
    """What is wrong with a row, as a sentence that its place is put before."""


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text.

    Raises:
        DataError: the tokenizer names none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no token that ends a text", where=str(tokenizer.name_or_path))
    return int(tokenizer.eos_token_id)


def _said(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message["content"]}
