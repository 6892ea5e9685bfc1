"""Where the assistant's turns stand in a rendered conversation, for any chat template, with `{% generation %}` or without.

A template is a program, so its text is only ever looked at from outside: contents are found by rendering them replaced
by other texts. A turn begins where the prompt for it would end (`add_generation_prompt`), and ends behind the token
that ends it, which is what a model has to learn to say. Renders of a row: two, and at most three a turn more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gptcli.errors import RecipeError, first_line

Message = dict[str, Any]
# Characters for private use stand at both ends, so that nothing around them can be taken for a part of it.
MARK = "\ue0c1turn{}\ue0c2"
_MARKS = re.compile("\ue0c1turn(\\d+)\ue0c2")
SET_ONE = "Set tokenizer.chat_template: chatml (or llama3, or a file), or use a tokenizer that brings its own."
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
    """

    tokenizer: Any
    added: re.Pattern[str]
    eating: tuple[str, ...]
    _cache: dict[bool, str] = field(default_factory=dict, compare=False)

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
        self, messages: Sequence[Message], tools: Any, prompt: bool, *, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # As `apply_chat_template` calls it: that gives either the text or the tokens of the marks, not their places.
        shown = [
            {key: value for key, value in each.items() if key != "train" and value is not None} for each in messages
        ]
        try:
            texts, spans = render_jinja_template(
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
        return texts[0], list(spans[0]) if marks else []


def open_templater(folder: Path, *, where: str | None = None) -> Templater:
    """The chat template of a tokenizer's folder. Raises `RecipeError` when it has none, with how to set one."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    finally:
        logging.set_verbosity(before)
    if not tokenizer.chat_template:
        raise RecipeError("format chat needs a chat template, and the tokenizer has none", where=where, remedy=SET_ONE)
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    added = sorted((token.content for token in tokens), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, added)) or "(?!)")
    templater = Templater(tokenizer, pattern, tuple(token.content for token in tokens if token.rstrip))
    try:
        _ = templater.ending
    except TemplateFault as error:
        raise RecipeError(
            f"the chat template cannot be trained on: a short conversation {error}", where=where
        ) from None
    return templater


def supervised(templater: Templater, messages: Sequence[Message], tools: Any = None) -> Rendered:
    """The text of a conversation and the parts that the assistant says, each with the token that ends the turn.

    Turns with `train: false` are left out. Raises `TemplateFault` when the template refuses the conversation, or a turn
    cannot be found.
    """
    turns = [number for number, each in enumerate(messages) if each["role"] == "assistant"]
    trained = [number for number in turns if messages[number].get("train", True)]
    if not trained:
        return Rendered(templater.render(messages, tools), [])
    if not templater.has_marks(tools):
        return _located(templater, messages, tools, trained)
    rendered = templater.render_marked(messages, tools)
    if not rendered.spans:
        raise TemplateFault("has no turn in the {% generation %} marks of the chat template")
    spans = rendered.spans
    if len(trained) < len(turns):
        if len(spans) == len(turns):
            spans = [spans[turns.index(number)] for number in trained]
        else:  # the marks are not one a turn: a span belongs to the turn that it lies in
            places = _located(templater, messages, tools, trained).spans
            spans = [span for span in spans if any(begin <= span[0] < end for begin, end in places)]
    return Rendered(rendered.text, _joined((begin, _end(templater, rendered.text, end)) for begin, end in spans))


def _end(templater: Templater, text: str, end: int) -> int:
    """Where a marked part ends, the token that ends the turn included."""
    ending = templater.ending
    if ending.token is None or text[:end].rstrip().endswith(ending.token):
        return end
    found = max((each for each in (ending.last, ending.between) if text.startswith(each, end)), key=len, default=None)
    if found is not None:
        return end + len(found)
    # A mark that ends before what is behind the content, such as a line end.
    match = templater.added.search(text, end)
    return match.end() if match and match[0] == ending.token and not text[end : match.start()].strip() else end


def _located(templater: Templater, messages: Sequence[Message], tools: Any, trained: Sequence[int]) -> Rendered:
    text = templater.render(messages, tools)
    contents = _plain_contents(templater, messages, tools, trained, text)
    spans = []
    for number in trained:
        if messages[number].get("tool_calls"):
            begin, end = _call_turn(templater, messages, tools, number, text)
        else:
            place = contents[number] if contents else _one_content(templater, messages, tools, number, text)
            begin = _begin(templater, messages, tools, number, text, place[0])
            end = place[1] + len(_ending_at(templater, text, place[1]))
        spans.append((begin, end))
    return Rendered(text, _joined(spans))


def _plain_contents(
    templater: Templater, messages: Sequence[Message], tools: Any, trained: Sequence[int], text: str
) -> dict[int, tuple[int, int]] | None:
    """Where all contents stand, where the template copies them (without white space at their ends): one render."""
    if any(messages[number].get("tool_calls") for number in trained):
        return None
    replaced = {number: {**messages[number], "content": MARK.format(number)} for number in trained}
    frame = templater.render([replaced.get(number, each) for number, each in enumerate(messages)], tools)
    pieces = _MARKS.split(frame)
    if [int(number) for number in pieces[1::2]] != list(trained) or not text.startswith(pieces[0]):
        return None
    places = {}
    at = len(pieces[0])
    for number, behind in zip(trained, pieces[2::2], strict=True):
        content = messages[number]["content"]
        for each in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(each, at) and text.startswith(behind, at + len(each)):
                places[number] = (at, at + len(each))
                at += len(each) + len(behind)
                break
        else:
            return None
    return places if at == len(text) else None


def _one_content(
    templater: Templater, messages: Sequence[Message], tools: Any, number: int, text: str
) -> tuple[int, int]:
    """Where one content stands that the template changes: between what is the same when it is another text."""
    other = templater.render(_with(messages, number, content=MARK.format(number)), tools)
    begin, end = _differs(text, other, number)
    return begin, max(begin, end)


def _differs(text: str, other: str, number: int) -> tuple[int, int]:
    if text == other:
        raise TemplateFault(f"has its message {number + 1} not rendered by the chat template, so it cannot be learnt")
    begin = _common(text, other)
    most = min(len(text), len(other)) - begin
    return begin, len(text) - min(_common(text[::-1], other[::-1]), most)


def _begin(templater: Templater, messages: Sequence[Message], tools: Any, number: int, text: str, content: int) -> int:
    """Where a turn begins: behind the prompt for it, or with its content where the text does not begin with that."""
    ending = templater.ending
    for gap in ending.gaps:
        if ending.prompt and text.endswith(ending.prompt + gap, 0, content):
            return content - len(gap)
    try:
        prompt = templater.render(messages[:number], tools, prompt=True)
    except TemplateFault:  # as of two answers in a row, where nobody asked for the second
        return content
    return len(prompt) if len(prompt) <= content and text.startswith(prompt) else content


def _call_turn(
    templater: Templater, messages: Sequence[Message], tools: Any, number: int, text: str
) -> tuple[int, int]:
    """A turn that calls functions: from the prompt for it to the first token that ends it behind the last call."""
    message = messages[number]
    calls = [*message["tool_calls"]]
    calls[-1] = {**calls[-1], "function": {"name": MARK.format(number), "arguments": {"a": MARK.format(number)}}}
    first, end = _differs(text, templater.render(_with(messages, number, tool_calls=calls), tools), number)
    if message.get("content"):
        first = min(first, _one_content(templater, messages, tools, number, text)[0])
    begin = _begin(templater, messages, tools, number, text, first)
    limit = len(text)
    if number + 1 < len(messages):
        limit = max(end, _one_content(templater, messages, tools, number + 1, text)[0])
    found = [match for match in templater.added.finditer(text, end, limit)]
    token = templater.ending.token
    chosen = next((match for match in found if match[0] == token), None)
    if chosen is None:
        special = set(templater.tokenizer.all_special_tokens)
        chosen = next((match for match in found if match[0] in special), None)
    if chosen is None and token is not None:
        raise TemplateFault(f"has no end of its message {number + 1} in what the chat template renders")
    return begin, chosen.end() if chosen is not None else end


def _ending_at(templater: Templater, text: str, at: int) -> str:
    """The text that ends a turn whose content ends at `at`."""
    ending = templater.ending
    found = max((each for each in (ending.last, ending.between) if text.startswith(each, at)), key=len, default="")
    if found or ending.token is None:
        return found
    match = templater.added.search(text, at)
    return text[at : match.end()] if match and not text[at : match.start()].strip() else ""


def _ending(templater: Templater) -> Ending:
    said, answered, again = (MARK.format(number) for number in range(3))
    user, answer = {"role": "user", "content": said}, {"role": "assistant", "content": answered}
    alone = templater.render([user, answer])
    before, mark, behind = alone.partition(answered)
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
    ended = next((at for at, unit in enumerate(units) if templater.added.fullmatch(unit)), None)
    return "".join(units[: ended + 1]) if ended is not None else "".join(units)


def _units(added: re.Pattern[str], text: str) -> list[str]:
    """Added tokens and what stands between them."""
    found, at = [], 0
    for match in added.finditer(text):
        found += [text[at : match.start()], match[0]]
        at = match.end()
    return [unit for unit in (*found, text[at:]) if unit]


def _joined(spans: Any) -> list[tuple[int, int]]:
    """Parts in order, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > begin:
            joined.append((begin, end))
    return joined


def _with(messages: Sequence[Message], number: int, **changes: Any) -> list[Message]:
    return [{**each, **changes} if at == number else each for at, each in enumerate(messages)]


def _common(a: str, b: str) -> int:
    """How many first characters two texts share, found by halves."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
