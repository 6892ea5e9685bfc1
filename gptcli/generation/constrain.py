"""Output that cannot but be what was asked for: JSON of a schema, or a text that a regular expression matches whole.

llguidance (extra `constrain`) says before each token which ones may follow; all others get a score of minus infinity.
It works on bytes, so a character that takes several tokens is allowed piece by piece. It is one wheel without further
packages, and knows JSON Schema; what a schema asks for beyond that is refused, never left unchecked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import MissingError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Between the tokens of JSON: with any number of spaces and new lines a weak model writes nothing else.
WHITESPACE = " ?"
MAX_MESSAGE = 300
NOTHING_FITS = "NoExtension"  # how llguidance says that no text can go on


def read_schema(argument: str) -> str:
    """The JSON schema of a command line: JSON itself, else the name of a file.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    if argument.lstrip()[:1] in ("{", "[", '"') or argument.strip() in ("true", "false", "null"):
        return argument
    try:
        return Path(argument).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(
            f"--json-schema: {reason}", where=argument, remedy="Give a file, or the schema itself: {...}."
        ) from error


def compile_constraint(
    tokenizer: PreTrainedTokenizerBase,
    *,
    json_schema: str | None = None,
    regex: str | None = None,
    vocab_size: int,
    stop_ids: Sequence[int],
) -> Constraint:
    """Prepare a constraint once for all rows; exactly one of `json_schema` (JSON) and `regex` is given.

    Args:
        tokenizer: of the model; one of `tokenizers`, as bytes or characters with bytes to fall back on.
        json_schema: JSON Schema as JSON.
        regex: in Rust's syntax, which is Python's without look-around and back-references; it has to match the whole.
        vocab_size: how many scores the model gives a token, which may be more than the tokenizer has.
        stop_ids: the tokens that may end the output.

    Raises:
        UsageError: the schema or the expression is wrong or beyond the library, or this tokenizer cannot be held to it.
        MissingError: llguidance is not installed.
    """
    if (json_schema is None) == (regex is None):
        raise UsageError("a constraint is a JSON schema or a regular expression, one of them")
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise MissingError(
            "--json-schema and --regex need the package llguidance", remedy="pip install 'gptcli[constrain]'"
        ) from None
    what = "--json-schema" if regex is None else "--regex"
    stops = [token for token in stop_ids if 0 <= token < vocab_size]
    if not stops:
        raise UsageError(
            f"{what}: this model has no token that ends a text (EOS), so a constrained output could not end",
            remedy="Name one as eos_token in the tokenizer's tokenizer_config.json.",
        )
    grammar = _schema_grammar(json_schema) if json_schema is not None else _regex_grammar(regex or "")
    known = _tokens(tokenizer, what, vocab_size, stops, for_json=regex is None)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, known)
    if is_wrong:
        raise UsageError(f"{what}: {_reason(messages)}")
    specials = {int(token) for token in tokenizer.all_special_ids} - set(stops)
    return Constraint(known, grammar, what, sorted(token for token in specials if token < vocab_size), stops)


class Constraint:
    """What all rows have in common."""

    def __init__(self, known: Any, grammar: str, what: str, never: list[int], stops: list[int]) -> None:
        self._known = known
        self._grammar = grammar
        self._what = what
        self._never = never
        self._stops = stops

    def start(self) -> Matcher:
        """The state of one row before its first token."""
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._known, self._grammar, log_level=0), self._what, self._never, self._stops)


class Matcher:
    """The state of one row: `mask` before each token, `advance` after it."""

    def __init__(self, matcher: Any, what: str, never: list[int], stops: list[int]) -> None:
        self._matcher = matcher
        self._what = what
        self._never = never
        self._stops = stops
        self._closed = False

    @property
    def done(self) -> bool:
        """Whether nothing more can follow: the output is whole, and no token but a stop token is allowed."""
        return self._closed or (self._matcher.is_stopped() and self._matcher.is_accepting())

    @property
    def whole(self) -> bool:
        """Whether what there is satisfies the constraint, whether or not more could follow."""
        return self._closed or self._matcher.is_accepting()

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores (float [V]) of all tokens that may not come next to minus infinity, in place.

        Raises:
            UsageError: no token can come next: the tokenizer has none for what is asked, all that it has are forbidden
                (minus infinity) already, or what is asked is too complex.
        """
        import torch

        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        if not self.done:
            bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
            size = min(len(bias), len(allowed))
            allowed[:size] = bias[:size] > 0
            allowed[self._never] = False
            error = self._matcher.get_error()
            if error and not error.startswith(NOTHING_FITS):
                raise UsageError(f"{self._what}: {_reason([error])}")
        allowed[self._stops] = self.whole
        if not bool(allowed.any()):
            raise UsageError(
                f"{self._what}: no token of this model's vocabulary can come next",
                remedy="The tokenizer cannot write what is asked for, or nothing satisfies it.",
            )
        scores.masked_fill_(~allowed.to(scores.device), float("-inf"))
        if not bool((scores > float("-inf")).any()):
            raise UsageError(
                f"{self._what}: other settings forbid every token that can come next",
                remedy="Leave out min_new_tokens, no_repeat_ngram_size or bad words.",
            )

    def advance(self, token: int) -> None:
        """Take the token that was chosen among the allowed ones."""
        if self._closed:
            return
        if token in self._stops:
            self._closed = True
        elif not self._matcher.consume_token(token):
            raise ValueError(f"token {token} was not allowed: {_reason([self._matcher.get_error()])}")


def _schema_grammar(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--json-schema: not JSON: {str(error)[:MAX_MESSAGE]}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise UsageError(
            "--json-schema: a schema is a JSON object", remedy='For example {"type": "object", "required": ["name"]}.'
        )
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE}))
    except ValueError as error:
        raise UsageError(f"--json-schema: {_reason([str(error)])}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _regex_grammar(pattern: str) -> str:
    from llguidance import LLMatcher

    if pattern != pattern.encode("utf-8", "replace").decode("utf-8"):
        raise UsageError("--regex: the expression is not valid UTF-8")
    # The whole is matched anyway; the library has no anchors.
    pattern = pattern.removeprefix("^")
    body = pattern.removesuffix("$")
    if body != pattern and (len(body) - len(body.rstrip("\\"))) % 2 == 0:
        pattern = body
    return str(LLMatcher.grammar_from_regex(pattern))


def _tokens(tokenizer: PreTrainedTokenizerBase, what: str, vocab_size: int, stops: list[int], *, for_json: bool) -> Any:
    """The tokenizer as llguidance knows it: the bytes of each token."""
    from llguidance import LLTokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            raise ValueError("it is not one of the library tokenizers")
        backend = copy.copy(backend)
        backend.no_padding()
        backend.no_truncation()
        slices = LLTokenizer.json_slices() if for_json else LLTokenizer.general_slices()
        # Stop tokens are ours to allow (`Matcher.mask`); the library takes none that the tokenizer does not have.
        ends = [token for token in stops if token < len(tokenizer)] or None
        size = max(vocab_size, len(tokenizer))
        return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends, slices=slices)
    except ValueError as error:
        raise UsageError(
            f"{what}: this model's tokenizer cannot be constrained: {_reason([str(error)])}",
            remedy="Byte-level tokenizers and those that fall back on bytes can be.",
        ) from None


def _reason(messages: Sequence[str]) -> str:
    """What the library says, without its own state; the part of a regular expression's error that names the fault."""
    text = next((message for message in messages if message), "unknown")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fault = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    return (fault or lines[0].partition("<state>")[0])[:MAX_MESSAGE]
