"""Constrained output against real models of random weights, which on their own write nothing but noise."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import pytest
import torch

from gptcli.errors import MissingError, UsageError
from gptcli.generation.constrain import Matcher, compile_constraint, read_schema
from tests.tiny import byte_tokenizer, fallback_tokenizer, make_model, wrapped

VOCAB = 320  # more than any of the tokenizers has

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["猫", "🐈‍⬛", "dog"]}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}
REGEXES = (
    r"\d{4}-(0[1-9]|1[0-2])",
    r"^(yes|no|也许)$",
    r"[一-龥]{2,4}，(👨‍👩‍👧|😀){1,2}",
    r"[א-ת]{1,3} [a-c]{0,2}",
    r" ?[xyz]{1,3}",
)


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("llguidance", reason="pip install 'gptcli[constrain]'")


def bytes_tokenizer() -> Any:
    """One token a byte and nothing else."""
    return wrapped(byte_tokenizer(0))


TOKENIZERS = {
    "bpe": lambda: wrapped(byte_tokenizer(310)),
    "bytes": bytes_tokenizer,
    "fallback": lambda: wrapped(fallback_tokenizer()),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(vocab_size=VOCAB, context=512)


@torch.no_grad()
def write(model: Any, matcher: Matcher, *, seed: int | None, most: int = 200) -> list[int]:
    """Tokens that the model writes after token 40, greedily without a seed; a stop token is not among them."""
    generator = torch.Generator().manual_seed(seed or 0)
    ids, given, past = [], [40], None
    while len(ids) < most and not matcher.done:
        out = model(torch.tensor([given]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        scores = out.logits[0, -1].float()
        matcher.mask(scores)
        probabilities = (scores / 50).softmax(-1)  # random weights are far from uniform
        drawn = torch.multinomial(probabilities, 1, generator=generator) if seed is not None else scores.argmax()
        token = int(drawn)
        assert probabilities[token] > 0
        matcher.advance(token)
        given = [token]
        if token != 0:
            ids.append(token)
    return ids


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text as it follows another."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode([*before, *ids], skip_special_tokens=True)).removeprefix("a")


def check_person(value: Any) -> None:
    assert set(value) == {"name", "age", "tags", "ok"}
    assert isinstance(value["name"], str) and 1 <= len(value["name"]) <= 6
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"猫", "🐈‍⬛", "dog"}
    assert isinstance(value["ok"], bool)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_every_output_is_json_of_the_schema(model: Any, tokenizer: Any, seed: int | None) -> None:
    constraint = compile_constraint(tokenizer, json_schema=json.dumps(PERSON), vocab_size=VOCAB, stop_ids=[0])
    matcher = constraint.start()
    ids = write(model, matcher, seed=seed)
    assert matcher.done and matcher.whole
    value = json.loads(text_of(tokenizer, ids))
    check_person(value)
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        jsonschema.validate(value, PERSON)


@pytest.mark.parametrize("regex", REGEXES)
def test_every_output_matches_the_whole_expression(model: Any, tokenizer: Any, regex: str) -> None:
    constraint = compile_constraint(tokenizer, regex=regex, vocab_size=VOCAB, stop_ids=[0])
    written = set()
    for seed in (None, 1, 2, 3, 4):
        matcher = constraint.start()
        text = text_of(tokenizer, write(model, matcher, seed=seed))
        assert matcher.done
        assert re.fullmatch(regex, text), text
        written.add(text)
    assert len(written) > 1


def test_ids_beyond_the_tokenizer_and_special_tokens_are_never_allowed(tokenizer: Any) -> None:
    matcher = compile_constraint(tokenizer, regex=r"(?s:.*)", vocab_size=VOCAB, stop_ids=[0]).start()
    scores = torch.zeros(VOCAB)
    matcher.mask(scores)
    allowed = set((scores == 0).nonzero().flatten().tolist())
    assert max(allowed) < len(tokenizer) < VOCAB
    assert allowed & set(tokenizer.all_special_ids) == {0}  # the one that may end it
    assert len(allowed) > 150  # a character may begin with all bytes but 76


def test_before_the_end_no_stop_token_and_after_it_only_those() -> None:
    tokenizer = bytes_tokenizer()
    matcher = compile_constraint(tokenizer, regex="ab", vocab_size=VOCAB, stop_ids=[0, 310]).start()
    allowed = []
    for token in (*tokenizer("ab", add_special_tokens=False)["input_ids"], 310):
        scores = torch.zeros(VOCAB)
        matcher.mask(scores)
        allowed.append((scores == 0).nonzero().flatten().tolist())
        assert matcher.whole == (len(allowed) == 3)
        matcher.advance(token)
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert allowed == [[a], [b], [0, 310]]
    assert matcher.done


def test_where_other_settings_leave_no_allowed_token_it_is_told_and_not_broken() -> None:
    tokenizer = bytes_tokenizer()
    matcher = compile_constraint(tokenizer, regex="a", vocab_size=VOCAB, stop_ids=[0]).start()
    scores = torch.zeros(VOCAB)
    scores[tokenizer("a", add_special_tokens=False)["input_ids"]] = float("-inf")
    with pytest.raises(UsageError, match="other settings forbid every token"):
        matcher.mask(scores)


def test_rows_go_their_own_ways() -> None:
    tokenizer = bytes_tokenizer()
    constraint = compile_constraint(tokenizer, regex="aa|bb", vocab_size=VOCAB, stop_ids=[0])
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    one, other = constraint.start(), constraint.start()
    one.advance(a)
    other.advance(b)
    for matcher, token in ((one, a), (other, b)):
        scores = torch.zeros(VOCAB)
        matcher.mask(scores)
        assert (scores == 0).nonzero().flatten().tolist() == [token]


def test_what_ends_by_length_is_not_whole(model: Any) -> None:
    tokenizer = bytes_tokenizer()
    matcher = compile_constraint(tokenizer, regex=r"\d{500}", vocab_size=VOCAB, stop_ids=[0]).start()
    assert len(write(model, matcher, seed=1, most=20)) == 20
    assert not matcher.done and not matcher.whole


@pytest.mark.parametrize(
    ("regex", "says"),
    [
        ("(a", "unclosed group"),
        ("a(?=b)", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"a\b", "lookarounds not supported"),
        (r"[^\x00-\U0010ffff]", "no token"),
        ("\ud800", "not valid UTF-8"),
    ],
)
def test_a_wrong_expression_says_what_is_wrong(regex: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"--regex: .*{says}") as raised:
        matcher = compile_constraint(bytes_tokenizer(), regex=regex, vocab_size=VOCAB, stop_ids=[0]).start()
        matcher.mask(torch.zeros(VOCAB))
    assert "<state>" not in str(raised.value)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "not JSON"),
        ('{"const": NaN}', "NaN is no number of JSON"),
        ("[1]", "a schema is a JSON object"),
        ('{"type": "objekt"}', "objekt"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ('{"$ref": "http://example.org/schema"}', "example.org"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_schema_says_what_is_wrong(schema: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"--json-schema: .*{says}"):
        compile_constraint(bytes_tokenizer(), json_schema=schema, vocab_size=VOCAB, stop_ids=[0])


def test_a_model_that_cannot_end_a_text_is_refused() -> None:
    with pytest.raises(UsageError, match="no token that ends a text"):
        compile_constraint(bytes_tokenizer(), regex="a", vocab_size=VOCAB, stop_ids=[])


def test_a_tokenizer_without_bytes_is_refused_and_one_that_lacks_characters_stops() -> None:
    from tokenizers import Tokenizer, decoders, models

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(UsageError, match="cannot be constrained"):
        compile_constraint(wrapped(pieces), regex="a", vocab_size=10, stop_ids=[0])
    few = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
    few.decoder = decoders.ByteLevel()
    matcher = compile_constraint(wrapped(few), regex="ab", vocab_size=10, stop_ids=[0]).start()
    matcher.advance(1)
    with pytest.raises(UsageError, match="no token of this model's vocabulary"):
        matcher.mask(torch.zeros(10))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingError) as raised:
        compile_constraint(bytes_tokenizer(), regex="a", vocab_size=VOCAB, stop_ids=[0])
    assert raised.value.remedy == "pip install 'gptcli[constrain]'"


def test_a_schema_is_json_or_the_name_of_a_file(tmp_path: Any) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "null"}', encoding="utf-8")
    assert read_schema(str(path)) == '{"type": "null"}'
    assert read_schema(' {"type": "null"}') == ' {"type": "null"}'
    with pytest.raises(UsageError, match="No such file"):
        read_schema("nothing.json")
