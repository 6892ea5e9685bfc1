"""The fast encoder gives the ids of `tokenizers` (and of transformers), or is not used and says why."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import random
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gptcli.data import fast as fast_module
from gptcli.data.encode import Encoder, batches, document_tokens, make_encoder
from gptcli.data.fast import (
    NORMALIZED,
    UNICODE_17,
    FastTokenizer,
    Unequal,
    distrust,
    fast_tokenizer,
    is_sure,
)
from gptcli.data.tokenize import Prepared, prepare
from gptcli.data.tokenizer import END_OF_TEXT, PAD, PATTERNS, byte_characters, load_fast, train_bpe, write_config
from gptcli.data.tokenizer_import import import_tokenizer
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.conftest import shared_data

pytest.importorskip("gigatoken", reason="the fast encoder is not installed")

TEXTS = [
    "the cat isn't on\nthe mat, 1234 times!\n\n  the end 中文中文 été don't we'll THE CAT\r\n",
    "def f(x):\n    return x\n\n\nhello world, they've said it's 12.5 %   <b>bold</b>",
    "Ὀδυσσεύς привет мир हिन्दी عربى 한국어 e\u0301 😀",
] * 5
NO_PREFIX = pre_tokenizers.ByteLevel(add_prefix_space=False)
# What hypothesis alone would not put beside each other.
HOSTILE = (
    *("a", "A", "s", "S", "ſ", "t", "K", "İ", "1", "٣", "²", "Ⅷ", "߀", "१", "!", "'", "’", "_", "\0", "\x7f", "é", "ß"),
    *(" ", "  ", "\n", "\r", "\r\n", "\t", "\v", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u200b", "\u3000"),
    *("'s", "'S", "'ſ", "'ll", "'LL", "'re", "'Ve", "'m", "'d", "'t", " 's", "\n't", "\r\n'll", "\u3000're", "\xa0'D"),
    *("\u0301", "\u0308", "\u0345", "\u0334", "\u200d", "\ufe0f", "\ufeff", "\ufffd", "\u093f", "\u0e49", "\u0f71"),
    *("😀", "👩🏽", "🇩🇪", "中", "字", "한", "ก", "ا", "\U000f0000", "\U0010ffff", "\ue000"),
    *("\u088f", "\u1acf", "\U00011db0", "\u08d3", "\u1df7", "\U0001e130", "\U000105d2", "\u0307", "\U00016d67"),
    *(
        END_OF_TEXT,
        PAD,
        "<|endof",
        "text|>",
        "<|",
        "|>",
        "<",
        "[X]",
        "[X",
        "[Y Z]",
        "the",
        " the",
        "<s>",
        "▁",
        "<0x41>",
    ),
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
HOSTILE_TEXT = st.lists(st.sampled_from(HOSTILE), max_size=40).map("".join)
MIXED_TEXT = st.lists(st.sampled_from(HOSTILE) | ANY_TEXT, max_size=12).map("".join)
examples = settings(max_examples=250, deadline=None, derandomize=True)


def words(pattern: str, behavior: str = "isolated") -> Any:
    """The pre-tokenizer of a pattern, as ours have it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior=behavior), byte_level])


def byte_level_bpe(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A small byte-level BPE, trained on `TEXTS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=[END_OF_TEXT, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, {"eos_token": END_OF_TEXT})
    return folder


def reference(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def encoded(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids, _ in document_tokens(texts, encoder)]


def hostile_corpus(count: int) -> list[str]:
    """Texts that are not those of the proof."""
    rand = random.Random(7)
    return ["".join(rand.choices(HOSTILE, k=rand.randrange(1, 30))) for _ in range(count)]


@dataclass(frozen=True)
class Made:
    """A tokenizer in the three ways that must agree."""

    folder: Path
    tokenizer: Tokenizer
    fast: FastTokenizer
    encoder: Encoder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """One of each of our patterns, of GPT-2's own words, and one that normalizes as Qwen's do."""
    folders = {name: tmp_path_factory.mktemp(name) for name in PATTERNS}
    for name, folder in folders.items():
        train_bpe(TEXTS, folder, vocab_size=500, pattern=name)
    others = {
        "bytelevel": byte_level_bpe(NO_PREFIX),
        "nfc": byte_level_bpe(words(PATTERNS["qwen2"]), normalizers.NFC()),
    }
    folders |= {name: saved(other, tmp_path_factory.mktemp(name)) for name, other in others.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTCLI_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {
            name: Made(
                folder,
                load_fast(folder),
                FastTokenizer((folder / "tokenizer.json").read_bytes()),
                make_encoder(folder),
            )
            for name, folder in folders.items()
        }


# Every document of the shared sets


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def documents_of(path: Path) -> Iterator[str]:
    """The documents of a file: its rows, its poems or its lines, and the whole of some."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        for line in text.splitlines():
            yield from strings(json.loads(line))
        return
    if "chinese_poetry" in path.parts:
        yield from text.split("\n\n")
    else:
        yield from text.splitlines(keepends=True)
    if f"{path.parent.name}/{path.name}" in WHOLE:
        yield text


def code() -> list[Path]:
    """Modules of Python's own library: about 5 MB."""
    library = Path(sysconfig.get_path("stdlib"))
    return [path for part in ("", "email", "json") for path in (library / part).glob("*.py")]


WHOLE = ("tinyshakespeare/input.txt", "chinese_poetry/valid.txt", "multi30k/val.de")
SETS = ("chinese_poetry", "gsm8k", "multi30k", "scitldr", "sst2", "tinyshakespeare", "wikitext-2")
LARGE = ("gsm8k", "scitldr", "wikitext-2")  # with --all-faults


@pytest.fixture(scope="module")
def gpt2_of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GPT-2's tokenizer as transformers itself builds it from the published files."""
    transformers = pytest.importorskip("transformers")
    source = shared_data("gpt2_tokenizer")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copyfile(source / "encoder.json", folder / "vocab.json")
    shutil.copyfile(source / "vocab.bpe", folder / "merges.txt")
    return transformers.GPT2TokenizerFast.from_pretrained(str(folder))


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow_fault) if name in LARGE else name for name in SETS), "code"],
)
def test_every_document_of_the_shared_sets_gets_the_ids_of_transformers(name: str, gpt2_of_transformers: Any) -> None:
    encoder = make_encoder(import_tokenizer(str(shared_data("gpt2_tokenizer"))))
    assert encoder.slow_because is None
    if name == "code":
        documents = [path.read_text(encoding="utf-8") for path in code()]
    else:
        paths = [path for path in sorted(shared_data(name).iterdir()) if path.is_file()]
        documents = list(dict.fromkeys(text for path in paths for text in documents_of(path) if text))
    assert len(documents) > 100
    for batch in batches(documents, 4_000_000):
        expected = gpt2_of_transformers(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        got = encoder(batch)
        assert got.lengths.tolist() == [len(ids) + 1 for ids in expected]
        eos = encoder.specials.eos
        flat = itertools.chain.from_iterable((*ids, eos) for ids in expected)
        assert np.array_equal(got.tokens, np.fromiter(flat, dtype=np.uint16, count=len(got.tokens)))
        assert got.bytes.tolist() == [len(text.encode("utf-8")) for text in batch]


# Any text


@pytest.mark.parametrize("strategy", [ANY_TEXT, HOSTILE_TEXT, MIXED_TEXT], ids=["any", "hostile", "mixed"])
def test_any_text_gets_the_ids_of_tokenizers(made: dict[str, Made], strategy: st.SearchStrategy[str]) -> None:
    @examples
    @given(strategy)
    def agree(text: str) -> None:
        for one in made.values():
            ids = one.tokenizer.encode(text, add_special_tokens=False).ids
            assert encoded(one.encoder, [text]) == [ids]
            if is_sure(text):
                assert one.fast(text).tolist() == ids

    agree()


@pytest.mark.parametrize("name", PATTERNS)
def test_our_tokenizers_are_taken_by_the_fast_encoder_and_every_text_round_trips(
    made: dict[str, Made], name: str
) -> None:
    one = made[name]
    assert one.encoder.slow_because is None

    @examples
    @given(ANY_TEXT | MIXED_TEXT)
    def round_trips(text: str) -> None:
        assert one.tokenizer.decode(encoded(one.encoder, [text])[0], skip_special_tokens=False) == text

    round_trips()


def test_the_batch_that_holds_one_unsure_text_gets_the_ids_of_tokenizers(made: dict[str, Made]) -> None:
    texts = ["it's", "a\u1acfb", "", "the \U00011db0's", "end"]
    for one in made.values():
        assert encoded(one.encoder, texts) == reference(one.tokenizer, texts)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_folder_loads_in_transformers_with_the_ids_of_the_fast_encoder(made: dict[str, Made], name: str) -> None:
    transformers = pytest.importorskip("transformers")
    texts = [*TEXTS, *hostile_corpus(2_000)]
    auto = transformers.AutoTokenizer.from_pretrained(str(made[name].folder))
    assert encoded(made[name].encoder, texts) == auto(texts, add_special_tokens=False)["input_ids"]


def test_ids_of_65536_and_more_are_kept_by_the_fast_encoder(tmp_path: Path) -> None:
    content = json.loads(byte_level_bpe(words(PATTERNS["gpt4"])).to_str())
    vocabulary = content["model"]["vocab"]
    for index in range(len(vocabulary), 65_600):
        vocabulary[f"filler {index}"] = index
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens(["[last]"])
    encoder = make_encoder(saved(tokenizer, tmp_path))
    assert (encoder.slow_because, encoder.vocab_size, encoder.dtype) == (None, 65_601, np.uint32)
    tokens = encoder(["the [last]"]).tokens
    assert tokens.dtype == np.uint32
    assert tokens[-2] == 65_600


# Every code point

MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Characters of NORMALIZED that show only beside one that they join with (those before and behind it).
JOINED = {
    0x105D2: ("", "\u0307"),
    0x105DA: ("", "\u0307"),
    0x113B8: ("\U000113c2", ""),
    0x113BB: ("\U00011384", ""),
    0x113C2: ("\U0001138b", ""),
    0x113C9: ("\U00011382", ""),
    0x11930: ("\U00011935", ""),
    0x1611E: ("\U0001611e", ""),
    0x1611F: ("\U00016121", ""),
    0x16120: ("\U00016121", ""),
    0x16129: ("\U0001611e", ""),
    0x16D67: ("\U00016d63", ""),
    0x16D68: ("\U00016d63", ""),
}


def code_points() -> list[int]:
    """All of the planes that hold characters, and the edges of the others."""
    ends = [(plane << 16) + at for plane in (*range(4, 14), 15, 16) for at in (*range(300), *range(0xFED4, 0x10000))]
    return [code for code in (*range(0x40000), *range(0xE0000, 0xF0000), *ends) if not 0xD800 <= code < 0xE000]


def probe(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """The 256 bytes, joined with ASCII neighbours where no word ends between them."""
    characters = byte_characters()
    vocabulary = {character: index for index, character in enumerate(characters)}
    leads, continuations = range(0xC2, 0xF5), range(0x80, 0xC0)
    pairs = [(near, byte) for near in b"a1! \nA" for byte in leads]
    pairs += [(byte, near) for near in b"a1! \nA" for byte in continuations]
    merges = [(characters[first], characters[second]) for first, second in pairs]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def differing(tokenizer: Tokenizer, context: str, codes: Sequence[int]) -> set[int]:
    """The code points that the two encode differently in a context."""
    fast = FastTokenizer(tokenizer.to_str().encode())
    found: set[int] = set()
    for start in range(0, len(codes), 4_000):
        part = codes[start : start + 4_000]
        texts = [context.format(chr(code)) for code in part]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for code, text, encoding in zip(part, texts, encodings, strict=True):
            if fast(text).tolist() != encoding.ids:
                found.add(code)
    return found


WORD_ENDS = "a{0}1{0}! {0}!{0}\n{0}a"


@pytest.mark.slow_fault
def test_words_end_elsewhere_only_at_the_characters_that_are_known_and_at_all_of_them() -> None:
    found = differing(probe(words(MARKS)), WORD_ENDS, code_points())
    assert sorted(map(hex, found - UNICODE_17)) == []
    assert sorted(map(hex, UNICODE_17 - found)) == []


@pytest.mark.slow_fault
def test_gpt2_words_end_elsewhere_only_at_the_characters_that_are_known() -> None:
    codes = [code for code in code_points() if code < 0x34000 or 0xE0000 <= code < 0xE1000 or code > 0x100000]
    assert sorted(map(hex, differing(probe(NO_PREFIX), WORD_ENDS, codes) - UNICODE_17)) == []


def test_nfc_differs_only_at_the_characters_that_are_known_and_at_all_of_them() -> None:
    tokenizer = probe(words(PATTERNS["qwen2"]), normalizers.NFC())
    # A mark of any class changes places with one of the lowest class behind it, or with one of the highest before it.
    codes = [code for code in code_points() if code < 0x20000 or 0xE0000 <= code < 0xE1000]
    found = differing(tokenizer, "a\u0345{0}\u0334", codes)
    assert sorted(map(hex, found - UNICODE_17 - NORMALIZED)) == []
    fast = FastTokenizer(tokenizer.to_str().encode())
    for code, (before, behind) in JOINED.items():
        text = before + chr(code) + behind
        assert fast(text).tolist() != tokenizer.encode(text).ids
        found.add(code)
    assert sorted(map(hex, NORMALIZED - found)) == []


def test_what_unicode_joined_since_is_known() -> None:
    # The canonical compositions of UnicodeData.txt that are younger than Unicode 9, without those excluded.
    pairs = (
        "11935+11930 105D2+0307 105DA+0307 11382+113C9 11384+113BB 1138B+113C2 11390+113C9 113C2+113C2 113C2+113B8 "
        "113C2+113C9 1611E+1611E 1611E+16129 1611E+1611F 16129+1611F 1611E+16120 16121+1611F 16122+1611F 16121+16120 "
        "16D67+16D67 16D63+16D67 16D69+16D67 16D63+16D68"
    )
    for pair in pairs.split():
        assert not is_sure("".join(chr(int(code, 16)) for code in pair.split("+")))


# Tokenizers of other kinds


def changed(pre_tokenizer: Any = None, normalizer: Any = None, **model: Any) -> Tokenizer:
    tokenizer = byte_level_bpe(pre_tokenizer or words(PATTERNS["gpt4"]), normalizer)
    content = json.loads(tokenizer.to_str())
    content["model"].update(model)
    return Tokenizer.from_str(json.dumps(content))


def with_added(*texts: str, normalizer: Any = None, **how: bool) -> Tokenizer:
    tokenizer = changed(normalizer=normalizer)
    tokenizer.add_tokens([AddedToken(text, **how) for text in texts or ("[X]", "[Y Z]")])
    return tokenizer


def with_unreachable(**model: Any) -> Tokenizer:
    """Entries that no merge makes."""
    tokenizer = changed()
    content = json.loads(tokenizer.to_str())
    for entry in ("xyzzy", "Ġthere", "Ġaatt", "Ss", "0123"):
        content["model"]["vocab"].setdefault(entry, len(content["model"]["vocab"]))
    content["model"].update(model)
    return Tokenizer.from_str(json.dumps(content))


def trained(model: Any, trainer: Any, pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece(**parts: Any) -> Tokenizer:
    specials = ["<unk>", "<s>", END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False),
        **parts,
    )


def reversed_merges() -> Tokenizer:
    content = json.loads(changed().to_str())
    content["model"]["merges"].reverse()
    return Tokenizer.from_str(json.dumps(content))


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "unknown-split": lambda: changed(words(r"\p{L}+|\p{N}{1,2}|\s|[^\s\p{L}\p{N}]+")),
    "removed": lambda: changed(words(PATTERNS["gpt4"], "removed")),
    "merged-with-previous": lambda: changed(words(PATTERNS["gpt4"], "merged_with_previous")),
    "no-words": lambda: changed(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "digits": lambda: changed(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), NO_PREFIX])),
    "prefix-space": lambda: changed(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "marks": lambda: changed(words(MARKS)),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", END_OF_TEXT], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", END_OF_TEXT], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
    ),
    "sentencepiece-metaspace": lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace()),
    "sentencepiece-normalizer": lambda: sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "lower-case": lambda: changed(normalizer=normalizers.Lowercase()),
    "nfc": lambda: changed(normalizer=normalizers.NFC()),
    "nfkc": lambda: changed(normalizer=normalizers.NFKC()),
    "lstrip": lambda: with_added(lstrip=True),
    "rstrip": lambda: with_added(rstrip=True),
    "both-strips": lambda: with_added(lstrip=True, rstrip=True),
    "single-word": lambda: with_added("[X]", "the", single_word=True),
    "not-normalized": lambda: with_added(normalizer=normalizers.NFC(), normalized=False),
    "overlapping": lambda: with_added("the", "the end", " \n", "\n\n", "  ", "é", "'s", "<"),
    "ignore-merges": lambda: with_unreachable(ignore_merges=True),
    "unreachable": with_unreachable,
    "merges-reversed": reversed_merges,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_tokenizers_get_the_ids_of_tokenizers_fast_or_slow(name: str, tmp_path: Path) -> None:
    tokenizer = OTHERS[name]()
    encoder = make_encoder(saved(tokenizer, tmp_path))
    assert encoder.slow_because is None or "fast encoder" in encoder.slow_because
    texts = [*hostile_corpus(3_000), *TEXTS]
    assert encoded(encoder, texts) == reference(tokenizer, texts)


@pytest.mark.parametrize("name", ["unknown-split", "wordpiece", "unigram", "lower-case", "single-word", "no-words"])
def test_the_fast_encoder_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    because = make_encoder(saved(OTHERS[name](), tmp_path)).slow_because
    assert because is not None
    assert because.startswith(("the fast encoder cannot take this tokenizer (", "the fast encoder differs from"))


def test_a_tokenizer_that_leaves_out_merges_at_random_is_never_fast(tmp_path: Path) -> None:
    assert make_encoder(saved(changed(dropout=0.2), tmp_path)).slow_because is not None


# What is remembered


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[Tokenizer]:
    """The tokenizers that were proven."""
    seen: list[Tokenizer] = []
    original = fast_module.prove

    def spy(fast: Any, slow: Tokenizer) -> None:
        seen.append(slow)
        original(fast, slow)

    monkeypatch.setattr(fast_module, "prove", spy)
    return seen


def found(folder: Path) -> FastTokenizer | str:
    return fast_tokenizer(folder, load_fast(folder))


def test_the_proof_is_run_once_for_a_content_and_the_versions(
    made: dict[str, Made], tmp_path: Path, proofs: list[Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made["gpt4"].folder
    for _ in range(3):
        assert isinstance(found(folder), FastTokenizer)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    assert isinstance(found(tmp_path), FastTokenizer)
    assert len(proofs) == 1
    assert isinstance(found(made["gpt2"].folder), FastTokenizer)
    assert len(proofs) == 2
    with monkeypatch.context() as patch:
        patch.setattr(fast_module, "tokenizers_version", "0")
        found(folder)
    assert len(proofs) == 3
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0")
        found(folder)
    assert len(proofs) == 4
    found(folder)
    assert len(proofs) == 4


def test_a_difference_that_was_found_is_believed_without_another_proof(
    made: dict[str, Made], tmp_path: Path, proofs: list[Tokenizer]
) -> None:
    distrust(made["gpt4"].folder, "it was wrong once")
    assert found(made["gpt4"].folder) == "it was wrong once"
    assert make_encoder(made["gpt4"].folder).slow_because == "it was wrong once"
    assert proofs == []
    folder = saved(OTHERS["single-word"](), tmp_path)
    because = found(folder)
    assert "differs from tokenizers" in str(because)
    assert found(folder) == because
    assert len(proofs) == 1


def test_without_the_package_everything_works_and_nothing_is_held_against_it_later(
    made: dict[str, Made], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def version(name: str) -> str:
        if name == "gigatoken":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    one = made["gpt4"]
    for installed in (True, False):  # a package that cannot be loaded, and none
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "gigatoken", None)
            patch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
            if not installed:
                patch.setattr(importlib.metadata, "version", version)
            encoder = make_encoder(one.folder)
            assert encoder.slow_because == "the package gigatoken is not installed"
            assert encoded(encoder, TEXTS) == reference(one.tokenizer, TEXTS)
        assert make_encoder(one.folder).slow_because is None
        shutil.rmtree(cache / "encoders")


# During a job


class Told(Silent):
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


SECRET = "Xylophagous"


def job(folder: Path, tokenizer: Path, text: str) -> tuple[Prepared, Told]:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"tokenizer: {{from: {tokenizer}}}\n"
        "data: {train: {path: text.txt, documents: file}, validation: {tail: 10%}, sequence_length: 16}\n",
        encoding="utf-8",
    )
    told = Told()
    return prepare(load_recipe(str(folder / "recipe.yaml")), told), told


class Panic(BaseException):
    """As those of native code are: no Exception."""


def wrong(self: FastTokenizer, text: str, original: Any = FastTokenizer.__call__) -> Any:
    ids = original(self, text)
    return ids[::-1] if SECRET in text else ids


class Panics:
    """A native tokenizer that panics at a word."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Any:
        if SECRET in text:
            raise Panic("index out of bounds")
        return self._tokenizer.encode(text)


@pytest.mark.parametrize("how", ["wrong", "panic", "panic-behind-the-sample"])
def test_a_fast_encoder_that_fails_in_a_job_is_replaced_and_not_used_again(
    how: str, made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "wrong":
        monkeypatch.setattr(FastTokenizer, "__call__", wrong)
    else:
        import gigatoken.gigatoken_rs as native

        load = native.load_hf_json
        monkeypatch.setattr(native, "load_hf_json", lambda content: Panics(load(content)))
    folder = made["llama3"].folder
    text = "the cat and the mat, " * 100
    text = text + SECRET + text if how == "panic-behind-the-sample" else SECRET + " " + text
    result, told = job(tmp_path, folder, text)
    assert len(told.warned) == 1
    assert told.warned[0].endswith("everything is encoded again with tokenizers")
    tokenizer = load_fast(result.tokenizer)
    assert result.validation is not None
    streams = [side.streams[0].read(0, len(side.streams[0])) for side in (result.train, result.validation)]
    assert tokenizer.decode(np.concatenate(streams).tolist()) == text
    cut = [tokenizer.decode(stream.tolist()) for stream in streams]
    ids = [[*tokenizer.encode(part).ids, tokenizer.token_to_id(END_OF_TEXT)] for part in cut]
    assert [stream.tolist() for stream in streams] == ids
    again, told = job(tmp_path, folder, text + " and more")
    assert not again.reused
    assert told.warned == []
    assert any("encoding with tokenizers" in line for line in told.said)


def test_a_fast_encoder_that_agrees_is_used_without_a_word(made: dict[str, Made], tmp_path: Path) -> None:
    _, told = job(tmp_path, made["llama3"].folder, "the cat and the mat, " * 100)
    assert told.warned == []
    assert not any("encoding with tokenizers" in line for line in told.said)


def test_an_interrupt_of_the_user_is_no_difference(made: dict[str, Made], monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        def encode(self, text: str) -> Any:
            raise KeyboardInterrupt

    fast = FastTokenizer((made["gpt4"].folder / "tokenizer.json").read_bytes())
    monkeypatch.setattr(fast, "_tokenizer", Native())
    with pytest.raises(KeyboardInterrupt):
        fast("a")


# Memory, and texts that no one writes


def random_letters(count: int) -> str:
    return "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz", k=count))


def test_the_memory_of_words_is_begun_anew_when_it_has_grown_and_the_ids_stay(
    made: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_module, "MEMORY_GROWTH", 1 << 20)
    loads: list[int] = []
    original = FastTokenizer._load

    def load(self: FastTokenizer) -> None:
        loads.append(1)
        original(self)

    monkeypatch.setattr(FastTokenizer, "_load", load)
    letters = random_letters(4_000_000)
    text = " ".join(letters[start : start + 9] for start in range(0, len(letters), 9))
    fast = FastTokenizer((made["gpt4"].folder / "tokenizer.json").read_bytes())
    fast.trim()
    assert len(loads) == 1
    before = fast(text)
    fast.trim()
    assert len(loads) == 2
    assert np.array_equal(fast(text), before)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "bytelevel"])
@pytest.mark.parametrize("kind", ["letter", "space", "newline", "letters", "crlf", "marks"])
def test_a_megabyte_of_one_thing_gets_the_ids_of_tokenizers(made: dict[str, Made], name: str, kind: str) -> None:
    text = {
        "letter": "a" * 1_000_000,
        "space": " " * 1_000_000,
        "newline": "\n" * 1_000_000,
        "letters": random_letters(1_000_000),
        "crlf": "\r\n" * 500_000,
        "marks": "e\u0301" * 300_000,
    }[kind]
    one = made[name]
    assert encoded(one.encoder, [text]) == reference(one.tokenizer, [text])


def test_what_cannot_be_read_is_unequal() -> None:
    for content in (b"{}", b"", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
        with pytest.raises(Unequal):
            FastTokenizer(content)
