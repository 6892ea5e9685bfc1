"""The fast encoder, used only where it is proven to give the ids of `tokenizers`.

gigatoken reads a tokenizer.json and encodes 100 to 200 MB/s a core, where `tokenizers` does 1 to 2. It is believed only
after it agreed on a hostile corpus, made anew from each tokenizer's own entries (once a tokenizer; the outcome is kept
in the cache), and every piece of a job is sampled again. One difference is understood: its tables are those of Unicode
17, and `tokenizers` has Unicode 16 (and 9 to normalize), so texts with a character of `UNICODE_17` or `NORMALIZED`
always go through `tokenizers`.
"""

from __future__ import annotations

import json
import os
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from gptcli.data.tokenizer import bytes_of
from gptcli.files import cache_root, fingerprint, read_json, sha256_file, write_json

FORMAT = 1
# Its memory of words grows without a bound (1 GB after 100 MB of random letters), so it is begun anew at this size.
MEMORY_GROWTH = 128 << 20
# The characters that Unicode 17 added to the letters, marks and numbers, on which words end elsewhere: found by
# comparing the two at every code point (tests/unit/data/test_fast.py does it again).
_UNICODE_17 = (
    "88F C5C CDC 1ACF-1ADD 1AE0-1AEB A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EC7 10EFA-10EFB 11B60-11B67 "
    "11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE "
    "1E6E0-1E6F5 1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479"
)
# The characters younger than Unicode 9 that NFC (a normalizer of many tokenizers) reorders or joins: found as above,
# and by all pairs of neighbours. What they join with is not here where the other of the two is.
_NORMALIZED = (
    "7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1ACE 1DF6-1DFA A82C 105D2 105DA 10D24-10D27 10D69-10D6D "
    "10EAB-10EAC 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 113B8 113BB 113C2 113C9 113CE-113D0 1145E "
    "11839-1183A 11930 1193D-1193E 11943 119E0 11A34 11A47 11A99 11D42 11D44-11D45 11D97 11F41-11F42 1611E-16120 16129 "
    "1612F 16D67-16D68 16FF0-16FF1 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF"
)


def _codes(ranges: str) -> frozenset[int]:
    ends = [[int(end, 16) for end in part.split("-")] for part in ranges.split()]
    return frozenset(code for pair in ends for code in range(pair[0], pair[-1] + 1))


UNICODE_17 = _codes(_UNICODE_17)
NORMALIZED = _codes(_NORMALIZED)
_IS_LATER = np.zeros(max(UNICODE_17 | NORMALIZED) + 2, dtype=np.bool_)
_IS_LATER[list(UNICODE_17 | NORMALIZED)] = True

Encode = Callable[[str], NDArray[np.uint32]]


class Unequal(Exception):
    """The fast encoder gave other ids than `tokenizers`, or failed, on a text where no difference is known."""


class MissingPackage(Unequal):
    """The fast encoder is not installed, or cannot be loaded here: that says nothing about the tokenizer."""


class FastTokenizer:
    """A tokenizer.json in the fast encoder. Raises `Unequal` when it cannot be read, or a text cannot be encoded."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._load()

    def __call__(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text, without any that a post-processor adds."""
        try:
            return self._tokenizer.encode(text)  # type: ignore[no-any-return]
        except BaseException as error:  # a panic of Rust is no Exception
            raise _understood(error) from None

    def trim(self) -> None:
        """Begin anew when the memory of words has grown past `MEMORY_GROWTH`."""
        if _resident() - self._resident > MEMORY_GROWTH:
            del self._tokenizer
            self._load()

    def _load(self) -> None:
        try:
            from gigatoken.gigatoken_rs import load_hf_json

            self._tokenizer: Any = load_hf_json(self._content)
        except BaseException as error:
            raise _understood(error) from None
        self._resident = _resident()


def fast_tokenizer(folder: Path, slow: Tokenizer) -> FastTokenizer | str:
    """The fast encoder of a tokenizer's folder, or the reason why `tokenizers` is used for it.

    The proof of equality (up to a second) is run once for each tokenizer and version of the two libraries.
    """
    record = _record(folder)
    known = read_json(record) if record.is_file() else None
    if known is not None and known["difference"]:
        return str(known["difference"])
    try:
        fast = FastTokenizer((folder / "tokenizer.json").read_bytes())
        if known is None:
            prove(fast, slow)
            write_json(record, {"difference": None, **_versions()})
    except MissingPackage as error:
        return str(error)
    except Unequal as error:
        write_json(record, {"difference": str(error), **_versions()})
        return str(error)
    return fast


def distrust(folder: Path, difference: str) -> None:
    """Remember that the fast encoder differs for this tokenizer, so that it is not used again."""
    write_json(_record(folder), {"difference": difference, **_versions()})


def is_sure(text: str) -> bool:
    """Whether no difference is known for a text."""
    if text.isascii():
        return True
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return not _IS_LATER[np.minimum(codes, len(_IS_LATER) - 1)].any()


def compare(fast: Encode, slow: Tokenizer, texts: Sequence[str]) -> None:
    """Raise `Unequal` when the two give other ids for a text on which no difference is known."""
    sure = [text for text in texts if is_sure(text)]
    for text, encoding in zip(sure, slow.encode_batch_fast(sure, add_special_tokens=False), strict=True):
        if not np.array_equal(fast(text), np.array(encoding.ids, dtype=np.uint32)):
            raise Unequal(f"the fast encoder differs from tokenizers on {_excerpt(text)}")


def prove(fast: Encode, slow: Tokenizer) -> None:
    """Raise `Unequal` unless the two agree on the hostile corpus of a tokenizer."""
    compare(fast, slow, list(hostile_texts(slow)))


def hostile_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Some 0.5 MB that are hard to tokenize: the same for the same tokenizer."""
    yield from ("", " ", "\n", "\0", "a" * 20_000, " " * 5_000, "\n" * 5_000, " \n" * 3_000, "ab" * 9_000, "1" * 5_000)
    yield from ("é" * 3_000, "字" * 5_000, "'" * 3_000, "\u0301" * 2_000, "😀" * 2_000, "\r\n" * 2_000, "\t" * 2_000)
    rand = random.Random(20)
    entries = sorted(tokenizer.get_vocab(with_added_tokens=False))
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in added:
        yield from (text, f" {text} ", f"a{text}b", f"\n{text}\n", text * 3, text[:-1], f"{text[:-1]} {text[-1:]}")
    # A tokenizer's own entries, alone and joined, reach merges (and entries without one) that no text happens to hold.
    words = [word for entry in rand.sample(entries, min(4_000, len(entries))) if (word := _text(entry))]
    yield from words
    for _ in range(400):
        yield "".join(rand.choices(words or ["a"], k=rand.randrange(2, 12)))
    alphabet = [*_HOSTILE, *added]
    for _ in range(4_000):
        yield "".join(rand.choices(alphabet, k=rand.randrange(1, 30)))
    # Every 16th of the characters that are younger than Unicode 3.2 or not there yet: where tables differ in age.
    for code in (*range(0x80, 0xD800, 16), *range(0xE000, 0x40000, 16), *range(0xE0000, 0xE1000, 16)):
        character = chr(code)
        if unicodedata.ucd_3_2_0.category(character) == "Cn":
            yield f"a{character}'ll{character} 1{character}1!{character}!\n{character}"


_HOSTILE = (
    *"aAzZsStTdDmMlLrReEvV''''’`´  \n\r\t\v\f\x1c\x1d\x85\xa0\u2003\u2028\u2029\u200b\u3000019٣²½Ⅷ߀",
    *'!?.,:;-_/\\"@#$%&*()[]{}<>\x00\x01\x7f\xadéßſKİıñçœøÿǅʰ中文字语漢かなカナ한글กเ้हिदीاللةبעבריתΩωЖжაᏣ',
    *"😀👨\u200d👩🏽🇩🇪\u0301\u0308\u200d\ufeff\ufffd\U000f0000",
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "'ſ", "n't", "\n\n", "\n\n\n", "   ", "\r\n"),
    *(" \n", " the", "ing", "123", "1234", "3.14", "e\u0301", "http://", "__init__", "    return", "},\n", "...", "--"),
)


def _record(folder: Path) -> Path:
    key = fingerprint([FORMAT, sha256_file(folder / "tokenizer.json"), _versions()])
    return cache_root() / "encoders" / f"{key}.json"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        fast = version("gigatoken")
    except PackageNotFoundError:
        fast = "none"
    return {"tokenizers": tokenizers_version, "gigatoken": fast}


def _understood(error: BaseException) -> BaseException:
    """The error to raise in place of one that the fast encoder raised."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    if isinstance(error, ImportError):
        return MissingPackage("the package gigatoken is not installed")
    reason = str(error).strip().splitlines()
    return Unequal(
        f"the fast encoder cannot take this tokenizer ({reason[0][:120] if reason else type(error).__name__})"
    )


def _text(entry: str) -> str:
    """A byte-level entry as the text that it stands for; others (and parts of a character) as they are written."""
    raw = bytes_of(entry)
    return entry if raw is None else raw.decode("utf-8", "ignore")


def _excerpt(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:60] + "...")


def _resident() -> int:
    """Bytes of this process in memory; 0 where that is not known."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
