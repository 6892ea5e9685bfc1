from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gptcli.errors import CheckpointError, MissingError, OutOfMemoryError
from gptcli.model import load
from gptcli.model.load import (
    choose_dtype,
    context_length,
    evaluating,
    load_model,
    load_tokenizer,
    memory_errors,
)
from gptcli.reporting import quiet
from tests.tiny import make_model, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_saved_model_gives_the_same_logits(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load_model(tmp_path, device=CPU)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training and loaded.dtype == torch.float32
    assert capfd.readouterr() == ("", ""), "quiet"


def test_precision_is_as_asked(folder: Path) -> None:
    assert load_model(folder, dtype="bf16", device=CPU).dtype == torch.bfloat16


def test_auto_precision_is_fp32_on_a_cpu_but_for_weights_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, saved, expected in [
        (False, "bfloat16", torch.float32),
        (True, "float32", torch.float32),
        (True, "bfloat16", torch.bfloat16),
    ]:
        monkeypatch.setattr(load, "has_fast_bf16", lambda _, fast=fast: fast)
        assert choose_dtype("auto", CPU, saved)[0] == expected
    assert choose_dtype("auto", torch.device("cuda"), "float32")[0] == torch.bfloat16


def test_a_folder_with_only_a_pickle_is_refused_and_nothing_in_it_runs(folder: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    (folder / "model.safetensors").unlink()
    torch.save(Hostile(), folder / "pytorch_model.bin")
    with pytest.raises(MissingError, match=r"only pytorch_model\.bin") as caught:
        load_model(folder, device=CPU)
    assert "use_safetensors=False" in (caught.value.remedy or "")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises((MissingError, CheckpointError)):
        load_model(folder, device=CPU)
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingError, match="no weights") as caught:
        load_model(folder, device=CPU)
    assert caught.value.where == str(folder) and "model.safetensors" in (caught.value.remedy or "")
    (folder / "config.json").unlink()
    with pytest.raises(MissingError, match=r"config\.json"):
        load_model(folder, device=CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="no tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_truncated_weights_are_a_checkpoint_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device=CPU)
    assert str(folder) in (caught.value.where or "")


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_a_damaged_config_is_a_checkpoint_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(folder, device=CPU)


def test_weights_that_lack_a_tensor_are_not_filled_in_at_random(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 .*up_proj"):
        load_model(folder, device=CPU)


def test_weights_of_another_size_are_a_checkpoint_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError):
        load_model(folder, device=CPU)


def test_a_hub_id_that_cannot_be_had_is_missing_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (
        lambda: load_model(Path("nobody/nothing"), device=CPU),
        lambda: load_tokenizer(Path("nobody/nothing")),
    ):
        with pytest.raises(MissingError, match=r"nobody/nothing") as caught:
            call()
        assert "local folder" in (caught.value.remedy or "")


def test_the_tokenizer_of_a_folder_encodes_as_the_saved_one(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    assert tokenizer.decode(tokenizer("hello 世界")["input_ids"]) == "hello 世界"


def test_the_context_is_the_configs(saved: Path) -> None:
    assert context_length(load_model(saved, device=CPU)) == 64
    assert context_length(make_model("gpt2", context=32)) == 32


def test_modes_come_back_also_after_an_error() -> None:
    model = make_model().train()
    model.model.embed_tokens.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert model.training and not model.model.embed_tokens.training and model.lm_head.training


def test_transformers_own_verbosity_comes_back() -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        with quiet():
            assert logging.get_verbosity() == 40
        assert logging.get_verbosity() == 20
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_too_little_memory_is_told_from_other_errors() -> None:
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    for error in (MemoryError(), full, OSError(12, "Cannot allocate memory")):
        with pytest.raises(OutOfMemoryError), memory_errors("less"):
            raise error
    with pytest.raises(RuntimeError, match="other"), memory_errors("less"):
        raise RuntimeError("other")
