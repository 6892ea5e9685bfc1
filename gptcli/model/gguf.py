"""GGUF, the file of llama.cpp and what is built on it, written by llama.cpp's own converter.

No package brings that converter from its authors, so it is looked for: `--gguf-converter`, then
`$GPTCLI_GGUF_CONVERTER`, then the search path. It runs as a process of its own, into a file beside the target that is
moved there when it is whole.

The converter knows a tokenizer by a hash of what it makes of one text, so it knows the published ones and none that was
trained here. Where the way in which ours divide a text is one of llama.cpp's, it is told the name (`gguf_named.py`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from gptcli.errors import CheckpointError, MissingError, writing
from gptcli.files import fsync_file, fsync_folder
from gptcli.reporting import Reporter, mebibytes

VARIABLE = "GPTCLI_GGUF_CONVERTER"
NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
MAGIC = b"GGUF"
# By the dtype of the weights; q8_0 has 8 bits and a scale for each 32 weights.
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "q8_0"}
# The names that llama.cpp has (src/llama-vocab.cpp) for the patterns of `tokenizer.train.pattern`. Its llama-bpe is
# llama3's, too, but puts BOS in front and passes over merges; dbrx is the same pattern without either.
DIVISIONS = {"gpt2": "gpt-2", "gpt4": "dbrx", "llama3": "dbrx", "qwen2": "qwen2"}
LAST_LINES = 4
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"


def find_converter(given: str | None) -> Path:
    """The converter that a user named, or the one that is found.

    Raises:
        MissingError: the named one is no file, or none is found.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        path = path / NAMES[0] if path.is_dir() else path
        if path.is_file():
            return path
        raise MissingError(
            "no GGUF converter here" if path.parent.is_dir() else "no such folder",
            where=str(path),
            remedy=f"Give the path of llama.cpp's {NAMES[0]}.",
        )
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    raise MissingError(
        f"--gguf needs llama.cpp's {NAMES[0]}, which is not on the search path",
        remedy="git clone --depth 1 https://github.com/ggml-org/llama.cpp\n"
        "pip install gguf sentencepiece protobuf\n"
        f"then add --gguf-converter llama.cpp, or set {VARIABLE} to that folder",
    )


def convert(
    folder: Path, target: Path, converter: Path, *, outtype: str, division: str | None, reporter: Reporter
) -> int:
    """Turn a plain Hugging Face folder into one GGUF file; returns its bytes.

    Args:
        folder: the model.
        target: the file; one that is there is replaced when the new one is whole.
        converter: see `find_converter`.
        outtype: one of the converter's types: f32, f16, bf16, q8_0.
        division: how the tokenizer divides a text, as `data.tokenizer` tells it; None: the converter finds out.
        reporter: where it is said what was done.

    Raises:
        MissingError: a package that the converter needs is missing, or it does not know the model or its tokenizer.
        CheckpointError: it failed otherwise, or the file cannot be written.
    """
    if division == "bytes":
        raise MissingError(
            "llama.cpp reads no tokenizer that merges nothing, and this model's tokens are bytes",
            where=str(folder),
            remedy="Train with tokenizer.train.algorithm: bpe for a model that is to go there.",
        )
    with writing(target, "the GGUF file", "Nothing of it is left behind."):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder, since a converter may write several files.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as work:
            part = Path(work) / "model.gguf"
            _run(_command(folder, part, converter, outtype, division), folder, converter)
            _check(part, converter)
            fsync_file(part)
            part.chmod(0o644)
            os.replace(part, target)
        fsync_folder(target.parent)
    size = target.stat().st_size
    reporter.say(f"{target}: GGUF, {outtype}, {mebibytes(size)}")
    return size


def _command(folder: Path, part: Path, converter: Path, outtype: str, division: str | None) -> list[str]:
    arguments = [str(folder), "--outfile", str(part), "--outtype", outtype]
    if converter.suffix != ".py":
        return [str(converter), *arguments]
    if division is None:
        return [sys.executable, str(converter), *arguments]
    named = Path(__file__).with_name("gguf_named.py")
    return [sys.executable, str(named), str(converter), DIVISIONS[division], *arguments]


def _run(command: list[str], folder: Path, converter: Path) -> None:
    """Run the converter to its end, away from the network; what it prints is shown only when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise MissingError(
            f"the GGUF converter cannot be started: {error.strerror or error}", where=str(converter)
        ) from error
    if done.returncode == 0:
        return
    printed = done.stdout.decode("utf-8", "replace")
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    said = "\n".join(line[:300] for line in lines[-LAST_LINES:])
    if _UNKNOWN_TOKENIZER in printed:
        raise MissingError(
            "llama.cpp's converter does not know this tokenizer, so no GGUF file would encode texts as the model does",
            where=str(folder),
            remedy="It knows those of published models, and those that gptcli trains.",
        )
    if "ModuleNotFoundError" in printed:
        raise MissingError(
            "a package that the GGUF converter needs is missing",
            where=str(converter),
            remedy=f"{lines[-1]}\npip install gguf sentencepiece protobuf",
        )
    if "is not supported" in printed:
        raise MissingError("llama.cpp's converter does not know this type of model", where=str(converter), remedy=said)
    if done.returncode < 0:
        ended = f"was ended by {signal.Signals(-done.returncode).name}"
    else:
        ended = f"failed with {done.returncode}"
    raise CheckpointError(f"the GGUF converter {ended}; no file was written", where=str(converter), remedy=said)


def _check(part: Path, converter: Path) -> None:
    """Refuse what a converter left that is no GGUF file. Raises `CheckpointError`."""
    found = b""
    if part.is_file():
        with part.open("rb") as file:
            found = file.read(len(MAGIC))
    if found != MAGIC:
        raise CheckpointError("the GGUF converter ended without a GGUF file", where=str(converter))
