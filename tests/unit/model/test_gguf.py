from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from gptcli.data.tokenizer import PATTERNS, division, save_bytes_tokenizer, train_bpe
from gptcli.errors import CheckpointError, GptcliError, MissingError
from gptcli.model.gguf import DIVISIONS, NAMES, VARIABLE, convert, find_converter
from gptcli.reporting import Silent
from tests.tiny import byte_tokenizer, fallback_tokenizer, make_model, save_model, wrapped

# What a converter is for us: a program that gets a folder, --outfile and --outtype. This one says how it was called.
STUB = """
import sys
folder, _, out, _, kind = sys.argv[1:]
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        return "its own"
def main():
    open(out, "wb").write(b"GGUF " + f"{kind} {TextModel().get_vocab_base_pre(None)} {folder}".encode())
if __name__ == "__main__":
    main()
"""
HALFWAY = "import os, sys\nopen(sys.argv[3], 'wb').write(b'GGUF' + bytes(99999))\nprint('tensor 7 of 12', flush=True)\n"


def written(folder: Path, text: str = STUB) -> Path:
    path = folder / NAMES[0]
    path.write_text(text)
    return path


def run(converter: Path, target: Path, name: str | None = None) -> int:
    return convert(converter.parent, target, converter, outtype="f16", division=name, reporter=Silent())


def test_a_converter_is_found_where_it_is_named_and_on_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter = written(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_converter(str(converter)) == find_converter(str(tmp_path)) == converter
    with pytest.raises(MissingError) as caught:
        find_converter(None)
    assert "llama.cpp's convert_hf_to_gguf.py, which is not on the search path" in caught.value.what
    assert "git clone" in str(caught.value.remedy) and VARIABLE in str(caught.value.remedy)
    with pytest.raises(MissingError, match="no GGUF converter here"):
        find_converter(str(tmp_path / "other.py"))
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_converter(None) == converter
    monkeypatch.setenv(VARIABLE, "/nowhere/else/convert.py")
    with pytest.raises(MissingError, match="no such folder"):
        find_converter(None)


def test_the_file_is_what_the_converter_wrote_and_its_folder_is_made(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.gguf"
    size = run(written(tmp_path), target)
    assert target.read_text() == f"GGUF f16 its own {tmp_path}"
    assert size == target.stat().st_size and os.listdir(target.parent) == ["model.gguf"]


@pytest.mark.parametrize("name", DIVISIONS)
def test_the_converter_is_told_how_our_tokenizers_divide(name: str, tmp_path: Path) -> None:
    run(written(tmp_path), tmp_path / "m.gguf", name)
    assert (tmp_path / "m.gguf").read_text().split()[2] == DIVISIONS[name]


@pytest.mark.parametrize(
    ("program", "kind", "said"),
    [
        (
            HALFWAY + "os.kill(os.getpid(), 9)",
            CheckpointError,
            "was ended by SIGKILL; no file was written\ntensor 7 of 12",
        ),
        (HALFWAY + "raise ValueError('no such tensor')", CheckpointError, "failed with 1; no file was written"),
        (HALFWAY + "raise ValueError('no such tensor')", CheckpointError, "ValueError: no such tensor"),
        ("import nothing_of_that_name", MissingError, "No module named 'nothing_of_that_name'"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update')", MissingError, "this tokenizer"),
        ("import sys; sys.exit('Model XForCausalLM is not supported')", MissingError, "this type of model"),
        ("", CheckpointError, "ended without a GGUF file"),
        ("import sys; open(sys.argv[3], 'w').write('GG')", CheckpointError, "ended without a GGUF file"),
        ("import sys; sys.exit('x' * 100_000)", CheckpointError, "failed with 1"),
    ],
)
def test_a_converter_that_fails_leaves_no_file_and_its_last_lines_are_shown(
    program: str, kind: type[GptcliError], said: str, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    with pytest.raises(kind) as caught:
        run(written(tmp_path, program), target)
    text = "\n".join(caught.value.lines())
    assert said in text and len(text) < 3_000
    assert list(target.parent.iterdir()) == []


def test_a_failed_conversion_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("older")
    with pytest.raises(CheckpointError):
        run(written(tmp_path, HALFWAY + "os.abort()"), target)
    assert target.read_text() == "older"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="the GGUF file could not be written"):
        run(written(tmp_path), tmp_path / "file" / "model.gguf")


def test_tokens_that_are_bytes_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="this model's tokens are bytes"):
        run(tmp_path / "not-there.py", tmp_path / "m.gguf", "bytes")


def test_how_a_tokenizer_divides_is_known_of_ours_and_of_no_other(tmp_path: Path) -> None:
    for name in PATTERNS:
        train_bpe(["the cat sat on the mat " * 9], tmp_path / name, vocab_size=270, pattern=name)
        assert division(tmp_path / name) == name and name in DIVISIONS
    (tmp_path / "bytes").mkdir()
    save_bytes_tokenizer(tmp_path / "bytes")
    assert division(tmp_path / "bytes") == "bytes"
    for name, tokenizer in (("plain", byte_tokenizer()), ("pieces", fallback_tokenizer())):
        wrapped(tokenizer).save_pretrained(str(tmp_path / name))
    assert division(tmp_path / "plain") == "gpt2"
    assert division(tmp_path / "pieces") is None
    other = Path(shutil.copytree(tmp_path / "gpt4", tmp_path / "other"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("{1,3}", "{1,2}"))
    assert division(other) is None


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_llama_cpps_own_converter_writes_our_model(pattern: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf, to read the file back")
    try:
        converter = find_converter(None)
    except MissingError:
        pytest.skip(f"needs llama.cpp's {NAMES[0]}: set {VARIABLE}")
    if converter.suffix != ".py":
        pytest.skip(f"needs llama.cpp's {NAMES[0]} itself")
    folder = save_model(tmp_path / "m", tie_word_embeddings=True)
    train_bpe(["the cat sat on the mat " * 9], folder, vocab_size=300, pattern=pattern)
    target = tmp_path / "m.gguf"
    convert(folder, target, converter, outtype="f32", division=division(folder), reporter=Silent())
    reader = gguf.GGUFReader(target)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.block_count"] == 2
    assert fields["tokenizer.ggml.pre"] == DIVISIONS[pattern]
    weights = {tensor.name: tensor.data for tensor in reader.tensors}
    embeddings = make_model(tie_word_embeddings=True).get_input_embeddings().weight.detach().numpy()
    assert (weights["token_embd.weight"] == embeddings).all()


def test_this_python_runs_the_converter(tmp_path: Path) -> None:
    program = "import sys\nopen(sys.argv[3], 'wb').write(b'GGUF' + sys.executable.encode())"
    run(written(tmp_path, program), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes()[4:].decode() == sys.executable
