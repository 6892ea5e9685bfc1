from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptcli.errors import CheckpointError, GptcliError, MissingError, UsageError
from gptcli.model.adapters import CONFIG, WEIGHTS, base_of
from gptcli.model.load import load_config, load_model, load_tokenizer
from tests.adapters import save_adapter
from tests.faults.hostile import model_code
from tests.tiny import save_model

CPU = torch.device("cpu")
IDS = torch.arange(12)[None]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    folder = base.parent / "adapter"
    save_adapter(folder, base)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def change(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"use_rslora": True, "bias": "all"}),
        ("llama", {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_an_adapter_is_the_model_that_peft_makes_of_it(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", kind)
    both = save_adapter(tmp_path / "adapter", base, **settings)
    loaded = load_model(tmp_path / "adapter", device=CPU)
    assert type(loaded).__module__.startswith("transformers"), "a plain model"
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), logits(both), rtol=1e-4, atol=1e-4)
    assert (logits(loaded) - logits(load_model(base, device=CPU))).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["adapted", "saved whole"],
)
def test_an_output_layer_that_shares_its_matrix_does_not_change_the_embeddings(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    both = save_adapter(tmp_path / "adapter", base, **settings)
    loaded = load_model(tmp_path / "adapter", device=CPU)
    torch.testing.assert_close(logits(loaded), logits(both), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(again), logits(loaded))


def test_a_model_that_shares_its_matrix_still_does(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    save_adapter(tmp_path / "adapter", base)
    loaded = load_model(tmp_path / "adapter", device=CPU)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_the_tokenizer_is_the_adapters_own_or_its_bases(base: Path, adapter: Path) -> None:
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    own = load_tokenizer(base)
    own.add_tokens(["<new>"])
    own.save_pretrained(str(adapter))
    assert "<new>" in load_tokenizer(adapter).get_vocab()


def test_a_relative_base_is_found_from_here_and_from_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "beside")
    change(adapter, base_model_name_or_path="../beside")
    assert base_of(adapter)[0].resolve() == tmp_path / "beside"
    monkeypatch.chdir(base.parent)
    change(adapter, base_model_name_or_path="base")
    assert base_of(adapter)[0].resolve() == base


def test_a_hub_id_is_left_to_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change(adapter, base_model_name_or_path="nobody/nothing", revision="v1")
    assert base_of(adapter) == (Path("nobody/nothing"), "v1")


def _other_base(folder: Path) -> None:
    change(folder, base_model_name_or_path=str(save_model(folder.parent / "other", hidden_size=64)))


def _of_other_layers(folder: Path) -> None:
    named = load_file(folder / WEIGHTS)
    save_file({name.replace("q_proj", "r_proj"): tensor for name, tensor in named.items()}, folder / WEIGHTS)


def _less(folder: Path) -> None:
    named = load_file(folder / WEIGHTS)
    named.pop(min(named))
    save_file(named, folder / WEIGHTS)


def _not_a_number(folder: Path) -> None:
    named = load_file(folder / WEIGHTS)
    named[min(named)].fill_(float("nan"))
    save_file(named, folder / WEIGHTS)


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _adapter_of_an_adapter(folder: Path) -> None:
    change(folder, base_model_name_or_path=str(shutil.copytree(folder, folder.parent / "inner")))


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (_other_base, CheckpointError, "the adapter cannot be used with its base"),
        (_of_other_layers, CheckpointError, "tensors of the adapter are missing or belong to another base"),
        (_less, CheckpointError, "tensors of the adapter are missing or belong to another base"),
        (_not_a_number, CheckpointError, "NaNs detected"),
        (_pickle, MissingError, "only adapter_model.bin here"),
        (lambda folder: (folder / WEIGHTS).unlink(), MissingError, "no weights of an adapter"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 40), CheckpointError, "cannot be used"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), CheckpointError, "not the settings of an adapter"),
        (lambda folder: (folder / CONFIG).write_text("{"), CheckpointError, "not the settings of an adapter"),
        (lambda folder: change(folder, peft_type="NEW"), CheckpointError, "NEW"),
        (lambda folder: change(folder, peft_type="PROMPT_TUNING"), GptcliError, ""),
        (lambda folder: change(folder, r=10**12), CheckpointError, "an adapter of rank 1,000,000,000,000"),
        (lambda folder: change(folder, layer_replication=[[0, 10**9]]), UsageError, "layer_replication"),
        (lambda folder: change(folder, megatron_config={"a": 1}, megatron_core="antigravity"), UsageError, "megatron"),
        (lambda folder: change(folder, target_modules=["nothing"]), CheckpointError, "nothing"),
        (lambda folder: change(folder, base_model_name_or_path=None), MissingError, "does not say which model"),
        (lambda folder: change(folder, base_model_name_or_path="/gone/base"), MissingError, "not here: /gone/base"),
        (lambda folder: change(folder, base_model_name_or_path="gone"), MissingError, "not here: gone"),
        (_adapter_of_an_adapter, UsageError, "an adapter itself"),
    ],
)
def test_what_cannot_be_merged_is_told(damage: Any, kind: type[GptcliError], said: str, adapter: Path) -> None:
    damage(adapter)
    with pytest.raises(kind) as caught:
        load_model(adapter, device=CPU)
    assert said in "\n".join(caught.value.lines())


def test_what_is_wrong_with_the_base_is_said_to_be_the_bases(base: Path, adapter: Path) -> None:
    broken = Path(shutil.copytree(base, adapter.parent / "broken"))
    (broken / "model.safetensors").unlink()
    change(adapter, base_model_name_or_path=str(broken))
    with pytest.raises(MissingError) as caught:
        load_model(adapter, device=CPU)
    assert f"the base of the adapter {adapter}: no weights in this folder" in caught.value.lines()[0]


def test_code_of_a_base_is_not_run(adapter: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    model_code(save_model(tmp_path / "strange"), ran)
    change(adapter, base_model_name_or_path=str(tmp_path / "strange"))
    with pytest.raises(MissingError) as caught:
        load_model(adapter, device=CPU)
    assert "its own Python code, which is not run" in caught.value.what and not ran.exists()


def test_training_takes_no_adapter_for_a_model(adapter: Path) -> None:
    with pytest.raises(MissingError) as caught:
        load_config(adapter)
    assert "gptcli export" in str(caught.value.remedy)


def test_file_jobs_and_servers_see_the_base_of_an_adapter(base: Path, adapter: Path) -> None:
    from gptcli.generation.file_job import model_fingerprint
    from gptcli.generation.serve import check_folder

    change(adapter, base_model_name_or_path=str(shutil.copytree(base, adapter.parent / "own")))
    check_folder(adapter, "transformers")
    before = model_fingerprint(adapter)
    config = adapter.parent / "own" / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"max_length": 9,', 1))
    assert model_fingerprint(adapter) != before
    with pytest.raises(UsageError, match="takes no adapter"):
        check_folder(adapter, "vllm")
    (adapter.parent / "own" / "model.safetensors").unlink()
    with pytest.raises(MissingError):
        check_folder(adapter, "transformers")
