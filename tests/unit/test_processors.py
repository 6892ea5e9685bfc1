"""Processors that are called in another way: what they make is what they make themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gptcli.data.media.reader import load_processor, reader_of
from gptcli.errors import RecipeError
from gptcli.processors import PROCESSOR, process, save_processor
from tests.media import needs_media, picture, random_built

pytestmark = needs_media
RATE = 16_000


def sounds(*seconds: float) -> list[NDArray[np.float32]]:
    draw = np.random.default_rng(0)
    return [draw.normal(0, 0.2, int(RATE * each)).astype(np.float32) for each in seconds]


@pytest.fixture(scope="module")
def voxtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return random_built(tmp_path_factory.mktemp("voxtral"), "voxtral")


def test_the_windows_of_sounds_are_the_processors_own(voxtral: tuple[Any, Any]) -> None:
    # Its public way leads through mistral-common's tokenizer; the features are made behind it, by this.
    from transformers import VoxtralProcessor, WhisperFeatureExtractor

    _, processor = voxtral
    whole = VoxtralProcessor(WhisperFeatureExtractor(feature_size=128), processor.tokenizer)
    whole.audio_token, whole.audio_token_id, whole.tokens_of_a_window = processor.audio_token, 0, 375
    given = sounds(0.5, 31, 30)
    made = process(whole, ["".join([processor.audio_token] * 2), f"one {processor.audio_token}"], audio=given)
    how = {key: value for key, value in whole.audio_kwargs.items() if key != "max_source_positions"}
    wanted = whole._retrieve_input_features(given, 3000, **how)
    assert torch.equal(made["input_features"], wanted)
    assert made["input_features"].shape == (4, 128, 3000)


def test_each_window_is_as_many_tokens_as_the_model_makes_of_it(voxtral: tuple[Any, Any]) -> None:
    model, processor = voxtral
    mark = processor.audio_token
    # Two seconds a window, of 100 positions, of which four are a token.
    made = process(processor, [f"a {mark} b", mark], audio=sounds(0.4, 2.1), padding=True, return_tensors="pt")
    assert [int(n) for n in (made["input_ids"] == processor.audio_token_id).sum(1)] == [25, 50]
    found = model.get_audio_features(made["input_features"], return_dict=True).pooler_output
    assert found.shape[0] == 75
    assert model(**made).logits.shape[:2] == made["input_ids"].shape


def test_what_was_found_is_read_again_and_without_it_counted_on_the_configuration(
    voxtral: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = voxtral
    save_processor(processor, tmp_path)
    assert load_processor(tmp_path).tokens_of_a_window == 25
    # As transformers itself writes it.
    model.config.save_pretrained(tmp_path)
    about = json.loads((tmp_path / PROCESSOR).read_text())
    del about["audio_windows"]
    (tmp_path / PROCESSOR).write_text(json.dumps(about))
    again: Any = load_processor(tmp_path)
    assert (again.tokens_of_a_window, again.audio_token) == (25, processor.audio_token)


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        ("no place", {"audio": 1}, "0 placeholders for 1 sounds"),
        ("{mark}{mark}", {"audio": 1}, "2 placeholders for 1 sounds"),
        ("{mark}", {"audio": 1, "sampling_rate": 8000}, "8000 samples a second, where 16000 are taken"),
    ],
)
def test_sounds_that_do_not_fit_their_text_are_refused(
    voxtral: tuple[Any, Any], text: str, given: dict[str, int], says: str
) -> None:
    _, processor = voxtral
    told = {"audio": sounds(*[0.1] * given["audio"]), **{k: v for k, v in given.items() if k != "audio"}}
    with pytest.raises(ValueError, match=says):
        process(processor, [text.format(mark=processor.audio_token)], **told)


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return random_built(tmp_path_factory.mktemp("mllama"), "mllama")


def test_masks_over_pictures_are_the_processors_own_for_the_tokens_that_are_there(mllama: tuple[Any, Any]) -> None:
    _, processor = mllama
    start, mark = processor.tokenizer.bos_token, processor.image_token
    texts = [f"{start}one {mark} two {mark} a shoe", f"{start}{mark}{mark} a coat"]
    media = [[picture(1), picture(2, 60, 20)], [picture(3), picture(4)]]
    reader = reader_of(processor)
    images = [[reader.load(medium) for medium in row] for row in media]
    wanted = processor(text=texts, images=images, padding=True, return_tensors="pt")
    made = reader.inputs(media, wanted["input_ids"])
    assert made.keys() == {*wanted} - {"input_ids", "attention_mask"}
    for name, values in made.items():
        assert torch.equal(values, wanted[name]), name


def test_a_row_with_pictures_beside_its_text_does_not_depend_on_its_batch(mllama: tuple[Any, Any]) -> None:
    model, processor = mllama
    reader, tokenizer, mark = reader_of(processor), processor.tokenizer, processor.image_token
    texts = [f"a {mark} shoe", f"{mark} two, and more of it", f"one {mark}"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    media = [[picture(1)], [picture(2, 90, 30)], [picture(3)]]
    longest = max(map(len, rows))
    batch = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows])
    with torch.no_grad():
        together = model(input_ids=batch, **reader.inputs(media, batch)).logits
        for number, ids in enumerate(rows):
            one = torch.tensor([ids])
            alone = model(input_ids=one, **reader.inputs([media[number]], one)).logits[0]
            torch.testing.assert_close(together[number, : len(ids)], alone, rtol=1e-5, atol=1e-4)
        other = model(input_ids=batch[:1], **reader.inputs([[picture(9)]], batch[:1])).logits[0, -1]
    assert (other - together[0, -1]).abs().max() > 1e-3, "it sees"
    with pytest.raises(RecipeError, match="depend on each other") as caught:
        reader.inputs([media[0], [], media[2]], batch)
    assert "micro_batch_size: 1" in str(caught.value.remedy)
