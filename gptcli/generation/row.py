"""One completion while it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gptcli.generation.noise import position_key
from gptcli.generation.stream import TextStream

if TYPE_CHECKING:
    from gptcli.generation.constrain import Matcher


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability by the model itself, before temperature and the like.

    `top` holds the likeliest tokens at its place, the likeliest first. Half a character is shown as U+FFFD.
    """

    id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As an object."""
        shown: dict[str, Any] = {"id": self.id, "token": self.token, "logprob": self.logprob}
        return shown | ({"top": [other.as_json() for other in self.top]} if self.top else {})


@dataclass(frozen=True)
class Completion:
    """A text that follows a prompt; `tokens` counts its tokens without a closing EOS."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """What `generate --json` and the rows of a file hold."""
        shown: dict[str, Any] = {"text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason}
        if self.logprobs is not None:
            shown["logprobs"] = [token.as_json() for token in self.logprobs]
        return shown


@dataclass(eq=False)
class Row:
    """One sequence of a prompt.

    Args:
        prompt: the ids of the prompt, the same object for all sequences of one prompt.
        most: new tokens at most, at least 1.
        key: stands for the sequence in its random numbers.
        decode: ids to text, leaving special tokens out.
        stop_ids: tokens that end a text.
        stop: texts that end it.
        on_text: gets the text piece by piece; without it a text without stop texts is decoded once, at the end.
        matcher: says which tokens can follow, where the output is constrained.
        logprobs: how many of the likeliest tokens to keep at each place, beside the one taken; None keeps nothing.
    """

    prompt: list[int]
    most: int
    key: int
    decode: Callable[[list[int]], str]
    stop_ids: frozenset[int]
    stop: Sequence[str] = ()
    on_text: Callable[[str], None] | None = None
    matcher: Matcher | None = None
    logprobs: int | None = None
    tokens: list[int] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self._stream = TextStream(self.decode, self.prompt, self.stop)
        self._eager = self.on_text is not None or bool(self.stop)
        self._stopped = False
        self._logprobs: list[tuple[float, list[tuple[int, float]]]] = []

    @property
    def position_key(self) -> int:
        """Stands for the next position in its random numbers."""
        return position_key(self.key, len(self.tokens))

    def push(self, token: int, logprobs: tuple[float, list[tuple[int, float]]] | None = None) -> None:
        """Take the next token, its log-probability and the likeliest ones; a row that is done takes no more."""
        if self.done:
            return
        if token in self.stop_ids:
            self.done = self._stopped = True
            return
        self.tokens.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if self.matcher is not None:
            self.matcher.advance(token)
        if self._eager:
            self._show(self._stream.push(token))
        self._stopped = self._stream.stopped or (self.matcher is not None and self.matcher.done)
        self.done = self._stopped or len(self.tokens) >= self.most

    def finish(self) -> Completion:
        """Hand out what was held back; nothing can follow."""
        if not self._eager:
            self._show(self._stream.push(*self.tokens))
        self._show(self._stream.finish())
        return Completion(
            self._stream.text,
            len(self.tokens),
            "stop" if self._stopped or self._stream.stopped else "length",
            None if self.logprobs is None else tuple(self._spelled()),
        )

    def _spelled(self) -> Iterator[TokenLogprob]:
        for token, (logprob, top) in zip(self.tokens, self._logprobs, strict=True):
            others = tuple(TokenLogprob(other, self.decode([other]), value) for other, value in top)
            yield TokenLogprob(token, self.decode([token]), logprob, others)

    def _show(self, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(piece)
