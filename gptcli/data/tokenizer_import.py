"""`tokenizer.from`: a folder, a tokenizer.json or a Hub id becomes a folder of ours with the same ids.

The copy names `PreTrainedTokenizerFast` as its class, so that transformers takes tokenizer.json as it is: for other
classes transformers 5 rebuilds the pre-tokenizer from its own code, and ids could differ from the file's. Code that
comes with a tokenizer is never run.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gptcli.data.tokenizer import FILES, json_object, kept_tokenizer, load_fast, named_specials, write_config
from gptcli.errors import DataError, MissingError, first_line
from gptcli.files import cache_root, fingerprint, leads_out, sha256_file, write_atomic
from gptcli.processors import PROCESSOR_FILES

FORMAT = 1

# Specials of published tokenizers, for a tokenizer.json that comes without a configuration.
KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SLOW_NAMES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
TEKKEN = "tekken.json"  # Mistral's
_HUB_FILES = [*FILES, "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.model", TEKKEN]
_CARRIED_WHOLE = ("special_tokens_map.json", "chat_template.jinja", *PROCESSOR_FILES)
_CARRIED = ("model_max_length", "chat_template", "add_bos_token", "add_eos_token", "additional_special_tokens")


def import_tokenizer(origin: str, *, revision: str | None = None, where: str | None = None) -> Path:
    """The folder (in the cache, named by content) of the tokenizer that `origin` names.

    Raises `MissingError` when there is none, and `DataError` when it has no token that ends a text.
    """
    source = _locate(origin, revision, where)
    known = cache_root() / "tokenizers" / "imported" / fingerprint([FORMAT, _content(source)])
    if known.is_file() and (target := known.parent.parent / known.read_text(encoding="utf-8")).is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="gptcli-tokenizer-") as name:
        work = Path(name)
        if source.is_file():
            shutil.copyfile(source, work / "tokenizer.json")
        elif (source / "tokenizer.json").is_file():
            for file in FILES:
                if (source / file).is_file():
                    _copy(source / file, work / file, origin, where)
        else:
            _convert(source, work, origin, where)
        try:
            _normalise(work, origin, where)
        except DataError as error:  # in the user's words: the copy is ours
            raise DataError(error.what, where=origin if error.where == str(work) else error.where) from None
        target = kept_tokenizer(work)
    write_atomic(known, target.name)
    return target


def _content(source: Path) -> dict[str, str]:
    """The hash of each file that an import reads: a conversion takes seconds, so the same content is not done twice."""
    paths = [source] if source.is_file() else [source / name for name in (*_HUB_FILES, "added_tokens.json")]
    return {path.name: sha256_file(path) for path in paths if path.is_file()}


def _locate(origin: str, revision: str | None, where: str | None) -> Path:
    path = Path(origin).expanduser()
    if path.is_file():
        if path.suffix != ".json":
            raise MissingError(
                f"{origin} is not a tokenizer.json", where=where, remedy="Give a tokenizer.json, or a folder."
            )
        return path.parent if path.name == "tokenizer.json" else path
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", origin) and not origin.startswith("."):
        return _download(origin, revision, where)
    raise MissingError(
        f"there is no tokenizer at {origin}",
        where=where,
        remedy="tokenizer.from takes a folder, a tokenizer.json or a Hub id (OWNER/NAME); or train one:\n"
        "tokenizer: {train: {algorithm: bpe, vocab_size: 8192}}",
    )


def _download(name: str, revision: str | None, where: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # every HTTP library has its own errors for a network that is not there
        reason = first_line(error)[:200]
        raise MissingError(
            f"the tokenizer {name!r} is neither a folder here nor to be had from the Hub ({reason})",
            where=where,
            remedy="Check the name and the network. Without a network: give a folder, or train one:\n"
            "tokenizer: {train: {algorithm: bpe, vocab_size: 8192}}",
        ) from None


def _convert(source: Path, target: Path, origin: str, where: str | None) -> None:
    """Write tokenizer.json from GPT-2's kind of files; by transformers where a configuration names a class.

    Mistral's tekken.json is read by transformers, as any other program of transformers' does without mistral-common.
    """
    names = next((names for names in SLOW_NAMES if all((source / name).is_file() for name in names)), None)
    tekken = names is None and (source / TEKKEN).is_file()
    if names is None and not tekken:
        raise MissingError(
            f"{origin} holds no tokenizer",
            where=where,
            remedy="Expected tokenizer.json, vocab.json with merges.txt, encoder.json with vocab.bpe, or tekken.json.",
        )
    vocabulary = {TEKKEN: TEKKEN} if names is None else dict(zip(names, SLOW_NAMES[0], strict=True))
    for name, usual in vocabulary.items():
        shutil.copyfile(source / name, target / usual)
    configured = (source / "tokenizer_config.json").is_file()
    for name in (*FILES, "added_tokens.json"):  # there is no tokenizer.json
        if (source / name).is_file():
            _copy(source / name, target / name, origin, where)
    try:
        if tekken:
            from transformers import PreTrainedTokenizerFast

            PreTrainedTokenizerFast.from_pretrained(str(target), local_files_only=True).save_pretrained(str(target))
        elif configured:
            from transformers import AutoTokenizer

            # Without a word on it transformers asks on standard input whether code of the folder may run.
            own = AutoTokenizer.from_pretrained(str(target), trust_remote_code=False, local_files_only=True)
            own.save_pretrained(str(target))
        else:
            _gpt2(target).save(str(target / "tokenizer.json"))
    except Exception as error:  # whatever the conversion raises, the files are not a tokenizer that can be used
        if "trust_remote_code" in str(error):
            raise MissingError(
                f"the tokenizer of {origin} brings its own Python code, which is not run",
                where=where,
                remedy="Give a tokenizer.json, which is data: PreTrainedTokenizerFast saves one.",
            ) from None
        reason = first_line(error)
        raise DataError(f"the tokenizer of {origin} cannot be converted: {reason}", where=where) from None
    for path in target.iterdir():
        if path.name not in FILES:
            path.unlink()


def _copy(source: Path, target: Path, origin: str, where: str | None) -> None:
    """Copy a file of a tokenizer; none that goes on as it is and is a link out of its folder and the Hub's cache."""
    if source.name in _CARRIED_WHOLE and (real := leads_out(source)) is not None:
        raise DataError(
            f"{source.name} of the tokenizer {origin} is a link out of its folder, to {real}",
            where=where,
            remedy="It would be copied into every model that is trained. Put the file itself there if it is meant.",
        )
    shutil.copyfile(source, target)


def _gpt2(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from vocab.json and merges.txt, as transformers builds it with 2 s of imports."""
    vocabulary, merges = (str(folder / name) for name in SLOW_NAMES[0])
    tokenizer = Tokenizer(models.BPE.from_file(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([text for text in KNOWN_ENDS if tokenizer.token_to_id(text) is not None])
    return tokenizer


def _normalise(folder: Path, origin: str, where: str | None) -> None:
    """Name the specials and the class in tokenizer_config.json. Raises `DataError` without an end-of-text token."""
    tokenizer = load_fast(folder)
    named = named_specials(folder)
    if "eos_token" not in named:
        found = next((text for text in KNOWN_ENDS if tokenizer.token_to_id(text) is not None), None)
        if found is None:
            raise DataError(
                f"the tokenizer {origin} names no token that ends a text",
                where=where,
                remedy='Put a tokenizer_config.json beside its tokenizer.json: {"eos_token": "..."}.',
            )
        named["eos_token"] = found
    absent = [text for text in named.values() if tokenizer.token_to_id(text) is None]
    if absent:
        raise DataError(f"the tokenizer {origin} names {absent[0]!r}, which its tokenizer.json lacks", where=where)
    path = folder / "tokenizer_config.json"
    config = json_object(path)
    write_config(folder, named, **{key: config[key] for key in _CARRIED if config.get(key) is not None})
