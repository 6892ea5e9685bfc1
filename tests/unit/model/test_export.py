from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gptcli.errors import CheckpointError, UsageError
from gptcli.generation.media_prompt import model_reader
from gptcli.model import export as module
from gptcli.model.adapt import Base, put_adapter, write
from gptcli.model.export import check_source, check_target, export
from gptcli.model.load import load_model
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from tests.adapters import save_adapter
from tests.media import needs_media, picture, save_media_model, sound
from tests.tiny import make_model, save_model, shared_tokenizer

IDS = torch.arange(12)[None]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: a model, its tokenizer with a chat template, settings of generation, and a trainer's state."""
    folder = save_model(tmp_path_factory.mktemp("export") / "checkpoint-8")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(str(folder))
    GenerationConfig(eos_token_id=[0, 5], pad_token_id=1).save_pretrained(str(folder))
    for name in ("trainer_state.json", "optimizer.safetensors", "MANIFEST.json", "scheduler.pt", "junk.bin"):
        (folder / name).write_text("{}")
    return folder


def test_an_export_is_the_model_and_nothing_else(plain: Path, tmp_path: Path) -> None:
    done = export(plain, tmp_path / "new" / "out", reporter=Silent())
    names = {path.name for path in done.folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    before, after = load_file(plain / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert done.parameters == make_model().num_parameters() and done.dtype == "float32"
    assert done.bytes == 4 * done.parameters
    tokenizer = AutoTokenizer.from_pretrained(str(done.folder))
    assert tokenizer("hello world")["input_ids"] == shared_tokenizer()("hello world")["input_ids"]
    assert tokenizer.chat_template.startswith("{% for message")
    assert json.loads((done.folder / "generation_config.json").read_text())["eos_token_id"] == [0, 5]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"], "no temporary folder is left"


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
)
def test_weights_keep_their_precision_or_get_the_one_asked_for(
    saved: torch.dtype, asked: str, expected: torch.dtype, tmp_path: Path
) -> None:
    save_model(tmp_path / "m")
    make_model().to(saved).save_pretrained(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", precision=asked, reporter=Silent())  # type: ignore[arg-type]
    before, after = load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {expected}
    assert all(torch.equal(before[name].to(expected), after[name]) for name in before)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert said == str(expected).removeprefix("torch.")


def test_a_merged_adapter_is_what_peft_computes(plain: Path, tmp_path: Path) -> None:
    both = save_adapter(tmp_path / "adapter", plain)
    export(tmp_path / "adapter", tmp_path / "out", reporter=Silent())
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, both(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert AutoTokenizer.from_pretrained(str(tmp_path / "out")).chat_template, "the base's tokenizer"
    assert "an adapter merged into its base" in (tmp_path / "out" / "README.md").read_text()


def test_a_models_own_card_is_kept_and_says_of_the_export(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "m"))
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    export(source, tmp_path / "out", precision="bf16", reporter=Silent())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n") and "weights in bfloat16" in card


def test_a_damaged_model_leaves_no_folder(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "m"))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        export(source, tmp_path / "out", reporter=Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_disk_without_room_is_told_before_writing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_BESIDE_WEIGHTS", 1 << 60)
    with pytest.raises(CheckpointError) as caught:
        export(plain, tmp_path / "out", reporter=Silent())
    assert "of disk and" in caught.value.what
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        export(plain, tmp_path / "file" / "out", reporter=Silent())
    assert "the export could not be written" in caught.value.what


def test_only_an_adapter_is_merged_and_an_adapter_only_merged(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no adapter"):
        check_source(plain, merge=True)
    check_source(plain, merge=False)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter"):
        check_source(tmp_path, merge=False)
    check_source(tmp_path, merge=True)


def test_what_is_there_is_replaced_only_when_it_may_be_and_is_a_model(plain: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    check_target(work, plain, overwrite=False)  # empty
    check_target(tmp_path / "new", plain, overwrite=False)
    (work / "thesis.txt").write_text("years of work")
    for overwrite, said in ((False, "exists"), (True, "holds no model, so it is not overwritten")):
        with pytest.raises(UsageError, match=said):
            check_target(work, plain, overwrite=overwrite)
    for target in (plain, plain.parent):
        with pytest.raises(UsageError, match="holds the model that is to be exported"):
            check_target(target, plain, overwrite=True)
    (work / "config.json").write_text("{}")
    check_target(work, plain, overwrite=True)


def test_an_export_replaces_an_older_one_whole(plain: Path, tmp_path: Path) -> None:
    out = save_model(tmp_path / "out", "gpt2")
    (out / "model-00002.safetensors").write_text("")
    export(plain, out, reporter=Silent())
    assert not (out / "model-00002.safetensors").exists()
    assert load_model(out).config.model_type == "llama"


@needs_media
@pytest.mark.parametrize("kind", ["llava", "voxtral"])
def test_the_processor_of_a_model_of_media_goes_with_it(tmp_path: Path, kind: str) -> None:
    folder = save_media_model(tmp_path, kind)
    done = export(folder, tmp_path / "out", reporter=Silent())
    found = model_reader(done.folder)
    assert found is not None
    medium = sound(1) if "audio" in found.tokens else picture(1)
    before = model_reader(folder)
    assert before is not None and found.texts([medium]) == before.texts([medium])

    secret = tmp_path / "secret.json"
    secret.write_text('{"key": 1}')
    (folder / "preprocessor_config.json").symlink_to(secret)
    with pytest.raises(UsageError, match="is a link out of its folder") as caught:
        export(folder, tmp_path / "other", reporter=Silent())
    assert str(secret) in str(caught.value) and not (tmp_path / "other").exists()


@needs_media
def test_an_adapter_of_a_model_of_media_is_merged_with_its_processor(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the package peft: pip install 'gptcli[adapters]'")
    base = save_media_model(tmp_path, "llava")
    (tmp_path / "r.yaml").write_text(f"data: {{train: a.txt}}\nmodel: {{from: {base}}}\nfinetune: {{adapter: lora}}\n")
    model = load_model(base, dtype="fp32", device=torch.device("cpu"))
    put_adapter(model, load_recipe(str(tmp_path / "r.yaml")))
    (tmp_path / "adapter").mkdir()
    write(model, tmp_path / "adapter", Base(str(base), None, "print"))
    module.merge(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    assert model_reader(tmp_path / "adapter") is not None
