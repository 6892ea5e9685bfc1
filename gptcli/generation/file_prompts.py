"""What the prompt of a file's row is: its column, or a template filled with its columns, with its images and sounds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcli.data.columns import missing_text
from gptcli.data.formats import filled_prompt
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, Modality, hashed, media_in, place_of
from gptcli.data.media.reference import Reach
from gptcli.errors import DataError, UsageError
from gptcli.generation.media_prompt import media_prompt
from gptcli.generation.text import check_characters, encode_prompt
from gptcli.recipe.template import PROMPT, Template, parse_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader


@dataclass(frozen=True)
class PromptForm:
    """What makes a prompt of a row.

    Attributes:
        column: of the prompts; with a template, a column that every row has to have.
        template: `{image}\\nWhat is {thing}?`; None: the column as it is, behind the row's media.
        media: the columns that hold media, by their kind.
        allow_urls: whether they may be fetched.
    """

    column: str
    template: str | None = None
    media: tuple[tuple[Modality, tuple[str, ...]], ...] = ()
    allow_urls: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a prompt is what a column holds."""
        return self.template is None and not self.media

    @property
    def identity(self) -> dict[str, Any]:
        """What of it decides the output, beside the column; nothing where it is plain."""
        if self.is_plain:
            return {}
        return {"template": self.template, "media": [[kind, *columns] for kind, columns in self.media]}

    @functools.cached_property
    def _parsed(self) -> Template:
        return parse_template(self.template if self.template is not None else PROMPT)

    def filled(self, values: dict[str, Any], reach: Reach) -> tuple[str, tuple[Medium, ...]]:
        """The prompt of a row, with a place for each of its media, and these in their order.

        Raises:
            DataError: a column is not there, or holds no text.
            MediaFault: one names what it must not, or there are more places than media, or fewer.
        """
        media = {}
        for kind, columns in self.media:
            for column in columns:
                if column not in values:
                    raise MediaFault("the row", "not media", f"has no column {column!r}")
                media[column] = media_in(values[column], kind, reach)
        if self.template is None:
            found = [medium for each in media.values() for medium in each]
            front = "".join(f"{place_of(medium.modality)}\n" for medium in found)
            return front + values[self.column], tuple(found)
        places = {*media, *(kind for kind, _ in self.media)}
        if (wrong := missing_text(values, [each for each in self._parsed.columns if each not in places])) is not None:
            raise DataError(wrong)
        return filled_prompt(self._parsed, values, self.media, media)


def form_of(
    column: str | None, template: str | None, media: dict[Modality, list[str] | None], *, allow_urls: bool = False
) -> PromptForm:
    """The form that a command asks for.

    Raises:
        UsageError: the template is none, or a column of media is no place in it.
    """
    kinds = tuple((kind, tuple(dict.fromkeys(columns))) for kind, columns in media.items() if columns)
    if template is None:
        return PromptForm(column or PROMPT.strip("{}"), None, kinds, allow_urls)
    if column is not None:
        raise UsageError("--template and --prompt-column exclude each other", remedy=f"Write {{{column}}} in it.")
    try:
        used = parse_template(template).columns
    except ValueError as error:
        raise UsageError(f"--template: {error}") from None
    for kind, columns in kinds:
        if unused := [each for each in columns if each not in used and kind not in used]:
            what = f"--{kind}-column {unused[0]} has no place in the template"
            raise UsageError(what, remedy=f"Write {{{kind}}} there.")
    places = {each for kind, columns in kinds for each in (kind, *columns)}
    needed = [each for each in used if each not in places] or [columns[0] for _, columns in kinds]
    return PromptForm(needed[0], template, kinds, allow_urls)


def prompt_of(
    values: dict[str, Any],
    form: PromptForm,
    reach: Reach,
    reader: MediaReader | None,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> list[int]:
    """The ids of the prompt of a row; one with media is a `MediaPrompt`, which knows what they hold.

    Raises:
        DataError, UsageError, MediaFault: it cannot be one; without its place.
    """
    text, media = form.filled(values, reach)
    check_characters(text, context)
    if not media:
        return encode_prompt(tokenizer, text)
    assert reader is not None
    return media_prompt(reader, tokenizer, text, [hashed(medium) for medium in media])
