"""Where the assistant's turns stand in a rendered conversation, by any chat template, `{% generation %}` in it or not.

A template is a program, so its text is only ever looked at from outside: contents are found by rendering them replaced
by other texts. A turn begins where the prompt for it would end (`add_generation_prompt`), and ends behind the token
that ends it, which is what a model has to learn to say. Renders of a row: two, and at most three a turn more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gptcli.data.templater import MARK, Message, Rendered, TemplateFault, Templater, common

_MARKS = re.compile("\ue0c1turn(\\d+)\ue0c2")


def supervised(templater: Templater, messages: Sequence[Message], tools: Any = None) -> Rendered:
    """The text of a conversation and the parts that the assistant says, each with the token that ends the turn.

    Turns with `train: false` are left out. Raises `TemplateFault` when the template refuses the conversation, or a turn
    cannot be found.
    """
    turns = [number for number, each in enumerate(messages) if each["role"] == "assistant"]
    trained = [number for number in turns if messages[number].get("train", True)]
    messages, tools = templater.as_text(messages, tools)
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
    text = rendered.text
    return Rendered(text, _joined((_said(templater, text, begin), _end(templater, text, end)) for begin, end in spans))


def _said(templater: Templater, text: str, begin: int) -> int:
    """Where a marked part begins, white space that is not in the prompt for it included: a model has to say that."""
    prompt, gaps = templater.ending.prompt, (gap for gap in templater.ending.gaps if not gap.strip())
    return begin - max((len(gap) for gap in gaps if prompt and text.endswith(prompt + gap, 0, begin)), default=0)


def _end(templater: Templater, text: str, end: int) -> int:
    """Where a marked part ends, the token that ends the turn included."""
    ending = templater.ending
    if ending.token is None:  # then all of the text that ends a turn, of which a mark may hold a part
        rests = (_rest(text, end, each) for each in (ending.last, ending.between))
        return end + max(rests)
    if text[:end].rstrip().endswith(ending.token):
        return end
    found = max((each for each in (ending.last, ending.between) if text.startswith(each, end)), key=len, default=None)
    if found is not None:
        return end + len(found)
    # A mark that ends before what is behind the content, such as a line end.
    match = templater.added.search(text, end)
    return match.end() if match and match[0] == ending.token and not text[end : match.start()].strip() else end


def _rest(text: str, at: int, ending: str) -> int:
    """How many characters of an ending follow at `at`, where its first ones may stand before that."""
    for split in range(len(ending)):
        if text.startswith(ending[split:], at) and text.endswith(ending[:split], 0, at):
            return len(ending) - split
    return 0


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
    if messages[number]["role"] == "assistant" and not text[begin:end].strip():
        raise _unrendered(number)
    return begin, max(begin, end)


def _differs(text: str, other: str, number: int) -> tuple[int, int]:
    if text == other:
        raise _unrendered(number)
    begin = common(text, other)
    most = min(len(text), len(other)) - begin
    return begin, len(text) - min(common(text[::-1], other[::-1]), most)


def _unrendered(number: int) -> TemplateFault:
    return TemplateFault(f"has its message {number + 1} not rendered by the chat template, so it cannot be learnt")


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
