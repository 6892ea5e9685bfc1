from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from gptcli.runs.folder import RunFolder
from tests.adapters import save_adapter
from tests.conftest import Cli
from tests.hub import hub
from tests.runs import Forks
from tests.tiny import save_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GREEDY = ("--prompt", "hello", "--greedy", "--max-new-tokens", "8", "--quiet")
CONVERTER = f"#!{sys.executable}\nimport sys\nopen(sys.argv[3], 'w').write('GGUF ' + ' '.join(sys.argv[4:]))\n"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, whose model is random, and a converter that writes what it was asked for."""
    folder = tmp_path_factory.mktemp("export")
    run = RunFolder(folder / "runs" / "tiny-run")
    run.update(name="tiny-run", status="done", started="2026-01-01T00:00:00+00:00")
    save_model(run.final, hidden_size=64, num_attention_heads=4)
    (folder / "convert-hf-to-gguf").write_text(CONVERTER)
    (folder / "convert-hf-to-gguf").chmod(0o755)
    return folder


def test_a_runs_model_is_exported_and_generates_the_same(here: Path, forks: Forks) -> None:
    done = forks("export", "tiny-run", "--output", "out", "--json", cwd=here)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said == {
        "model": "runs/tiny-run/final",
        "output": "out",
        "parameters": said["parameters"],
        "bytes": 4 * said["parameters"],
        "dtype": "float32",
    }
    texts = [forks("generate", name, *GREEDY, cwd=here) for name in ("tiny-run", "out")]
    assert [text.code for text in texts] == [0, 0] and texts[0].out == texts[1].out != ""
    again = forks("export", "--output", "out", cwd=here)
    assert again.code == 2 and "error: out exists" in again.err and "--overwrite" in again.err
    again = forks("export", "-o", "out", "--overwrite", "--precision", "bf16", cwd=here)
    assert again.code == 0 and "bfloat16" in again.out


def test_an_adapter_generates_merges_and_is_evaluated(here: Path, forks: Forks) -> None:
    save_adapter(here / "adapter", here / "runs" / "tiny-run" / "final")
    refused = forks("export", "adapter", "--output", "merged", cwd=here)
    assert refused.code == 2 and "--merge" in refused.err
    done = forks("export", "adapter", "--merge", "--output", "merged", cwd=here)
    assert done.code == 0 and "merged adapter into" in done.out, done.err
    texts = [forks("generate", name, *GREEDY, cwd=here) for name in ("adapter", "merged", "tiny-run")]
    assert texts[0].code == 0, texts[0].err
    assert texts[0].out == texts[1].out != texts[2].out
    (here / "text.txt").write_text("hello world, the cat sat on the mat. " * 3)
    scored = forks("eval", "adapter", "merged", "--data", "text.txt", "--json", cwd=here)
    assert scored.code == 0, scored.err
    adapter, merged = (result["loss"] for result in json.loads(scored.out))
    assert adapter == pytest.approx(merged, rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: pip install 'gptcli[quantize]'")
def test_small_weights_are_written_and_generate_as_in_memory(here: Path, forks: Forks) -> None:
    done = forks("export", "tiny-run", "--quantize", "int8", "--output", "int8", "--json", cwd=here)
    assert done.code == 0, done.err
    assert json.loads(done.out)["quantized"] == {"kind": "int8", "matrices": 14, "left": 0}
    assert "int8: 14 matrices of linear layers; the model from" in done.err
    texts = [forks("generate", *names, *GREEDY, cwd=here) for names in (["int8"], ["tiny-run", "--quantize", "int8"])]
    assert [text.code for text in texts] == [0, 0] and texts[0].out == texts[1].out
    four = forks("generate", "tiny-run", "--quantize", "int4", *GREEDY[:-1], cwd=here)
    assert four.code == 0 and "int4: 14 matrices" in four.err and "bfloat16" in four.err
    saved = forks("export", "tiny-run", "--quantize", "int4", "--output", "int4", cwd=here)
    assert saved.code == 7 and "int4 weights cannot be saved on a cpu" in saved.err
    assert not (here / "int4").exists()


def test_a_gguf_file_comes_with_and_without_a_folder(here: Path, forks: Forks) -> None:
    path = {"PATH": f"{here}:/usr/bin:/bin"}
    done = forks("export", "tiny-run", "--gguf", "files/m.gguf", "--json", cwd=here, **path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["gguf"] == "files/m.gguf"
    assert (here / "files" / "m.gguf").read_text() == "GGUF --outtype f32"
    assert [name.name for name in (here / "files").iterdir()] == ["m.gguf"]
    both = ("-o", "both", "--gguf", "files/b.gguf", "--precision", "bf16")
    assert forks("export", "tiny-run", *both, cwd=here, **path).code == 0
    assert (here / "files" / "b.gguf").read_text() == "GGUF --outtype bf16" and (here / "both").is_dir()
    small = ("--gguf", "files/b.gguf", "--quantize", "int8", "--overwrite")
    assert forks("export", "tiny-run", *small, cwd=here, **path).code == 0
    assert (here / "files" / "b.gguf").read_text() == "GGUF --outtype q8_0"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tiny-run"], 2, "nothing to write"),
        (["tiny-run", "-o", "x", "--precision", "fp7"], 2, "fp7"),
        (["tiny-run", "-o", "x", "--quantize", "int3"], 2, "int3"),
        (["tiny-run", "-o", "x", "--merge"], 2, "is no adapter"),
        (["tiny-run", "-o", "x", "--public"], 2, "--public without --push"),
        (["tiny-run", "-o", "x", "--gguf-converter", "y"], 2, "--gguf-converter without --gguf"),
        (["tiny-run", "--gguf", "x.gguf", "--quantize", "int4"], 2, "Q4_K_M"),
        (["tiny-run", "--gguf", "runs"], 2, "is a folder"),
        (["tiny-run", "-o", "convert-hf-to-gguf", "--overwrite"], 2, "is a file"),
        (["tiny-run", "--gguf", "x.gguf"], 7, "which is not on the search path"),
        (["tiny-run", "--gguf", "x.gguf", "--gguf-converter", "gone/c.py"], 7, "gone/c.py: no such folder"),
        (["tiny-run", "-o", "runs", "--overwrite"], 2, "holds the model that is to be exported"),
        (["tiny-run", "-o", "convert-hf-to-gguf/x"], 4, "the export could not be written"),
        (["tiny-rum", "-o", "x"], 7, "tiny-run"),
        (["tiny-run", "--push", "no-owner"], 2, "is not OWNER/NAME"),
        (["tiny-run", "--push", "me/m"], 7, "HF_HUB_OFFLINE is set"),
    ],
)
def test_errors_are_told_before_any_work(here: Path, forks: Forks, arguments: list[str], code: int, said: str) -> None:
    before = sorted(here.iterdir())
    done = forks("export", *arguments, cwd=here, PATH="/usr/bin:/bin")
    assert done.code == code, done.err
    assert said in done.err and "Traceback" not in done.err and done.out == ""
    assert len(done.err.splitlines()) <= 8
    assert sorted(here.iterdir()) == before


def test_a_folder_is_pushed_to_the_hub_private_by_default(here: Path, run_cli: Cli) -> None:
    with hub() as server:
        done = run_cli("export", "tiny-run", "-o", "pushed", "--push", "me/m", cwd=here, **server.environment())
        assert done.code == 0, done.err
        assert "pushed to" in done.out and "private where it is new" in done.out
        assert set(server.files) == {path.name for path in (here / "pushed").iterdir()}
        assert all((here / "pushed" / name).read_bytes() == content for name, content in server.files.items())
        assert server.created[0]["name"] == "m" and server.created[0]["visibility"] == "private"
        assert server.messages == ["Exported by gptcli from tiny-run"]


@pytest.mark.slow_fault
def test_a_push_that_fails_is_told_and_keeps_the_folder(here: Path, run_cli: Cli) -> None:
    push = ("export", "tiny-run", "-o", "kept", "--push", "me/m", "--public")
    with hub() as server:
        server.refuses = {"/commit/": 403}
        done = run_cli(*push, cwd=here, **server.environment())
        assert done.code == 7 and "does not let this login write to me/m" in done.err, done.err
        assert "The folder is whole: kept" in done.err and (here / "kept" / "model.safetensors").is_file()
        assert server.created[0]["visibility"] == "public"
        shutil.rmtree(here / "kept")
        server.refuses = {"whoami": 500}
        done = run_cli(*push, cwd=here, **server.environment())
        assert done.code == 7 and "the Hub answered 500 for me/m" in done.err, done.err
        gone = server.environment()
    done = run_cli(*push, cwd=here, **gone)
    assert done.code == 7 and "the Hub is not reached" in done.err, done.err
    logged_out = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_HOME": str(here / "home")}
    done = run_cli(*push, cwd=here, **logged_out)
    assert done.code == 7 and "hf auth login" in done.err, done.err
    assert not (here / "kept").exists(), "nothing was written before the Hub was asked"
