"""A tokenizer's chat template, ready to render, and how it ends a turn: seen from a short conversation.

A template is a program, so its text is only ever looked at from outside. It is rendered as transformers'
`apply_chat_template` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptcli.data.media.item import PLACE, Modality, place_of
from gptcli.errors import RecipeError, first_line

Message = dict[str, Any]
# Characters for private use stand at both ends, so that nothing around them can be taken for a part of it.
MARK = "\ue0c1turn{}\ue0c2"
SET_ONE = "Set tokenizer.chat_template: chatml (or llama3, or a file), or use a tokenizer that brings its own."
# Not behind the mark that `as_text` puts before what a user has written (transformers' `mark_control_tokens`).
_UNMARKED = "(?<!\U000f0000)"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateFault(Exception):
    """A template refuses a conversation, or a turn of it cannot be found in what it renders."""


class Rendered(NamedTuple):
    """The text of a conversation and its trained parts [begin, end), in order."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Ending:
    """How a template ends a turn of the assistant.

    Attributes:
        last: the text behind the content of a last turn, up to its first added token; all of it if there is none.
        between: the same of a turn that another follows.
        token: the added token in it; None: the template has none.
        prompt: the text that the template puts before an answer, "" if it cannot be told from what was said.
        gaps: what may stand between that and the content.
    """

    last: str
    between: str
    token: str | None
    prompt: str
    gaps: tuple[str, ...]


@dataclass(frozen=True)
class Templater:
    """A tokenizer's chat template, ready to render.

    Attributes:
        tokenizer: transformers' own; it chooses among several templates, and names the special tokens.
        added: a pattern of the tokens that are found in a text before any other.
        eating: those of them that take the white space behind them.
        special: the special ones among them.
        others: those that are not.
        media: the placeholders of images and sounds, by their kind, of a model that reads some.
    """

    tokenizer: Any
    added: re.Pattern[str]
    eating: tuple[str, ...]
    special: tuple[str, ...]
    others: tuple[str, ...]
    media: Mapping[Modality, str] = field(default_factory=dict, compare=False)
    _cache: dict[bool, str] = field(default_factory=dict, compare=False)
    _patterns: dict[bool, tuple[re.Pattern[str], re.Pattern[str]]] = field(default_factory=dict, compare=False)

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The text of messages; `prompt`: up to where an answer begins. Raises `TemplateFault`."""
        return self._render(messages, tools, prompt, marks=False)[0]

    def render_marked(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """The text of messages and what stands in the template's `{% generation %}` marks."""
        text, spans = self._render(messages, tools, False, marks=True)
        return Rendered(text, [(begin, end) for begin, end in spans if end > begin])

    def has_marks(self, tools: Any) -> bool:
        """Whether the template has `{% generation %}` marks."""
        return bool(_GENERATION.search(self._template(tools)))

    def eats_space(self, text: str, at: int) -> bool:
        """Whether the token that ends at `at` takes the white space behind it."""
        return bool(self.eating) and text.endswith(self.eating, 0, at)

    def as_text(self, messages: Sequence[Message], tools: Any) -> tuple[list[Message], Any]:
        """Messages and tools with the template's marks in them as text, as `generate` has a chat: it marks them so.

        In an answer that is meant for special tokens alone: what else a template writes there (<think>, <tool_call>) is
        what an answer consists of.
        """
        from transformers.utils.chat_template_utils import mark_control_tokens

        special, control = self._controls(tools)
        marked = [mark_control_tokens(each, special if each["role"] == "assistant" else control) for each in messages]
        return marked, mark_control_tokens(tools, control)

    def _controls(self, tools: Any) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """The special tokens, and these with the others that the template writes."""
        key = tools is not None
        if key not in self._patterns:
            template = self._template(tools)
            written = [token for token in self.others if token in template]
            self._patterns[key] = (_pattern(self.special), _pattern([*self.special, *written]))
        return self._patterns[key]

    @cached_property
    def parts(self) -> Literal["never", "media", "always"]:
        """Which messages a template wants as parts: none, those with media, for which it writes more, or all."""
        if not self.media:
            return "never"
        modality, token = next(iter(self.media.items()))
        said = MARK.format(0)
        message = {"role": "user", "content": [{"type": modality}, {"type": "text", "text": said}]}
        try:
            text = self._render([message], None, False, marks=False, wants="always")[0]
        except TemplateFault:
            return "never"
        if text.count(token) != 1 or text.count(said) != 1 or "'type'" in text:
            return "never"
        try:
            plain = self._render([{"role": "user", "content": said}], None, False, marks=False, wants="never")[0]
        except TemplateFault:
            return "always"
        return "media" if plain.count(said) == 1 else "always"

    def placed(self, text: str) -> str:
        """A rendered text with the marks of media for the placeholders that the template has written itself."""
        if self.parts == "never":
            return text
        names = {token: modality for modality, token in self.media.items()}
        pattern = re.compile(f"{_UNMARKED}({'|'.join(map(re.escape, names))})")
        return pattern.sub(lambda found: place_of(names[found[1]]), text)

    @cached_property
    def ending(self) -> Ending:
        """Seen from a short conversation. Raises `TemplateFault` when the template does not render its answer."""
        return _ending(self)

    def _template(self, tools: Any) -> str:
        key = tools is not None
        if key not in self._cache:
            self._cache[key] = self.tokenizer.get_chat_template(None, tools)
        return self._cache[key]

    def _render(
        self, messages: Sequence[Message], tools: Any, prompt: bool, *, marks: bool, wants: str | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # As `apply_chat_template` calls it: that gives either the text or the tokens of the marks, not their places.
        shown = [
            {key: value for key, value in each.items() if key != "train" and value is not None} for each in messages
        ]
        wants = self.parts if wants is None else wants
        if wants != "never":
            shown = [{**each, "content": _as_parts(each.get("content"), always=wants == "always")} for each in shown]
        try:
            rendered: Any = render_jinja_template(
                conversations=[shown],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # templates are programs of others; jinja2 passes on whatever they raise
            raise TemplateFault(f"is refused by the chat template: {first_line(error)[:200]}") from None
        texts, spans = rendered
        return texts[0], list(spans[0]) if marks else []


def _as_parts(content: Any, *, always: bool) -> Any:
    """A content as the list of parts that templates of models with media take."""
    if not isinstance(content, str) or not (always or PLACE.search(content)):
        return content
    texts = PLACE.split(content)
    parts = [{"type": text} if index % 2 else {"type": "text", "text": text} for index, text in enumerate(texts)]
    return [part for part in parts if part.get("text") != ""]


def open_templater(folder: Path, *, where: str | None = None, media: Mapping[Modality, str] | None = None) -> Templater:
    """The chat template of a tokenizer's folder; `media`: the placeholders of a model that reads some.

    Raises `RecipeError` when it has none, with how to set one.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if not tokenizer.chat_template:
        raise RecipeError("format chat needs a chat template, and the tokenizer has none", where=where, remedy=SET_ONE)
    templater = templater_from(tokenizer, media)
    try:
        _ = templater.ending
    except TemplateFault as error:
        raise RecipeError(
            f"the chat template cannot be trained on: a short conversation {error}", where=where
        ) from None
    return templater


def templater_from(tokenizer: Any, media: Mapping[Modality, str] | None = None) -> Templater:
    """The chat template of a tokenizer of transformers, with the placeholders of a model that reads media."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    return Templater(
        tokenizer,
        _pattern([token.content for token in tokens]),
        tuple(token.content for token in tokens if token.rstrip),
        tuple(token.content for token in tokens if token.special),
        tuple(token.content for token in tokens if not token.special),
        media or {},
    )


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """What matches any of some tokens, the longest one at a place."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def end_of_turn(tokenizer: Any, media: Mapping[Modality, str] | None = None) -> list[int]:
    """The id of the token with which a tokenizer's template ends an answer; [] without template or token.

    Many tokenizers name another token as their EOS, and then a model would go on and speak for the user. `media`: the
    placeholders of a model that reads some.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        token = templater_from(tokenizer, media).ending.token
    except TemplateFault:  # told when the template is used
        return []
    return [] if token is None else [int(tokenizer.convert_tokens_to_ids(token))]


def _ending(templater: Templater) -> Ending:
    said, answered, again = (MARK.format(number) for number in range(3))
    user, answer = {"role": "user", "content": said}, {"role": "assistant", "content": answered}
    alone = templater.render([user, answer])
    before, mark, behind = alone.partition(answered)
    if not mark and templater.has_marks(None):  # it takes a content apart, and says where
        marked = templater.render_marked([user, answer])
        if marked.spans:
            mark, before, behind = answered, marked.text[: marked.spans[0][0]], marked.text[marked.spans[-1][1] :]
    if not mark:
        raise TemplateFault("has no turn of the assistant in what the chat template renders")
    pattern = templater.added
    match = pattern.search(behind)
    last = behind[: match.end()] if match else behind
    token = match[0] if match else None
    between = _between(templater, [user, answer, {"role": "user", "content": again}], said, answered, again)
    prompt = templater.render([user], prompt=True)
    plain = templater.render([user])
    begins = prompt[len(plain) :] if prompt.startswith(plain) else ""
    begins = begins or prompt.partition(said)[2]
    gaps = {""}
    if begins and before.startswith(prompt):
        gaps.add(before[len(prompt) :])
    return Ending(last, between, token, begins, tuple(sorted(gaps, key=len, reverse=True)))


def _between(templater: Templater, messages: list[Message], said: str, answered: str, again: str) -> str:
    """What ends a turn that a turn of the user follows, whose own beginning is known from the first one's."""
    try:
        text = templater.render(messages)
    except TemplateFault:
        return ""
    before, _, _ = text.partition(said)
    gap, mark, _ = text.partition(answered)[2].partition(again)
    if not mark:
        return ""
    units, header = (_units(templater.added, each) for each in (gap, before))
    while units and header and units[-1] == header[-1]:
        units.pop()
        header.pop()
    if units and header and not templater.added.fullmatch(units[-1]):  # of texts, the characters that they share
        shared = common(units[-1][::-1], header[-1][::-1])
        units[-1] = units[-1][: len(units[-1]) - shared]
    ended = next((at for at, unit in enumerate(units) if templater.added.fullmatch(unit)), None)
    return "".join(units[: ended + 1]) if ended is not None else "".join(units)


def _units(added: re.Pattern[str], text: str) -> list[str]:
    """Added tokens and what stands between them."""
    found, at = [], 0
    for match in added.finditer(text):
        found += [text[at : match.start()], match[0]]
        at = match.end()
    return [unit for unit in (*found, text[at:]) if unit]


def common(a: str, b: str) -> int:
    """How many first characters two texts share, found by halves."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
