"""Tokens one by one into text that is certain.

A character may be spread over several tokens, so nothing is handed out before its bytes are whole; a stop string may
be spread over several pieces, so what could be the beginning of one is held back too. All pieces joined are the
decoded completion, cut at the first stop string. Work a token: decoding the few tokens since the last piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes the tokens that follow a prompt.

    Args:
        decode: ids to text, leaving special tokens out.
        prompt_ids: what came before: tokenizers drop the space before a text's first word, which is none here.
        stop: texts at which to stop; they are not part of the completion.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_ids)  # context, then the tokens not handed out yet
        self._context = len(self._ids)
        self._stop = tuple(stop)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was handed out."""
        return "".join(self._pieces)

    def push(self, *tokens: int) -> str:
        """Take the next tokens; return the text that is certain now (often nothing)."""
        if self.stopped:
            return ""
        self._ids.extend(tokens)
        new = self._new_text()
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        return self._hand_out(new, last=False)

    def finish(self) -> str:
        """Return what was held back; the completion has ended."""
        if self.stopped:
            return ""
        new = self._new_text() if len(self._ids) > self._context else ""
        self._ids, self._context = [], 0
        return self._hand_out(new, last=True)

    def _new_text(self) -> str:
        context, whole = self._decode(self._ids[: self._context]), self._decode(self._ids)
        if whole.startswith(context):
            return whole[len(context) :]
        # Byte-fallback decoders give up on a whole run of bytes when a later one of them is invalid.
        return self._decode(self._ids[self._context :])

    def _hand_out(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, piece, self._held = True, text[: min(found)], ""
        else:
            held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
            piece, self._held = text[: len(text) - held], text[len(text) - held :]
        if piece:
            self._pieces.append(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
