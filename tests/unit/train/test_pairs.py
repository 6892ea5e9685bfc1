"""The rows of preference data: what is encoded, what is refused, what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gptcli.errors import DataError, RecipeError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.pairs import PreparedPairs, prepare_pairs
from tests.pairs_data import METHODS, make_pairs, pair, write_rows
from tests.tiny import shared_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


def prepared(folder: Path, rows: list[Any], *overrides: str, method: str = "dpo") -> PreparedPairs:
    file = write_rows(folder / "rows.jsonl", rows)
    given = [*METHODS[method], f"data.train={file}", "data.validation=0", *overrides]
    return prepare_pairs(load_recipe(str(folder / "pairs.yaml"), given), Silent())


def ids(text: str) -> list[int]:
    found: list[int] = shared_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def test_prompt_and_answers_are_encoded_by_themselves_with_the_end_behind(folder: Path) -> None:
    row = {"prompt": "the c", "chosen": "at", "rejected": " hello"}
    end = shared_tokenizer().eos_token_id
    assert prepared(folder, [row]).train.rows == [
        {"prompt_ids": ids("the c"), "chosen_ids": [*ids("at"), end], "rejected_ids": [*ids(" hello"), end]}
    ]


def test_kto_reads_labels_or_takes_pairs_apart(folder: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, 0, "true", "No")]
    assert [row["label"] for row in prepared(folder, rows, method="kto").train.rows] == [True, False, True, False]
    columns = "data.preference={chosen: chosen, rejected: rejected}"
    apart = prepared(folder, [pair(1)], columns, method="kto").train
    assert [row["label"] for row in apart.rows] == [True, False]
    assert len(set(apart.places)) == 1


def test_messages_go_through_the_chat_template_and_end_with_its_turn(folder: Path) -> None:
    said = [{"role": "user", "content": "the mat"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("cat", "hello"))
    apart = {"prompt": said, "chosen": good, "rejected": bad}
    repeated = {"prompt": "the mat", "chosen": [*said, *good], "rejected": bad}
    chat = prepared(folder, [apart, repeated], f"tokenizer={{from: {folder}/base, chat_template: chatml}}")
    asked = chat.train.rows
    text = AutoTokenizer.from_pretrained(chat.tokenizer).decode(asked[0]["prompt_ids"] + asked[0]["chosen_ids"])
    assert text == "<|im_start|>user\nthe mat<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>"
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no column 'rejected', only 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "hold the same answer"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "column 'chosen' holds an empty answer"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "neither a text nor a list of messages"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "lone surrogate"),
        ("no JSON", "is not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_counted(folder: Path, row: Any, what: str) -> None:
    with pytest.raises(DataError) as raised:
        prepared(folder, [pair(1), row])
    assert what in raised.value.what and str(raised.value.where).endswith("rows.jsonl:2")
    left = prepared(folder, [pair(1), row], "data.on_bad_row=skip")
    assert len(left.train) == 1 and sum(left.report["dropped"].values()) == 1


def test_overlong_pairs_follow_the_recipe(folder: Path) -> None:
    long = {"prompt": "the", "chosen": " cat" * 200, "rejected": " hello"}
    cut = prepared(folder, [pair(1), long]).train
    assert cut.longest == 64 and len(cut) == 2
    assert len(prepared(folder, [pair(1), long], "data.overlong=drop").train) == 1
    with pytest.raises(DataError, match="sequence_length leaves room for 64") as raised:
        prepared(folder, [pair(1), long], "data.overlong=error")
    assert str(raised.value.where).endswith("rows.jsonl:2")
    alone = {"prompt": " cat" * 200, "chosen": "a", "rejected": "b"}
    assert len(prepared(folder, [pair(1), alone]).train) == 1


def test_rows_with_the_same_prompt_are_on_one_side(folder: Path) -> None:
    rows = [{**pair(number), "prompt": f"the cat {number % 10}"} for number in range(80)]
    both = prepared(folder, rows, "data.validation=30%")
    assert both.validation is not None
    sides = [{tuple(row["prompt_ids"]) for row in side.rows} for side in (both.train, both.validation)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_nothing_held_out_of_a_share_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match="none is left for validation"):
        prepared(folder, [pair(1)], "data.validation=1%")


def test_grpo_keeps_the_columns_that_a_reward_may_read(folder: Path) -> None:
    rows = [{"prompt": "a", "reference": 1, "image": "x"}, {"prompt": "b", "reference": "c", "level": [2]}]
    assert prepared(folder, rows, "finetune.reward=exact_match", method="grpo").train.rows == [
        {"prompt": "a", "reference": 1, "level": None},
        {"prompt": "b", "reference": "c", "level": [2]},
    ]
    with pytest.raises(DataError, match=r"has no column 'reference' to compare with \(data\.preference\.reference\)"):
        prepared(folder, [{"prompt": "a"}], "finetune.reward=exact_match", method="grpo")


def test_the_columns_of_another_method_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="kto's columns"):
        prepared(folder, [pair(1)], "data.preference={label: label}")
    with pytest.raises(RecipeError, match="writes the answers itself"):
        prepared(folder, [pair(1)], "data.preference={chosen: chosen}", method="grpo")
