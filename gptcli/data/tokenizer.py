"""Tokenizers: training one, reading a folder of one, and what its special tokens are.

A trained tokenizer is byte-level BPE (or the 256 bytes themselves), saved as the plain folder that transformers'
`AutoTokenizer` loads as `PreTrainedTokenizerFast`. `tokenizer.json` is the only truth about ids: nothing here imports
transformers. Every string of valid Unicode round-trips.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gptcli.errors import DataError, MissingError
from gptcli.files import cache_root, committed_folder, fingerprint, read_json, sha256_file, write_json
from gptcli.processors import PROCESSOR_FILES

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *PROCESSOR_FILES,  # of a model that reads images or sounds
)
TRAINING_BATCH = 1000
UNLIMITED_LENGTH = int(1e30)  # transformers' own VERY_LARGE_INTEGER

# How text is cut into words, inside which BPE merges, in the spellings that the fast encoder knows (gpt2 and gpt4 cut
# where the originals do). Sources: gpt2: github.com/openai/gpt-2, src/encoder.py;
# gpt4: github.com/openai/tiktoken, tiktoken_ext/openai_public.py (cl100k_base); llama3: github.com/meta-llama/llama3,
# llama/tokenizer.py; qwen2: github.com/huggingface/transformers, models/qwen2/tokenization_qwen2.py.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@dataclass(frozen=True)
class Specials:
    """The ids of the special tokens; `adds_bos`: the tokenizer's own post-processor puts BOS before every text."""

    bos: int | None
    eos: int | None
    pad: int | None
    adds_bos: bool


def train_bpe(
    texts: Iterable[str], folder: Path, *, vocab_size: int, pattern: str, special_tokens: Sequence[str] = ()
) -> int:
    """Train byte-level BPE on `texts`, save it in `folder`, return its true size (smaller if the text gave no more).

    The same texts give the same bytes. `vocab_size` includes the two specials, which are the ids 0 and 1, and the
    `special_tokens` that follow them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[
            AddedToken(text, special=True, normalized=False) for text in (END_OF_TEXT, PAD, *special_tokens)
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(texts), trainer=trainer)
    _save(tokenizer, folder, special_tokens)
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def bytes_tokenizer() -> Tokenizer:
    """The tokenizer of 258 entries whose ids 0 to 255 are the bytes of UTF-8, then `END_OF_TEXT` and `PAD`."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (END_OF_TEXT, PAD)])
    return tokenizer


def save_bytes_tokenizer(folder: Path) -> None:
    """Save the tokenizer of `{algorithm: bytes}` in `folder`."""
    _save(bytes_tokenizer(), folder)


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`), by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def bytes_of(entry: str) -> bytes | None:
    """The bytes that an entry of a byte-level vocabulary stands for; None when it is not written byte by byte."""
    try:
        return bytes(_BYTE_OF[character] for character in entry)
    except KeyError:
        return None


def division(folder: Path) -> str | None:
    """How a folder's byte-level tokenizer divides a text before it merges: a key of `PATTERNS`, "bytes" for one that
    merges nothing, None for any other.

    Raises what `load_fast` does.
    """
    told = json.loads(load_fast(folder).to_str())
    steps = told["pre_tokenizer"] or {}
    parts = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    last = {"add_prefix_space": None, "use_regex": None, **parts[-1]} if parts else {}
    if told["normalizer"] is not None or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(parts) == 2 and not last["use_regex"] and parts[0].get("type") == "Split":
        split = (parts[0]["pattern"].get("Regex"), parts[0]["behavior"], parts[0]["invert"])
        return next((name for name, pattern in PATTERNS.items() if split == (pattern, "Isolated", False)), None)
    if len(parts) == 1 and last["use_regex"]:
        return "gpt2"  # tokenizers' own
    return "bytes" if len(parts) == 1 and not told["model"].get("merges") else None


def load_fast(folder: Path) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a folder, without the truncation and padding that a file may carry.

    Raises `MissingError` for a folder without tokenizer.json and `DataError` for one that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise MissingError("the folder holds no tokenizer.json", where=str(folder))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
        raise DataError(f"tokenizer.json is not a tokenizer: {error}", where=str(folder)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_ids(folder: Path, loaded: Tokenizer | None = None) -> Specials:
    """The special tokens that a folder's configuration names, and whether BOS is put before a text.

    `loaded` is the folder's tokenizer, for who has it already: reading it takes up to a fifth of a second.

    The latter is seen by encoding a text with and without special tokens; an explicit `add_bos_token` in the
    configuration, by which transformers replaces the post-processor, goes before it.
    """
    tokenizer = loaded or load_fast(folder)
    named = named_specials(folder)
    ids = {name: tokenizer.token_to_id(text) for name, text in named.items()}
    bos = ids.get("bos_token")
    prefix = _added_before(tokenizer)
    explicit = _config(folder).get("add_bos_token")
    if isinstance(explicit, bool):
        adds_bos = explicit and bos is not None
    else:
        adds_bos = bool(prefix)
        bos = prefix[0] if prefix else bos
    return Specials(bos, ids.get("eos_token"), ids.get("pad_token"), adds_bos)


def prompt_beginning(first: int | None, specials: Specials) -> int | None:
    """The token to put before a prompt whose first token is `first` (None: the prompt is empty); None: nothing.

    BOS where the tokenizer's own post-processor adds it, unless the prompt begins with it; of an empty prompt BOS, else
    EOS. A prompt is trained on and continued alike.
    """
    if specials.adds_bos and specials.bos is not None and first != specials.bos:
        return specials.bos
    if first is None:
        return specials.bos if specials.bos is not None else specials.eos
    return None


def named_specials(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token and pad_token, as far as the folder names them."""
    extra = folder / "special_tokens_map.json"
    merged = json_object(extra) | {k: v for k, v in _config(folder).items() if v is not None}
    named: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        value = merged.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def tokenizer_fingerprint(folder: Path) -> str:
    """A hash of the content of the files that make a tokenizer."""
    return fingerprint({name: sha256_file(folder / name) for name in FILES if (folder / name).is_file()})


def kept_tokenizer(work: Path) -> Path:
    """The folder in the cache, named by content, with the files of `work`."""
    target = cache_root() / "tokenizers" / tokenizer_fingerprint(work)
    if not target.is_dir():
        with committed_folder(target) as commit:
            for path in work.iterdir():
                shutil.copyfile(path, commit / path.name)
    return target


def write_config(folder: Path, specials: dict[str, str], **others: Any) -> None:
    """Write the tokenizer_config.json by which transformers loads `tokenizer.json` as it is, in any of its versions."""
    config = {
        **others,
        **specials,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config.setdefault("model_max_length", UNLIMITED_LENGTH)
    write_json(folder / "tokenizer_config.json", config)


def _save(tokenizer: Tokenizer, folder: Path, special_tokens: Sequence[str] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    others = {"additional_special_tokens": list(special_tokens)} if special_tokens else {}
    write_config(folder, specials, **others)
    write_json(folder / "special_tokens_map.json", {**specials, **others})


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} where there is none. Raises `DataError` for anything else."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not JSON: {error}", where=str(path.parent)) from None
    if not isinstance(value, dict):
        raise DataError(f"{path.name} is not a JSON object", where=str(path.parent))
    return value


def _config(folder: Path) -> dict[str, Any]:
    return json_object(folder / "tokenizer_config.json")


def _added_before(tokenizer: Tokenizer) -> list[int]:
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == TRAINING_BATCH:
            yield batch
            batch = []
    yield batch


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
