"""Images and sounds in the messages that clients send: read by gptcli's own code, not by transformers' server.

That one would fetch any address and open any file of this machine that a client names, and leaves out, without a word,
the parts that a model cannot read. Here a part is a data: URL (an http one where the server allows it), and every part
is understood or answered with what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium
from gptcli.data.media.parts import extracted, modality_of
from gptcli.data.media.reference import Reach
from gptcli.errors import GptcliError
from gptcli.generation.media_prompt import fetched_once, media_inputs
from gptcli.generation.window import media_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.data.media.reader import MediaReader

# What transformers' server itself says to a template, none of which changes what a chat is here.
_SERVERS = {
    "add_generation_prompt",
    "return_tensors",
    "return_dict",
    "tokenize",
    "load_audio_from_video",
    "num_frames",
}
_TEXTS = ("text", "input_text", "output_text")
Convert = Callable[[list[dict[str, Any]], Any], list[dict[str, Any]]]


class Sees:
    """A tokenizer for transformers' server that takes media in messages too."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reader: MediaReader, *, allow_urls: bool
    ) -> None:
        self.tokenizer = tokenizer
        self._model, self._reader = model, reader
        reached = "the server is started with --allow-urls"
        self._reach = Reach(Path("/"), allow_outside=True, allow_urls=allow_urls, urls_by=reached)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tools: Any = None, **how: Any) -> Any:
        """What the model takes of messages, up to where its answer begins.

        Raises:
            ValueError: they hold a medium that cannot be used, or the template fails.
        """
        if unknown := sorted({*how} - _SERVERS):
            raise ValueError(f"chat_template_kwargs ({', '.join(unknown)}) are not taken with images and sounds")
        import torch
        from transformers import BatchFeature

        try:
            row, media = extracted({"messages": messages}, "messages", {}, self._reach)
            for medium in media:
                _check_source(medium)
            media = [fetched_once(medium) for medium in media]
            chat = [{**message, "content": _text(message.get("content"))} for message in row["messages"]]
            ids = media_ids(self.tokenizer, chat, self._reader, media, tools=tools)
            inputs = torch.tensor([ids])
            made = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
            return BatchFeature(made | media_inputs(self._model, self._reader, [ids], inputs))
        except (MediaFault, GptcliError) as error:
            raise ValueError(str(error) if isinstance(error, MediaFault) else error.what) from None


def checked(convert: Convert, reader: MediaReader | None) -> Convert:
    """The server's own way to make a template's messages of a client's, for parts that the model reads.

    Without a reader the model reads text alone. What it makes raises `ValueError` for any other part.
    """

    def converted(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        for message in messages:
            for part in _parts(message):
                _check_part(part, reader)
        if reader is None:
            return convert(messages, modality)
        plain = [{**message, "content": ""} if _parts(message) else message for message in messages]
        made = convert(plain, modality)
        return [
            {**each, "content": _parts(message) or each["content"]}
            for each, message in zip(made, messages, strict=True)
        ]

    return converted


def _parts(message: dict[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) and "tool_calls" not in message else ()


def _check_part(part: Any, reader: MediaReader | None) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return
    modality = modality_of(part)
    if modality is None:
        raise ValueError(f"a content part of the type {str(kind)[:60]!r} is not understood")
    if reader is None or modality not in reader.tokens:
        raise ValueError(f"this model reads no {modality}s")


def _check_source(medium: Medium) -> None:
    for each in medium.value if isinstance(medium.value, list) else [medium.value]:
        if isinstance(each.source, Path):
            what = f"{medium.modality} {medium.name} is no data: URL"
            raise ValueError(f"{what} (data:image/png;base64,...); files of the server are not read")


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return str(content or "")
