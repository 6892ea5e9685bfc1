"""What a model sees of a chat: the ids of its turns by the chat template, or of the text that they are.

A model with a chat template sees its turns through that; a base model has none, so it goes on with the text so far.
Where they outgrow the model's context, the oldest are left out of what it sees, never of the chat, and `Window` counts
them; the system prompt stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, check_places
from gptcli.data.templater import TemplateFault, templater_from
from gptcli.errors import CheckpointError, GptcliError, UsageError, first_line
from gptcli.generation.chat import Chat, Turn, messages
from gptcli.generation.media_prompt import MediaPrompt
from gptcli.generation.text import MOST_CHARACTERS, adds_bos, check_characters, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader

# Of a full context, the part that is kept free for the answer, unless `max_new_tokens` is less.
SHARE_OF_ANSWER = 4


@dataclass(frozen=True)
class Window:
    """What the model sees: its ids, and how much of the chat is left out, for its context is full."""

    ids: list[int]
    turns_left_out: int = 0
    tokens_left_out: int = 0


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def text_so_far(turns: Sequence[Turn], said: str = "") -> str:
    """A chat with a base model as the one text that it is.

    What was said begins a new line, since Enter was pressed before it; nothing stands between it and the answer.
    Nothing said: the model just goes on.
    """
    text = ""
    for part in (*turns, Turn(said, "")):
        between = "\n" if part.said and text and not text.endswith("\n") else ""
        text += between + part.said + part.answer
    return text


def template_ids(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], where: str = "") -> list[int]:
    """The ids of messages by the tokenizer's own template, up to where the answer begins.

    What a message holds of the template's marks is text: nobody can end a turn by writing its end.

    Raises:
        CheckpointError: the template fails, or gives nothing.
    """
    try:
        ids: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
    except (GptcliError, MemoryError):
        raise
    except Exception as error:  # templates are programs of others; jinja2 passes on whatever they raise
        raise CheckpointError(
            f"the model's chat template fails: {first_line(error)[:300]}", where=where or None
        ) from error
    if not ids:
        raise CheckpointError("the model's chat template makes nothing of the messages", where=where or None)
    return [int(token) for token in ids]


def media_ids(
    tokenizer: PreTrainedTokenizerBase,
    chat: Sequence[dict[str, Any]],
    reader: MediaReader,
    media: Sequence[Medium] = (),
    texts: Sequence[str] | None = None,
    where: str = "",
    *,
    tools: Any = None,
) -> list[int]:
    """`template_ids` of messages with a place for each of their media, by the template of a model that reads some.

    `texts`: what stands for each of the media, as far as it has been worked out.

    Raises:
        CheckpointError: the template fails, or has no place for them.
        MediaFault: one cannot be used.
    """
    from transformers.utils.chat_template_utils import encode_marked_chat

    templater = templater_from(tokenizer, reader.tokens)
    marked, tools = templater.as_text(chat, tools)
    try:
        text = templater.placed(templater.render(marked, tools, prompt=True))
    except TemplateFault as fault:
        raise CheckpointError(f"the model's chat template fails: a message {fault}", where=where or None) from None
    if (wrong := check_places(text, media)) is not None:
        raise CheckpointError(f"what the model's chat template makes of the messages {wrong}", where=where or None)
    filled = reader.filled(text, iter(reader.texts(media) if texts is None else texts))
    ids = [int(token) for token in encode_marked_chat(tokenizer, filled)]
    return MediaPrompt(ids, media) if media else ids


def check_system(
    tokenizer: PreTrainedTokenizerBase, system: str, where: str = "", reader: MediaReader | None = None
) -> None:
    """Raise `UsageError` where a system prompt would be refused or left out: by the template, or for want of one."""
    if not system:
        return
    if not has_template(tokenizer):
        raise UsageError(
            "this model has no chat template, so it takes no system prompt",
            remedy="It continues text: what it should know goes in front of the first message.",
        )
    probe = [Turn("a", "b")]

    def ids(chat: list[dict[str, str]]) -> list[int]:
        if reader is not None:
            return media_ids(tokenizer, chat, reader, where=where)
        return template_ids(tokenizer, chat, where)

    without = ids(messages("", probe, "c"))
    try:
        changed = ids(messages(system, probe, "c")) != without
    except CheckpointError as error:
        raise UsageError("the model's chat template takes no system prompt", remedy=error.what) from error
    if not changed:
        raise UsageError("the model's chat template leaves the system prompt out")


def window(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    said: str,
    context: int | None,
    where: str = "",
    *,
    media: Sequence[Medium] = (),
    reader: MediaReader | None = None,
) -> Window:
    """What the model sees of a chat when `said` is to be answered, in which there is a place for each of `media`.

    A quarter of the context is kept free for the answer (less, if `max_new_tokens` is less). Where the turns do not
    fit into the rest, the oldest are left out, as few as possible; of a base model's text its beginning.

    Raises:
        UsageError: the message alone is longer than the context.
        CheckpointError: the template fails.
        MediaFault: an image or a sound cannot be used; `reader` reads them.
    """
    limit = None
    if context is not None:
        limit = max(1, context - min(chat.settings.max_new_tokens, context // SHARE_OF_ANSWER or 1))
    seen = [*(medium for turn in chat.turns for medium in turn.media), *media]
    if not has_template(tokenizer) and not seen:
        return _text_window(tokenizer, text_so_far(chat.turns, said), limit)
    check_characters(said, context)
    texts = reader.texts(seen) if reader is not None else []

    def ids_from(first: int) -> list[int]:
        """What is seen without the turns before `first`."""
        turns, gone = chat.turns[first:], sum(len(turn.media) for turn in chat.turns[:first])
        if not has_template(tokenizer):
            return _text_ids(tokenizer, text_so_far(turns, said), reader, seen[gone:], texts[gone:])
        if reader is not None:
            shown = messages(chat.system, turns, said)
            return media_ids(tokenizer, shown, reader, seen[gone:], texts[gone:], where)
        return template_ids(tokenizer, messages(chat.system, turns, said), where)

    if limit is None:
        return Window(ids_from(0))
    first = _first_by_characters(chat, said, limit)
    last = len(chat.turns)
    best = ids_from(first)
    if len(best) <= limit:
        return Window(best, turns_left_out=first)
    best = ids_from(last)  # if too long, `complete` says so
    low, high = first, last  # by halves: `low` is too long, `high` is the best so far
    while high - low > 1:
        middle = (low + high) // 2
        ids = ids_from(middle)
        if len(ids) <= limit:
            high, best = middle, ids
        else:
            low = middle
    return Window(best, turns_left_out=high)


def _first_by_characters(chat: Chat, said: str, limit: int) -> int:
    """The first turn that may fit by the number of characters, which costs no encoding."""
    left = MOST_CHARACTERS * limit - len(chat.system) - len(said)
    for index in reversed(range(len(chat.turns))):
        left -= len(chat.turns[index].said) + len(chat.turns[index].answer)
        if left < 0:
            return index + 1
    return 0


def _text_ids(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    reader: MediaReader | None,
    media: Sequence[Medium],
    texts: Sequence[str],
) -> list[int]:
    """The ids of a text with a place for each of its media."""
    assert reader is not None
    if (wrong := check_places(text, media)) is not None:
        raise MediaFault("the chat", "not media", wrong)
    return MediaPrompt(encode_prompt(tokenizer, reader.filled(text, iter(texts))), media)


def _text_window(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None) -> Window:
    if limit is None:
        return Window(encode_prompt(tokenizer, text))
    seen = text[-MOST_CHARACTERS * limit :]
    ids = encode_prompt(tokenizer, seen)
    if len(ids) <= limit and len(seen) == len(text):
        return Window(ids)
    head = ids[:1] if adds_bos(tokenizer) and limit > 1 else []
    return Window([*head, *ids[len(ids) - limit + len(head) :]], tokens_left_out=max(1, len(ids) - limit))
