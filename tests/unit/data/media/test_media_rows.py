"""Rows with images and sounds: what is read of them, and what is said of rows that cannot be."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.reader import open_reader
from gptcli.data.tokenize import Prepared, finish_shares, prepare_share
from gptcli.errors import DataError, RecipeError
from gptcli.model.media import media_model
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.media import needs_media
from tests.unit.data.media.files import make_media, picture_bytes
from tests.unit.data.test_formats import examples, jsonl, turns

pytestmark = needs_media
Prepare = Callable[..., Prepared]

SPOKEN = "prompt: '{image}{text}', completion: ' {label}'"
PROMPT = f"format: prompt, validation: 0, sequence_length: 96, images: [image], {SPOKEN}"
HEARD = PROMPT.replace("image", "audio")
CHAT = "format: chat, validation: 0, sequence_length: 128"
SEEN = "<image>" * 16
GOOD = {"image": "media/good.png", "text": "What?"}
LEARNT = " coat<|endoftext|>"


def written(path: Path, rows: list[Any]) -> None:
    """Rows as a file, each with what is to be said."""
    jsonl(path, [{"label": "coat", **row} for row in rows])


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    make_media(tmp_path)


def refused(prepared: Prepare, data: str, reason: str, says: str, **of: Any) -> None:
    """The second row of a.jsonl is an error that is named, and skipped it is counted; the first is left."""
    with pytest.raises(DataError) as caught:
        prepared(data, **of)
    assert re.search(says, caught.value.what), caught.value.what
    assert str(caught.value.where).endswith("a.jsonl:2") and caught.value.exit_code == 3
    assert "data.on_bad_row: skip" in str(caught.value.remedy)
    made = prepared(data, "data.on_bad_row=skip", **of)
    assert made.report["dropped"] == {reason: 1} and made.train.documents == 1
    assert made.report["dropped_examples"][0].endswith(f"a.jsonl:2: {reason}")


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("media/cut.jpg", "damaged file", r"^media/cut\.jpg ends in the middle \(truncated\)"),
        ("media/huge.png", "too large", "^media/huge.png has 900,000,000 pixels, more than 50,000,000"),
        ("media/empty.png", "damaged file", "^media/empty.png is empty"),
        ("media/text.png", "not media", "^media/text.png is not an image"),
        ("media/good.wav", "not media", "^media/good.wav is not an image"),
        ("media/absent.png", "missing file", "^media/absent.png does not exist"),
        ("media", "not media", "^media is a folder"),
        ("../../etc/passwd", "outside the folder", "^../../etc/passwd lies outside the folder.*data.allow_outside"),
        ("http://localhost/a.png", "not fetched", "is a URL, which is not fetched unless data.allow_urls is true"),
        ("file:///etc/passwd", "not fetched", "URL of the kind file"),
        ("data:image/png;base64,!!!", "damaged file", "base64 is damaged"),
        (7, "not media", "^the value of column 'image' is a number: neither a path nor bytes"),
        ({"file": "x"}, "not media", "^the value of column 'image' has neither bytes, path nor array, only 'file'"),
        (["media/good.png"] * 2, "not media", "^the row has 2 images, and the prompt has 1 place {image}"),
    ],
)
def test_a_value_that_is_no_image_is_named_with_its_row_or_counted(
    tmp_path: Path, prepared: Prepare, value: Any, kind: str, says: str
) -> None:
    written(tmp_path / "a.jsonl", [GOOD, {"image": value, "text": "What?"}])
    refused(prepared, f"{{train: a.jsonl, {PROMPT}}}", kind, says)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("media/none.wav", "damaged file", "^media/none.wav has no samples"),
        ("media/nan.wav", "not finite", "^media/nan.wav holds NaN"),
        ("media/hour.wav", "too large", "^media/hour.wav lasts 3,600 s, more than 1 s"),
        ("media/good.png", "not media", "^media/good.png is not a sound"),
    ],
)
def test_a_value_that_is_no_sound_is_named_with_its_row_or_counted(
    tmp_path: Path, prepared: Prepare, value: Any, kind: str, says: str
) -> None:
    written(tmp_path / "a.jsonl", [{"audio": "media/good.wav", "text": "a"}, {"audio": value, "text": "a"}])
    refused(prepared, f"{{train: a.jsonl, {HEARD}}}", kind, says, kind="qwen2_audio")


def test_a_placeholder_that_a_row_writes_itself_is_named(tmp_path: Path, prepared: Prepare) -> None:
    written(tmp_path / "a.jsonl", [GOOD, {"image": None, "text": "<image>?"}])
    says = "^the text holds <image>, by which the model knows an image"
    refused(prepared, f"{{train: a.jsonl, {PROMPT}}}", "not media", says)
    written(tmp_path / "a.jsonl", [GOOD, {"image": None, "text": "\ue0c3image\ue0c4?"}])  # nor our own mark
    refused(prepared, f"{{train: a.jsonl, {PROMPT}}}", "not media", "^the row has 0 images and 1 place for them")


def test_two_places_want_two_pictures(tmp_path: Path, prepared: Prepare) -> None:
    written(tmp_path / "a.jsonl", [{"image": ["media/good.png", "media/wide.png"], "text": "?"}, {**GOOD}])
    data = f"{{train: a.jsonl, {PROMPT.replace('{image}', '{image}{image}')}}}"
    refused(prepared, data, "not media", "^the row has 1 image, and the prompt has 2 places {image}")


def test_values_of_every_form_are_the_same_picture(tmp_path: Path, prepared: Prepare) -> None:
    raw = picture_bytes(1)
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    written(tmp_path / "a.jsonl", [GOOD, {**GOOD, "image": ["media/good.png"]}, {**GOOD, "image": url}])
    # What datasets writes of its features Image and Audio.
    rows = [{"image": {"bytes": raw, "path": None}}, {"image": {"bytes": None, "path": "media/good.png"}}]
    pq.write_table(
        pa.Table.from_pylist([{**row, "text": "What?", "label": "coat"} for row in rows]), tmp_path / "b.parquet"
    )
    pq.write_table(pa.table({"image": [raw], "text": ["What?"], "label": ["coat"]}), tmp_path / "c.parquet")
    made = prepared(f"{{train: [a.jsonl, b.parquet, c.parquet], {PROMPT}}}")
    assert examples(made.train, made.tokenizer) == [(f"{SEEN}What?", LEARNT)] * 6
    media = [each for at in range(3) for each in made.train.media(at, made.train.document_offsets(at)[:-1])]
    assert len(media) == 6 and len({each[0].hash for each in media}) == 1


NOTHING = {"absent": {}, "null": {"image": None}, "list": {"image": []}, "text": {"image": ""}}


@pytest.mark.parametrize("none", NOTHING.values(), ids=NOTHING)
def test_a_row_without_a_picture_has_nothing_in_its_place(tmp_path: Path, prepared: Prepare, none: Any) -> None:
    written(tmp_path / "a.jsonl", [GOOD, {**none, "text": "What?"}])
    made = prepared(f"{{train: a.jsonl, {PROMPT}}}")
    assert examples(made.train, made.tokenizer) == [(f"{SEEN}What?", LEARNT), ("What?", LEARNT)]
    assert [len(each) for each in made.train.media(0, made.train.document_offsets(0)[:-1])] == [1, 0]


def test_columns_that_hold_no_picture_in_any_row_are_an_error(tmp_path: Path, prepared: Prepare) -> None:
    written(tmp_path / "a.jsonl", [{"image": None, "text": "a"}] * 3)
    with pytest.raises(DataError, match=r"data.images: no row has an image in column 'image'") as caught:
        prepared(f"{{train: a.jsonl, {PROMPT}}}")
    assert caught.value.exit_code == 3 and str(caught.value.where).endswith("recipe.yaml:3")
    written(tmp_path / "a.jsonl", [{**GOOD, "image": "media/cut.jpg"}, {"image": None, "text": "a"}])
    with pytest.raises(DataError, match=r"no row has an image .*dropped: 1 damaged file"):
        prepared(f"{{train: a.jsonl, {PROMPT}}}", "data.on_bad_row=skip")


def test_conversations_without_any_picture_are_a_warning(tmp_path: Path, prepared: Prepare, lines: Any) -> None:
    written(tmp_path / "a.jsonl", [{"messages": turns("<image> of what?", "a coat"), "image": "media/good.png"}])
    made = prepared(f"{{train: a.jsonl, {CHAT}}}", chat="chatml")
    assert any("warning: no row has an image or a sound" in line for line in lines.said)
    # Without a column of images it is a text that a user has written, and none of the model's own tokens.
    image = open_reader(made.tokenizer).processor.image_token_id
    assert not (np.concatenate(made.train.streams[0].shards) == image).any()
    assert "<image> of what?" in examples(made.train, made.tokenizer)[0][0]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PROMPT.replace(" {label}", " {image}"), "completion has {image} in it, and a model says text alone"),
        (PROMPT.replace("{image}", ""), "prompt has no place for 'image': write {image}"),
        (PROMPT.replace("[image]", "[imgae]"), "data.images: no source has a column 'imgae'"),
        (PROMPT.replace("format: prompt", "format: text"), "format"),
        (HEARD, "data.audios: the model reads images alone"),
    ],
)
def test_columns_that_make_no_sense_are_told_before_anything_is_read(
    tmp_path: Path, prepared: Prepare, data: str, says: str
) -> None:
    written(tmp_path / "a.jsonl", [{**GOOD, "audio": "media/absent.wav"}])
    with pytest.raises(RecipeError) as caught:
        prepared(f"{{train: a.jsonl, {data}}}")
    assert says in "\n".join(caught.value.lines()) and "recipe.yaml:3" in "\n".join(caught.value.lines())


def part(value: Any = None, kind: str = "image") -> dict[str, Any]:
    return {"type": kind} if value is None else {"type": kind, kind: value}


def asked(*content: Any, said: Any = "a coat", **columns: Any) -> dict[str, Any]:
    """A row of one question of parts and its answer."""
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": said}], **columns}


GOOD_CHAT = asked(part("media/good.png"), "What?", image=None)
FRAME = ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n\n", "a coat<|im_end|>")  # a line end is behind it


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        (asked(part(), part(), image="media/good.png"), "not media", "one more place for an image, and the row"),
        (asked(part(), "?"), "not media", "message 1 has a place for an image, and neither it nor"),
        (asked({"type": "image", "imgae": "media/good.png"}, "?"), "not media", "message 1 has a place for an image"),
        (asked("?", image="media/good.png"), "not media", "the row has 1 image more than there are places"),
        (asked("<image> <image>", image="media/good.png"), "not media", "message 1 has one more place"),
        (asked(part("media/cut.jpg"), "?"), "damaged file", r"media/cut\.jpg ends in the middle"),
        (asked(part(7), "?"), "not media", "the value in message 1 is a number"),
        (asked(part("media/good.wav", "audio"), "?"), "not media", "is a sound, and the model reads images alone"),
        (asked(part(["media/good.png"] * 2, "video"), "?"), "not media", "is a video, and the model reads"),
        (asked("?", said=[part("media/good.png")]), "not text", "message 2 is the assistant's and holds media"),
        (asked("?", said="<image>", image="media/good.png"), "not text", "message 2 is the assistant's"),
        ({"messages": turns("\ue0c3image\ue0c4", "a coat")}, "not media", "0 images and 1 place for them"),
    ],
)  # fmt: skip
def test_a_conversation_whose_media_make_no_sense_is_named_or_counted(
    tmp_path: Path, prepared: Prepare, row: Any, kind: str, says: str
) -> None:
    written(tmp_path / "a.jsonl", [GOOD_CHAT, row])
    refused(prepared, f"{{train: a.jsonl, {CHAT}, images: [image]}}", kind, says, chat="chatml")


def test_media_stand_in_conversations_in_the_forms_that_others_write(tmp_path: Path, prepared: Prepare) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture_bytes(1)).decode()
    rows = [
        GOOD_CHAT,
        asked({"type": "image", "path": "media/good.png"}, "What?"),
        asked({"type": "image_url", "image_url": {"url": url}}, "What?"),
        asked({"type": "image", "base64": url.partition(",")[2]}, "What?"),
        asked(part(), "What?", image="media/good.png"),
        {"messages": turns("<image>What?", "a coat"), "image": ["media/good.png"]},
    ]
    written(tmp_path / "a.jsonl", rows)
    made = prepared(f"{{train: a.jsonl, {CHAT}, images: [image]}}", chat="chatml")
    assert examples(made.train, made.tokenizer) == [(FRAME[0].format(f"{SEEN}What?"), FRAME[1])] * 6


@pytest.mark.parametrize("shape", ["sharegpt", "alpaca"])
def test_media_stand_in_conversations_of_every_shape(tmp_path: Path, prepared: Prepare, shape: str) -> None:
    row: dict[str, Any] = {"instruction": "What?", "input": "<image>!", "output": "a coat"}
    if shape == "sharegpt":
        row = {"conversations": [{"from": "human", "value": "What?\n<image>!"}, {"from": "gpt", "value": "a coat"}]}
    written(tmp_path / "a.jsonl", [{**row, "image": "media/good.png"}])
    data = f"{{train: a.jsonl, {CHAT}, images: [image], messages: {{shape: {shape}}}}}"
    made = prepared(data, chat="chatml")
    assert examples(made.train, made.tokenizer) == [(FRAME[0].format(f"What?\n{SEEN}!"), FRAME[1])]
    written(tmp_path / "a.jsonl", [{**row, "image": ["media/good.png"] * 2}])
    with pytest.raises(DataError, match=r"the row has 1 image more than there are places"):
        prepared(data, chat="chatml")


def test_a_model_of_texts_takes_no_media(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    written(tmp_path / "a.jsonl", [GOOD])
    text = "model={type: llama, config: {num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2}}"
    with pytest.raises(RecipeError, match=r"data.images: the model reads text alone") as caught:
        loaded = load_recipe(str(recipe(f"{{train: a.jsonl, {PROMPT}}}")), [text])
        assert media_model(loaded) is None
        prepare_share(loaded, Silent(), (1, 1))
    assert caught.value.exit_code == 2
    written(tmp_path / "a.jsonl", [GOOD_CHAT])
    with pytest.raises(DataError, match=r"a part of type 'image', and the model reads text alone") as bad:
        prepare_share(load_recipe(str(recipe(f"{{train: a.jsonl, {CHAT}}}", chat="chatml")), [text]), Silent(), (1, 1))
    assert str(bad.value.where).endswith("a.jsonl:1")


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_a_row_with_media_that_is_too_long_is_an_error_or_dropped_and_never_cut(
    tmp_path: Path, prepared: Prepare, packing: str
) -> None:
    written(tmp_path / "a.jsonl", [GOOD, {**GOOD, "text": "What is this? " * 40}])
    for overlong in ("split", "truncate", "error"):
        with pytest.raises(DataError, match=r"document 2 has .* tokens, and a row takes 96 \+ 1") as caught:
            prepared(f"{{train: a.jsonl, packing: {packing}, overlong: {overlong}, {PROMPT}}}")
        assert "is never cut" in caught.value.what and "split" not in str(caught.value.remedy)
    made = prepared(f"{{train: a.jsonl, packing: {packing}, overlong: drop, {PROMPT}}}")
    assert made.report["rows"] == 1 and sum(made.report["left_out"].values()) == 1


@pytest.mark.parametrize("packing", ["concat", "isolated"])
def test_placeholders_are_never_learnt_with_the_prompt_that_they_are_in(
    tmp_path: Path, prepared: Prepare, packing: str
) -> None:
    written(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(RecipeError, match="prompts of rows with images and sounds cannot be learnt"):
        prepared(f"{{train: a.jsonl, packing: {packing}, {PROMPT}}}", "finetune.train_on=all")


def test_a_picture_that_has_changed_is_told_when_it_is_read_and_verify_prepares_it_again(
    tmp_path: Path, prepared: Prepare, lines: Any
) -> None:
    written(tmp_path / "a.jsonl", [GOOD])
    data = f"{{train: a.jsonl, {PROMPT}}}"
    first = prepared(data)
    again = prepared(data)
    assert again.reused and again.fingerprint == first.fingerprint
    assert prepared(data, verify=True).reused
    (medium,) = first.train.media(0, np.zeros(1, dtype=np.int64))[0]
    reader = open_reader(first.tokenizer)
    assert reader.load(medium).size == (28, 28)
    (tmp_path / "media" / "good.png").write_bytes(picture_bytes(9))
    with pytest.raises(MediaFault, match=r"good.png is another one than when the data was prepared"):
        reader.load(medium)
    lines.said.clear()
    mended = prepared(data, verify=True)
    assert not mended.reused and mended.fingerprint != first.fingerprint
    assert any("good.png is another one" in line for line in lines.said)
    (medium,) = mended.train.media(0, np.zeros(1, dtype=np.int64))[0]
    assert reader.load(medium).size == (28, 28)
    os.unlink(tmp_path / "media" / "good.png")
    with pytest.raises(DataError, match=r"good.png does not exist"):
        prepared(data, verify=True)


def test_the_same_words_of_other_pictures_are_other_rows(tmp_path: Path, prepared: Prepare) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(60):
        (tmp_path / "media" / f"{number}.png").write_bytes(picture_bytes(number))
        rows += [{"image": f"media/{number}.png", "text": "What?"}] * 2
    written(tmp_path / "a.jsonl", rows)
    data = PROMPT.replace("validation: 0", "validation: 25%")
    made = prepared(f"{{train: a.jsonl, deduplicate: exact, {data}}}")
    assert made.report["dropped"] == {"duplicate": 60} and made.validation is not None
    sides = [
        {medium.name for row in side.media(0, side.document_offsets(0)[:-1]) for medium in row}
        for side in (made.train, made.validation)
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60 and len(sides[1]) >= 5


def test_parts_put_together_are_the_same_bytes(
    tmp_path: Path, recipe: Callable[..., Path], prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.jsonl", [{**GOOD, "text": f"What is {number}? " * 3} for number in range(60)])
    data = f"{{train: a.jsonl, {PROMPT}}}"
    monkeypatch.setattr("gptcli.data.pieces.SMALLEST", 2_000)
    whole = prepared(data)
    monkeypatch.setenv("GPTCLI_CACHE", str(tmp_path / "other"))
    loaded = load_recipe(str(recipe(data)))
    media = media_model(loaded)
    shares = [prepare_share(loaded, Silent(), (number, 3), media=media) for number in (3, 1, 2)]
    assert shares[-1]["missing"] == 0 and shares[0]["pieces"] > 1
    made = finish_shares(loaded, Silent(), media=media)
    assert made.fingerprint == whole.fingerprint and made.train.folder != whole.train.folder
    files = sorted(path.name for path in whole.train.folder.glob("*.npy"))
    assert sorted(path.name for path in made.train.folder.glob("*.npy")) == files and len(files) > 6
    assert all((made.train.folder / name).read_bytes() == (whole.train.folder / name).read_bytes() for name in files)
    assert json.dumps(made.report["train"]["media"]) == json.dumps(whole.report["train"]["media"])


def test_the_report_counts_media_by_kind(tmp_path: Path, prepared: Prepare) -> None:
    rows = [GOOD, {**GOOD, "image": "media/wide.png"}, {"image": None, "text": "a"}]
    written(tmp_path / "a.jsonl", rows)
    made = prepared(f"{{train: a.jsonl, {PROMPT}}}")
    counted = made.report["train"]["media"]
    assert counted == {
        "image": {
            "count": 2,
            "rows": 2,
            "tokens": 32,
            "mean_tokens": 16.0,
            "most_tokens": 16,
            "share_of_tokens": round(32 / made.train.tokens, 4),
            "smallest": [28, 28],
            "largest": [60, 40],
        }
    }
    # Placeholders are no text.
    assert made.report["train"]["bytes"] == len("What? coat" * 2 + "a coat")
