from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from gptcli.data import encode
from gptcli.data.encode import Encoder, make_encoder, safe_cuts
from gptcli.data.tokenizer import (
    END_OF_TEXT,
    PATTERNS,
    Specials,
    load_fast,
    save_bytes_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_bpe,
    write_config,
)
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.errors import DataError, MissingError

TEXTS = ["the cat isn't on\nthe mat, 1234 times!\n\n  the end 中文中文 été " + "def f(x):\n    return x\n"] * 3
ANY_TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t'sStT.1a<|"))
) | st.sampled_from(["<|endoftext|>a<|pad|>", "\0", "it's\n\n 'T", "\ufeff"])
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in (*PATTERNS, "bytes")}
    for name in PATTERNS:
        train_bpe(TEXTS, folders[name], vocab_size=300, pattern=name)
    save_bytes_tokenizer(folders["bytes"])
    return folders


@pytest.mark.parametrize("name", [*PATTERNS, "bytes"])
def test_autotokenizer_loads_the_folder_and_gives_the_same_ids(trained: dict[str, Path], name: str) -> None:
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(str(trained[name]))
    assert isinstance(auto, transformers.PreTrainedTokenizerFast)
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == (END_OF_TEXT, END_OF_TEXT, "<|pad|>")
    assert auto.clean_up_tokenization_spaces is False
    specials = special_ids(trained[name])
    assert specials == Specials(auto.bos_token_id, auto.eos_token_id, auto.pad_token_id, adds_bos=False)
    encoder = make_encoder(trained[name])
    assert encoder.vocab_size == len(auto)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(ANY_TEXT)
    def same_ids_and_round_trip(text: str) -> None:
        ids = auto(text)["input_ids"]
        assert encoder([text]).tokens.tolist() == [*ids, specials.eos]
        assert auto.decode(ids) == text

    same_ids_and_round_trip()


def test_byte_tokens_are_the_bytes(trained: dict[str, Path]) -> None:
    text = "aé中\0"
    encoder = make_encoder(trained["bytes"])
    assert encoder([text]).tokens.tolist() == [*text.encode(), 256]
    assert encoder.specials == Specials(256, 256, 257, adds_bos=False)
    assert load_fast(trained["bytes"]).encode(text).ids == list(text.encode())


@pytest.mark.parametrize("name", PATTERNS)
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(
        st.one_of(
            ANY_TEXT, st.sampled_from(["\n", "x\nb", ".\nД", "  \n", "\n b", " \n 中", "\r\n", "1\r\n中", "'\ns"])
        ),
        max_size=12,
    )
)
def test_cutting_at_safe_newlines_changes_no_token(trained: dict[str, Path], name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    cut = safe_cuts(text, 1)
    tokenizer = load_fast(trained[name])
    assert "".join(cut) == text
    assert [i for piece in cut for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_long_texts_are_cut_and_short_ones_and_unknown_words_are_not(trained: dict[str, Path]) -> None:
    text = "word\n" * 50_000
    encoder = make_encoder(trained["gpt4"])
    assert len(encoder.cuts(text)) == 3
    assert encoder([text]).tokens[:-1].tolist() == load_fast(trained["gpt4"]).encode(text).ids
    content = json.loads((trained["gpt4"] / "tokenizer.json").read_text(encoding="utf-8"))
    assert encode.can_cut(content)
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": None}):
        assert not encode.can_cut({**content, **change})
    content["added_tokens"][0]["rstrip"] = True
    assert not encode.can_cut(content)


def test_training_is_deterministic_and_the_size_includes_the_specials(tmp_path: Path) -> None:
    sizes = [train_bpe(TEXTS, tmp_path / name, vocab_size=280, pattern="gpt4") for name in "ab"]
    assert sizes == [280, 280]
    assert tokenizer_fingerprint(tmp_path / "a") == tokenizer_fingerprint(tmp_path / "b")
    assert train_bpe(["ab"], tmp_path / "c", vocab_size=5000, pattern="gpt2") == 258


def test_vocabularies_of_65536_entries_and_more_are_uint32(tmp_path: Path, trained: dict[str, Path]) -> None:
    assert make_encoder(trained["gpt2"]).dtype == "uint16"
    for count, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        folder = tmp_path / str(count)
        shutil.copytree(trained["gpt2"], folder)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for index in range(len(content["model"]["vocab"]), count):
            content["model"]["vocab"][f"filler {index}"] = index
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        assert make_encoder(folder).dtype == dtype


def encoder_with_bos(folder: Path) -> Encoder:
    save_bytes_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, {"bos_token": "<s>", "eos_token": END_OF_TEXT})
    return make_encoder(folder)


def test_bos_is_prepended_where_the_post_processor_does_and_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    encoder = encoder_with_bos(tmp_path)
    assert encoder.specials == Specials(258, 256, 257, adds_bos=True)
    assert encoder(["a" * 9, ""]).tokens.tolist() == [258, *[97] * 9, 256, 258, 256]
    ids, size = next(encode.document_tokens(["é"], encoder))
    assert (ids.tolist(), size) == ([0xC3, 0xA9], 2)


def test_a_tokenizer_is_taken_from_a_folder_or_a_file_under_its_content(
    tmp_path: Path, trained: dict[str, Path]
) -> None:
    first = import_tokenizer(str(trained["gpt4"]))
    shutil.copyfile(trained["gpt4"] / "tokenizer.json", tmp_path / "mine.json")
    alone = import_tokenizer(str(tmp_path / "mine.json"))
    assert first == import_tokenizer(str(trained["gpt4"] / "tokenizer.json"))
    assert (first / "tokenizer.json").read_bytes() == (alone / "tokenizer.json").read_bytes()
    assert special_ids(alone).eos == special_ids(first).eos


def test_the_files_of_gpt2_are_converted(tmp_path: Path) -> None:
    if not (SHARED / "gpt2_tokenizer").is_dir():
        pytest.skip("the shared GPT-2 tokenizer is not beside the repository")
    folder = import_tokenizer(str(SHARED / "gpt2_tokenizer"))
    encoder = make_encoder(folder)
    assert encoder.vocab_size == 50257
    assert encoder(["Hello world, it's 2 été"]).tokens.tolist() == [
        15496,
        995,
        11,
        340,
        338,
        362,
        220,
        25125,
        2634,
        50256,
    ]


def test_ids_are_those_of_transformers_on_real_text() -> None:
    texts = [SHARED / "wikitext-2" / "valid.txt", SHARED / "chinese_poetry" / "valid.txt", Path(encode.__file__)]
    if not all(path.is_file() for path in texts):
        pytest.skip("the shared data sets are not beside the repository")
    transformers = pytest.importorskip("transformers")
    folder = import_tokenizer(str(SHARED / "gpt2_tokenizer"))
    auto = transformers.AutoTokenizer.from_pretrained(str(folder))
    documents = [path.read_text(encoding="utf-8")[:250_000] for path in texts]
    for text, (ids, size) in zip(documents, encode.document_tokens(documents, make_encoder(folder)), strict=True):
        assert ids.tolist() == auto(text)["input_ids"]
        assert size == len(text.encode())


def test_what_is_no_tokenizer_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for origin in (str(tmp_path), str(tmp_path / "nothing"), "someone/certainly-not-here"):
        with pytest.raises(MissingError) as caught:
            import_tokenizer(origin, where="r.yaml:1")
        assert caught.value.remedy and caught.value.where == "r.yaml:1"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        import_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    save_bytes_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace(END_OF_TEXT, "<|other|>")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="names no token that ends a text"):
        import_tokenizer(str(tmp_path))
