"""The rows that `--smoke` makes for recipes with pictures and sounds: read as the recipe would read its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gptcli.data.formats import Conversation, Pair, format_of, format_row
from gptcli.data.media.audio import load_audio
from gptcli.data.media.image import load_image
from gptcli.data.media.reference import Media
from gptcli.data.reading.row import Row
from gptcli.errors import MissingError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.smoke_data import ROWS, cut_source
from gptcli.train.smoke_media import read_by
from tests.media import needs_media

CASES = {
    "a kind": ("format: prompt, images: [a], prompt: 'see {image} {q}', completion: '{c}'", ["image"]),
    "columns": ("format: prompt, images: [a, b], prompt: '{a}{b}{a}', completion: '{c}'", ["image"] * 3),
    "some of several": (
        "format: prompt, images: [a, b], prompt: '{image}{b}{image}', completion: '{c}'",
        ["image"] * 3,
    ),
    "two kinds": (
        "format: prompt, images: [a], audios: [s], prompt: '{audio} {a}', completion: '{c}'",
        ["audio", "image"],
    ),
    "frames": ("format: prompt, videos: [v], prompt: '{video}', completion: '{c}'", ["video"]),
    "chat": ("format: chat, images: [a]", ["image"]),
    "sharegpt": ("format: chat, images: [a, b], messages: {shape: sharegpt}", ["image"] * 2),
    "parts of messages": ("format: chat", ["image"]),
}


def rows_of(tmp_path: Path, data: str) -> list[Pair | Conversation]:
    path = tmp_path / "r.yaml"
    path.write_text(f"data: {{train: 'hub:a/b', {data}}}\nmodel: {{from: some/model, smoke_type: llava}}\n")
    loaded = load_recipe(str(path))
    assert loaded.recipe.data is not None
    source = loaded.recipe.data.train[0]
    written = Path(cut_source(loaded, source, tmp_path, "rows", Silent())["path"])
    row_format = format_of(loaded.recipe.data, source, reads=True)
    assert row_format is not None
    made = []
    for number, line in enumerate(written.read_text().splitlines(), start=1):
        row = format_row(Row(number, "", values=json.loads(line)), row_format, row_format.reach(written))
        assert isinstance(row, Row), row
        assert row.example is not None
        made.append(row.example)
    return made


@needs_media
@pytest.mark.parametrize("case", CASES)
def test_rows_have_as_many_media_as_places_and_these_are_files(tmp_path: Path, case: str) -> None:
    data, kinds = CASES[case]
    found = rows_of(tmp_path, data)
    assert len(found) == ROWS
    for example in found:
        assert [medium.modality for medium in example.media] == kinds
    for medium in found[0].media:
        for part in medium.value if isinstance(medium.value, list) else [medium.value]:
            assert isinstance(part, Media)
            if medium.modality == "audio":
                assert len(load_audio(part, 16_000, max_seconds=1)) == 4_000
            else:
                assert load_image(part).size == (28, 28)
    assert len({example.raw for example in found}) == ROWS


def test_a_processor_that_needs_torchvision_is_refused_by_name_and_text_models_read_nothing() -> None:
    assert read_by("llama") == ()
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    with pytest.raises(MissingError, match=r"qwen2_vl reads videos too, .* torchvision"):
        read_by("qwen2_vl")
