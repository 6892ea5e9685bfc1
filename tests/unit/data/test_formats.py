"""Rows as examples: what is trained on of files of every kind, and what is said of rows that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.data import tokenize
from gptcli.data.pieces import Piece
from gptcli.data.shards import Shards
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import load_fast
from gptcli.errors import DataError, RecipeError, StoppedError
from gptcli.recipe.load import load_recipe

ROWS = [{"en": "the cat", "de": "die Katze"}, {"en": "a\nhouse", "de": "ein Haus"}, {"en": "wörld", "de": "Welt 世界"}]
PROMPT = "format: prompt, validation: 0, prompt: \"German: {en}\\n\", completion: '{de}!'"
EXPECTED = [(f"German: {row['en']}\n", f"{row['de']}!<|endoftext|>") for row in ROWS]
CHAT = "{train: {algorithm: bytes}, chat_template: chatml}"
Prepare = Callable[..., Prepared]


def examples(shards: Shards, tokenizer: Path) -> list[tuple[str, str]]:
    """(what is given, what is trained on) of every row, where the one comes first; read by numpy."""
    found = []
    decoder = load_fast(tokenizer)
    for number, stream in enumerate(shards.streams):
        tokens, mask = (np.concatenate([*map(np.asarray, each)]) for each in (stream.shards, stream.supervised or ()))
        offsets = shards.document_offsets(number)
        for begin, end in pairwise(offsets):
            flags = mask[begin:end].astype(bool)
            parts = (tokens[begin:end][~flags].tolist(), tokens[begin:end][flags].tolist())
            given, said = (decoder.decode(part, skip_special_tokens=False) for part in parts)
            found.append((given, said))
    return found


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(folder: Path, name: str) -> str:
    """The rows in a file of a kind; what has to be said of the source in a recipe."""
    path = folder / name
    if name.endswith(".jsonl"):
        jsonl(path, ROWS)
    elif name.endswith(".json"):
        path.write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    elif name.endswith(".csv"):
        path.write_text("de,en\n" + "".join(f'"{row["de"]}","{row["en"]}"\n' for row in ROWS), encoding="utf-8")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([{"n": 1, **row} for row in ROWS]), path, row_group_size=2)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return name


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_prompts_and_completions_of_every_kind_of_file(tmp_path: Path, prepared: Prepare, name: str) -> None:
    made = prepared(f"{{train: {write(tmp_path, name)}, {PROMPT}}}")
    assert examples(made.train, made.tokenizer) == EXPECTED
    train = made.report["train"]
    assert train["supervised_tokens"] == sum(len(said.encode()) - 12 for _, said in EXPECTED)
    assert train["supervised_share"] == round(train["supervised_tokens"] / train["tokens"], 4)
    assert prepared(f"{{train: {name}, {PROMPT}}}").reused


def test_a_table_without_a_header_has_the_columns_and_the_values_that_a_recipe_gives(
    tmp_path: Path, prepared: Prepare
) -> None:
    (tmp_path / "a.tsv").write_text("good film\t1\nbad film\t0\n", encoding="utf-8")
    source = "{path: a.tsv, columns: [sentence, label], map: {label: {0: negative, 1: positive}}}"
    data = f"{{train: {source}, format: prompt, validation: 0, prompt: '{{sentence}} =', completion: ' {{label}}'}}"
    made = prepared(data)
    assert examples(made.train, made.tokenizer) == [
        ("good film =", " positive<|endoftext|>"),
        ("bad film =", " negative<|endoftext|>"),
    ]
    other = prepared(data.replace("positive", "fine"))
    assert examples(other.train, other.tokenizer)[0][1] == " fine<|endoftext|>", "map is a part of the key"
    with pytest.raises(DataError, match="holds '0', which map does not know") as caught:
        prepared(data.replace("0: negative, ", ""))
    assert str(caught.value.where).endswith("a.tsv:2")


def test_parallel_files_are_columns_line_by_line(tmp_path: Path, prepared: Prepare) -> None:
    (tmp_path / "t.en").write_text("the cat\r\nhello\n", encoding="utf-8")
    (tmp_path / "t.de").write_text("die Katze\nhallo\n", encoding="utf-8")
    data = f"{{train: {{path: {{en: t.en, de: t.de}}}}, {PROMPT}}}"
    made = prepared(data)
    assert examples(made.train, made.tokenizer) == [
        ("German: the cat\n", "die Katze!<|endoftext|>"),
        ("German: hello\n", "hallo!<|endoftext|>"),
    ]
    assert made.report["train"]["sources"][0]["name"] == "t.en + t.de"
    with (tmp_path / "t.de").open("a") as file:
        file.write("mehr\n")
    with pytest.raises(DataError, match="has 2 lines, and another file of this source has more") as caught:
        prepared(data)
    assert str(caught.value.where).endswith("t.en")
    with pytest.raises(DataError, match="there is no file"):
        prepared(data.replace("t.en", "gone.en"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"en": "x"}, "has no column 'de', only 'en'"),
        ({"en": "x", "de": ""}, "has an empty completion"),
        ({"en": "x", "de": " \n"}, "has an empty completion"),
        ({"en": "x", "de": None}, "column 'de' holds null, not text"),
        ({"en": ["x"], "de": "y"}, "column 'en' holds a list, not text"),
        ({"en": {"x": 1}, "de": "y"}, "column 'en' holds an object, not text"),
        ({"en": "\ud800", "de": "y"}, "column 'en' holds a lone surrogate, not text"),
        ([1], "is not a JSON object but a list"),
    ],
)
def test_a_row_without_prompt_or_completion_is_named_or_counted(
    tmp_path: Path, prepared: Prepare, row: Any, said: str
) -> None:
    jsonl(tmp_path / "a.jsonl", [*ROWS, row, *ROWS[:1]])
    data = f"{{train: a.jsonl, {PROMPT}}}"
    with pytest.raises(DataError) as caught:
        prepared(data)
    assert said in caught.value.what and str(caught.value.where).endswith("a.jsonl:4") and caught.value.exit_code == 3
    made = prepared(data, "data.on_bad_row=skip")
    assert examples(made.train, made.tokenizer) == [*EXPECTED, EXPECTED[0]]
    assert sum(made.report["dropped"].values()) == 1
    assert "a.jsonl:4" in made.report["dropped_examples"][0]


def test_a_column_that_no_source_has_is_named_at_once_with_the_nearest(tmp_path: Path, prepared: Prepare) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(RecipeError, match=r"data\.prompt: no source has a column 'eng', only 'en', 'de'") as caught:
        prepared("{train: a.jsonl, format: prompt, prompt: '{eng}', completion: '{de}'}")
    assert caught.value.remedy == "Did you mean en?" and str(caught.value.where).endswith("recipe.yaml:2")
    with pytest.raises(RecipeError, match=r"data\.messages: no source has a column 'messages'"):
        prepared("{train: a.jsonl, format: chat}", tokenizer=CHAT)
    # One source has it: then it is a matter of the rows of the other.
    jsonl(tmp_path / "b.jsonl", [{"en": "x", "fr": "y"}])
    with pytest.raises(DataError, match="has no column 'fr'"):
        prepared("{train: [b.jsonl, a.jsonl], validation: 0, format: prompt, prompt: '{en}', completion: '{fr}'}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("format: prompt, completion: '{de}'", "format prompt needs prompt"),
        ("format: prompt, prompt: '{en}'", "format prompt needs completion"),
        ("format: prompt, prompt: 'x', completion: '{de}'", "no column in it"),
        ("prompt: '{en}'", "prompt belongs to format prompt"),
        ("messages: turns", "messages belongs to format chat"),
        ("format: chat, messages: {column: m, shape: alpaca}", "shape alpaca has the columns"),
        ("format: chat, validation: {tail: 10%}", "a row is not cut"),
        ("train: {tokens: x.bin}, format: chat", "tokens do not say what is trained on"),
        ("train: {path: {a: x, b: y}}", "none is named 'text'"),
        ("train: {path: x.csv, map: {a: {b: c}}}", "map is for the columns"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_with_the_reason(tmp_path: Path, data: str, said: str) -> None:
    recipe = tmp_path / "r.yaml"
    train = "" if data.startswith("train") else "train: a.jsonl, "
    recipe.write_text(f"data: {{{train}{data}}}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(recipe))


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("openai", {"messages": [{"role": "system", "content": "s"}, *turns("hi", "hello")]}),
        ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}),
        ("sharegpt", {"conversations": SHAREGPT, "system": "s"}),
        ("alpaca", {"instruction": "hi", "input": "", "output": "hello", "system": "s"}),
    ],
)
def test_conversations_of_three_shapes_are_the_same_tokens(
    tmp_path: Path, prepared: Prepare, shape: str, row: dict[str, Any]
) -> None:
    jsonl(tmp_path / "a.jsonl", [row])
    made = prepared(f"{{train: a.jsonl, validation: 0, format: chat, messages: {{shape: {shape}}}}}", tokenizer=CHAT)
    (found,) = examples(made.train, made.tokenizer)
    # What follows the end of the last turn is given, too.
    given = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert found == (f"{given}\n", "hello<|im_end|>")


def test_parquet_holds_conversations_too(tmp_path: Path, prepared: Prepare) -> None:
    rows = [{"turns": [{**each, "train": None} for each in turns("hi", f"hello {n}")], "n": n} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = prepared("{train: a.parquet, validation: 0, format: chat, messages: turns}", tokenizer=CHAT)
    assert [said for _, said in examples(made.train, made.tokenizer)] == [f"hello {n}<|im_end|>" for n in range(3)]


def test_without_a_token_that_ends_a_turn_its_text_and_the_end_of_text_do(tmp_path: Path, prepared: Prepare) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}#\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    jsonl(tmp_path / "a.jsonl", [{"messages": turns("hi", "hello")}])
    tokenizer = f"{{train: {{algorithm: bytes}}, chat_template: {tmp_path / 't.jinja'}}}"
    made = prepared("{train: a.jsonl, validation: 0, format: chat}", tokenizer=tokenizer)
    assert examples(made.train, made.tokenizer) == [("[user] hi#\n[assistant] ", "hello#\n<|endoftext|>")]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "holds no messages"),
        ("hi", "holds a text, no list of messages"),
        (None, "holds null, no list of messages"),
        (["hi"], "message 1 is a text, no role and content"),
        (SHAREGPT, "has no role, only 'from', 'value'; messages of from and value are shape: sharegpt"),
        ([{"role": "human", "content": "x"}], "message 1 has the unknown role 'human'"),
        ([{"role": "system", "content": "x"}], "no turn but the system's"),
        ([{"role": "system", "content": "x"}] * 2 + turns("a", "b"), "message 2 is a second system turn"),
        ([*turns("a", "b"), {"role": "system", "content": "x"}], "message 3 is a system turn"),
        (turns("a", "b")[1:], "begins with a turn of the assistant"),
        (turns("a", " \n"), "message 2 is an empty turn of the assistant"),
        (turns("a", 5), "message 2: content holds a number, not text"),  # type: ignore[arg-type]
        ([{"role": "user"}, *turns("a", "b")[1:]], "message 1: content holds null"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image', and the model reads text alone"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "a part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image'"),
        ([{"role": "user", "content": ["x"]}], "holds a list with a text"),
        ([{**turns("a")[0], "train": True}, *turns("a", "b")[1:]], "train: true is for the assistant's"),
        ([turns("a")[0], {**turns("a", "b")[1], "train": 1}], "train holds a number"),
        ([{**turns("a")[0], "tool_calls": [{"name": "f"}]}], "which only the assistant's have"),
        ([turns("a")[0], {"role": "assistant", "tool_calls": [{}]}], "a call of a function without a name"),
        (
            [turns("a")[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "the arguments of 'f' are no JSON",
        ),
        (turns("a", "\udc80"), "lone surrogate"),
    ],
)
def test_a_conversation_that_makes_no_sense_is_named_or_counted(
    tmp_path: Path, prepared: Prepare, messages: Any, said: str
) -> None:
    jsonl(tmp_path / "a.jsonl", [{"messages": turns("hi", "hello")}, {"messages": messages}])
    data = "{train: a.jsonl, validation: 0, format: chat}"
    with pytest.raises(DataError) as caught:
        prepared(data, tokenizer=CHAT)
    assert said in caught.value.what and str(caught.value.where).endswith("a.jsonl:2") and caught.value.exit_code == 3
    made = prepared(data, "data.on_bad_row=skip", tokenizer=CHAT)
    assert (made.train.documents, sum(made.report["dropped"].values())) == (1, 1)


def test_a_conversation_that_the_template_refuses_is_named_with_the_template_or_counted(
    tmp_path: Path, prepared: Prepare
) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = "{train: {algorithm: bytes}, chat_template: %s}" % (tmp_path / "t.jinja")
    jsonl(tmp_path / "a.jsonl", [{"messages": turns("hi", "hello")}, {"messages": turns("no", "hello")}])
    data = "{train: a.jsonl, validation: 0, format: chat}"
    with pytest.raises(DataError, match=r"refused by the chat template: not that \(.*chat_template\.jinja\)") as caught:
        prepared(data, tokenizer=tokenizer)
    assert str(caught.value.where).endswith("a.jsonl:2")
    made = prepared(data, "data.on_bad_row=skip", tokenizer=tokenizer)
    assert made.report["dropped"] == {"not in the template": 1}
    assert examples(made.train, made.tokenizer) == [("user: hi\nassistant:", " hello\n<|endoftext|>")]


def test_rows_without_a_supervised_token_are_counted_and_all_of_them_are_an_error(
    tmp_path: Path, prepared: Prepare
) -> None:
    off = turns("hi", "hello")
    off[1]["train"] = False
    jsonl(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}, {"messages": off}, {"messages": turns("only")}])
    data = "{train: a.jsonl, validation: 0, format: chat}"
    made = prepared(data, tokenizer=CHAT)
    assert made.report["dropped"] == {"no supervised token": 2} and made.train.documents == 1
    jsonl(tmp_path / "a.jsonl", [{"messages": off}] * 3)
    with pytest.raises(DataError, match="3 no supervised token") as caught:
        prepared(data, tokenizer=CHAT)
    assert caught.value.exit_code == 3 and "train: false" in str(caught.value.remedy)


def test_a_tokenizer_without_a_template_is_a_fault_of_the_recipe(tmp_path: Path, prepared: Prepare) -> None:
    jsonl(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(RecipeError, match="needs a chat template") as caught:
        prepared("{train: a.jsonl, validation: 0, format: chat}")
    assert str(caught.value.where).endswith("recipe.yaml:1")


def test_shards_of_rows_are_no_source_of_tokens_that_are_all_trained_on(tmp_path: Path, prepared: Prepare) -> None:
    made = prepared(f"{{train: {write(tmp_path, 'a.jsonl')}, {PROMPT}}}")
    with pytest.raises(DataError, match="some tokens are not trained on"):
        prepared(f"{{train: {{tokens: {made.train.folder}}}, validation: 0}}")


def test_a_share_is_held_out_by_what_an_example_says_and_repetitions_are_left_out(
    tmp_path: Path, prepared: Prepare
) -> None:
    rows = [{"en": f"word {n}", "de": f"Wort {n}", "id": n} for n in range(300)]
    again = [{**row, "id": -1} for row in rows[:50]]  # other columns do not make another example
    jsonl(tmp_path / "a.jsonl", [*rows, *again])
    data = f"{{train: a.jsonl, deduplicate: exact, {PROMPT.replace('validation: 0', 'validation: 20%')}}}"
    made = prepared(data)
    assert made.validation is not None and made.report["dropped"] == {"duplicate": 50}
    train, held_out = (examples(side, made.tokenizer) for side in (made.train, made.validation))
    assert 30 < len(held_out) < 90 and len(train) + len(held_out) == 300
    assert not set(train) & set(held_out) and made.validation.has_supervision
    # The order of the rows does not matter, nor their limit.
    jsonl(tmp_path / "a.jsonl", rows[::-1])
    other = prepared(data)
    assert other.validation is not None
    assert examples(other.validation, other.tokenizer) == held_out[::-1]


def test_pieces_of_a_file_on_several_processes_are_the_same_shards(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "a.jsonl", [{"messages": turns(f"ask {n}", f"say {n}", "more", f"yes {n}")} for n in range(400)])
    data = "{train: {path: a.jsonl, limit: 350}, validation: 0, format: chat}"
    whole = prepared(data, "tokenize.shard_tokens=5000", tokenizer=CHAT)
    monkeypatch.setattr("gptcli.data.pieces.SMALLEST", 10_000)
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "other"))
    pieces = prepared(data, "tokenize.shard_tokens=5000", "tokenize.processes=2", tokenizer=CHAT)
    found = examples(pieces.train, pieces.tokenizer)
    assert found == examples(whole.train, whole.tokenizer) and len(found) == 350
    assert found[349][1].startswith("say 349<|im_end|>")


def test_one_of_parallel_files_can_be_the_text(tmp_path: Path, prepared: Prepare) -> None:
    (tmp_path / "t.en").write_text("one line\nand another\n\n", encoding="utf-8")
    made = prepared("{train: {path: {en: t.en}, text: en}, validation: 0, sequence_length: 4}")
    assert [bytes(ids.astype(np.uint8)).decode() for ids, _ in made.train.evaluation_documents()] == [
        "one line",
        "and another",
    ]


def test_a_job_of_rows_that_was_interrupted_goes_on_with_the_pieces_that_are_missing(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "a.jsonl", [{"messages": turns(f"ask {n}", f"say {n}")} for n in range(400)])
    monkeypatch.setattr("gptcli.data.pieces.SMALLEST", 10_000)
    data = "{train: a.jsonl, validation: 10%, format: chat}"
    whole = prepared(data, tokenizer=CHAT)
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "other"))
    encode, done = tokenize.encode, []

    def second_is_interrupted(piece: Piece, *others: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(piece.index)
        return encode(piece, *others)

    with monkeypatch.context() as patched:
        patched.setattr(tokenize, "encode", second_is_interrupted)
        with pytest.raises(StoppedError, match="1 of 4 pieces are done and kept"):
            prepared(data, "tokenize.processes=1", tokenizer=CHAT)
    again = prepared(data, "tokenize.processes=1", tokenizer=CHAT)
    assert again.fingerprint == whole.fingerprint
    files = sorted(path.name for path in whole.train.folder.iterdir())
    assert files == sorted(path.name for path in again.train.folder.iterdir())
    for name in files:
        assert (whole.train.folder / name).read_bytes() == (again.train.folder / name).read_bytes()


def test_the_name_of_a_kind_of_media_stands_for_columns_of_any_name() -> None:
    from gptcli.data.formats import filled_prompt
    from gptcli.data.media.item import Medium, place_of
    from gptcli.data.media.reference import Media
    from gptcli.recipe.template import parse_template

    front, back, map_ = (Medium("image", Media(name, b"")) for name in ("front", "back", "map"))
    columns = {"photos": [front, back], "map": [map_]}
    kinds = [("image", ("photos", "map"))]
    for prompt, expected in [
        ("{image}{image}{image}", (front, back, map_)),
        ("{map}: {image}, {image}", (map_, front, back)),
    ]:
        text, placed = filled_prompt(parse_template(prompt), {}, kinds, columns)  # type: ignore[arg-type]
        assert text.count(place_of("image")) == 3 and placed == expected
