"""Tokens one by one into text that is certain.

A character may be spread over several tokens, so nothing is handed out before its bytes are whole; a stop string may
be spread over several pieces, so what could be the beginning of one is held back too. All pieces joined are the
decoded completion, cut at the first stop string. Work a token: decoding the few tokens since the last piece.

Certain is each token's text, so that is shown at once, not a word's at its end. The unit is Unicode's character, not
what is seen as one: 👩‍👩‍👧 comes as five pieces at most, é as e and its accent. A terminal joins them whatever the
pieces were, for it sees a stream of bytes and no pieces; and nobody could say that no other joiner follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
# No character has more bytes, so of so many tokens the first are no beginning of one any more.
LONGEST = 4
MOST_HELD = 16


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
        if new and not new.endswith(INCOMPLETE):
            self._settle(len(self._ids))
            return self._hand_out(new, last=False)
        return self._not_held_for_ever(new) if len(self._ids) - self._context > MOST_HELD else ""

    def finish(self) -> str:
        """Return what was held back; the completion has ended."""
        if self.stopped:
            return ""
        new = self._new_text() if len(self._ids) > self._context else ""
        self._ids, self._context = [], 0
        return self._hand_out(new, last=True)

    def _settle(self, end: int) -> None:
        """The tokens before `end` have been handed out: they are the context of those behind them."""
        self._ids, self._context = self._ids[self._context :], end - self._context

    def _not_held_for_ever(self, new: str) -> str:
        """Of bytes that never become a character, which an untrained model writes, those that are past hope.

        Without this they would be decoded again with every further one.
        """
        if not new:  # special tokens, of which no text is made
            del self._ids[self._context :]
            return ""
        held = self._decode(self._ids[self._context :])
        for end in range(len(self._ids) - LONGEST, len(self._ids) - 2 * LONGEST, -1):  # not within a character
            first, before = self._new_text(end), self._decode(self._ids[self._context : end])
            if first and first + held.removeprefix(before) == new:
                self._settle(end)
                return self._hand_out(first, last=False)
        return ""

    def _new_text(self, end: int | None = None) -> str:
        context, whole = self._decode(self._ids[: self._context]), self._decode(self._ids[:end])
        if whole.startswith(context):
            return whole[len(context) :]
        # Byte-fallback decoders give up on a whole run of bytes when a later one of them is invalid.
        return self._decode(self._ids[self._context : end])

    def _hand_out(self, new: str, *, last: bool) -> str:
        text = self._held + new
        # The one that is whole first, wherever the pieces end; of those that end there, the longest.
        found = [(position + len(stop), position) for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, piece, self._held = True, text[: min(found)[1]], ""
        else:
            held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
            piece, self._held = text[: len(text) - held], text[len(text) - held :]
        if piece:
            self._pieces.append(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
