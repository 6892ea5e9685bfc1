"""The media of conversations: parts of messages, in the forms that others write them, become places in the text.

Forms: transformers' and TRL's parts ({"type": "image"}, with or without their value), OpenAI's ("image_url",
"input_audio"), and `<image>` in a text beside a column of images, as LLaVA's and LLaMA-Factory's sets have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import Medium, Modality, media_in, place_of
from gptcli.data.media.reference import Reach

_WRITTEN = re.compile("<(image|audio|video)>")
_VALUES = ("path", "url", "base64", "bytes", "data", "array")


def extracted(
    row: dict[str, Any], column: str, media: Mapping[Modality, Sequence[Medium]], reach: Reach
) -> tuple[dict[str, Any], list[Medium]]:
    """A row whose messages are texts alone, with a place for each of their media, and these in their order.

    What the messages do not bring themselves is the next of the row's `media`, which all have to be used.

    Raises:
        MediaFault: a part holds no medium, or names one that it must not; there are more places than media, or fewer.
    """
    if not isinstance(row.get(column), list):  # what it is instead is told where messages are checked
        return row, []
    waiting = {modality: list(found) for modality, found in media.items()}
    placed: list[Medium] = []

    def place(modality: Modality, value: Any, at: int) -> str:
        if value is None:
            if not waiting.get(modality):
                raise MediaFault(f"message {at}", "not media", f"has a place for a {modality}, and the row has no more")
            placed.append(waiting[modality].pop(0))
            return place_of(modality)
        found = media_in([value] if modality == "video" and isinstance(value, list) else value, modality, reach)
        placed.extend(found)
        return place_of(modality) * len(found)

    messages = [_text_alone(at, message, place, waiting) for at, message in enumerate(row[column], start=1)]
    for modality, left in waiting.items():
        if left:
            more = f"has {len(left)} {modality}{'s' * (len(left) > 1)} more than there are places in its messages"
            raise MediaFault("the row", "not media", more)
    return {**row, column: messages}, placed


def _text_alone(at: int, message: Any, place: Any, waiting: Mapping[Modality, Sequence[Medium]]) -> Any:
    if not isinstance(message, dict):
        return message
    key = "value" if "value" in message and "content" not in message else "content"
    content = message.get(key)

    def written(text: str) -> str:
        """A text with places where it says `<image>`, where the row has a column of images."""
        return _WRITTEN.sub(lambda found: place(found[1], None, at) if found[1] in waiting else found[0], text)

    if isinstance(content, str):
        return {**message, key: written(content)}
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for part in content:
        modality = modality_of(part)
        if modality is not None:
            parts.append({"type": "text", "text": place(modality, _value(part, modality), at)})
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            parts.append({**part, "type": part.get("type") or "text", "text": written(part["text"])})
        else:
            parts.append(part)
    return {**message, key: parts}


def modality_of(part: Any) -> Modality | None:
    """Which medium a part of a message is; None: none."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        return None
    found = _WRITTEN.fullmatch(f"<{kind.removesuffix('_url').removeprefix('input_')}>")
    return found[1] if found else None  # type: ignore[return-value]


def _value(part: Mapping[str, Any], modality: Modality) -> Any:
    """What a part holds; None: nothing, so it stands for the next medium of the row."""
    for key in (modality, f"{modality}_url", f"input_{modality}"):
        if (value := part.get(key)) is not None:
            if isinstance(value, dict) and set(value) & {"url", "base64", "data"} and "array" not in value:
                return _written_out(value)
            return value
    if part.get("array") is not None or part.get("bytes") is not None:
        return {key: part[key] for key in (*_VALUES, "sampling_rate") if key in part}
    return _written_out(part)


def _written_out(value: Mapping[str, Any]) -> Any:
    """A path or address; base64 becomes a data URL."""
    for key in ("base64", "data"):
        if isinstance(value.get(key), str):
            text = value[key]
            return text if text.startswith("data:") else f"data:;base64,{text}"
    return value.get("url") or value.get("path")
