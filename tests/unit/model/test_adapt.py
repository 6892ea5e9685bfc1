from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptcli.errors import CheckpointError, MissingError, RecipeError
from gptcli.model.adapt import Base, check_adapter_from, freeze, is_adapted, linear_names, put_adapter, read, write
from gptcli.model.build import counts_of, hidden_matrices, uses_a_matrix_twice
from gptcli.model.export import merge
from gptcli.model.load import load_model
from gptcli.model.resize import resize
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.train.loss import TrainingLoss
from gptcli.train.optim import build_optimizer
from tests.tiny import make_model, save_model, shared_tokenizer

pytest.importorskip("peft", reason="needs the package peft: pip install 'gptcli[adapters]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
CPU = torch.device("cpu")
PROMPTS = torch.arange(20 * 6).remainder(300).view(20, 6)
KINDS = {"llama": ("llama", {}), "tied": ("llama", {"tie_word_embeddings": True}), "gpt2": ("gpt2", {})}


def recipe(folder: Path, *overrides: str) -> LoadedRecipe:
    path = folder / "recipe.yaml"
    path.write_text(
        "data: {train: text.txt}\nmodel: {from: base}\n"
        "finetune: {adapter: lora, lora: {r: 4, alpha: 16}}\ntrain: {max_steps: 2, learning_rate: 0.03}\n"
    )
    return load_recipe(str(path), overrides)


def train(model: Any, loaded: LoadedRecipe, ids: torch.Tensor = PROMPTS) -> None:
    """A few steps of the recipe's optimizer on one batch."""
    model.train()
    optimizer = build_optimizer(model, loaded.recipe.train)
    assert optimizer is not None
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def tuned(folder: Path, kind: str, *overrides: str, new: int = 0) -> tuple[Any, Path]:
    """A model with a trained adapter, and the folder of the latter."""
    model_type, config = KINDS[kind]
    base = save_model(folder / "base", model_type, **config)
    loaded = recipe(folder, *overrides)
    model = load_model(base, dtype="fp32", device=CPU)
    tokens = range(300, 300 + new)
    resize(model, 300 + new)
    put_adapter(model, loaded, tokens)
    train(model, loaded, PROMPTS if not new else PROMPTS.remainder(4) + 298)  # two old tokens and two new ones
    (folder / "adapter").mkdir()
    write(model, folder / "adapter", Base(str(base), None, "print"))
    shared_tokenizer().save_pretrained(str(folder / "adapter"))
    return model, folder / "adapter"


def logits(model: Any, ids: torch.Tensor = PROMPTS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def texts(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), do_sample=False, max_length=26
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_merged_adapter_gives_the_logits_and_the_texts_of_the_one_that_was_trained(
    adapter: str, kind: str, tmp_path: Path
) -> None:
    model, folder = tuned(tmp_path, kind, f"finetune.adapter={adapter}")
    assert (logits(model) - logits(load_model(tmp_path / "base", device=CPU))).abs().max() > 0.05
    merge(folder)
    merged: Any = load_model(folder, device=CPU)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(texts(merged), texts(model)), "20 prompts"
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is (kind != "llama")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_trained_and_all_others_stay(kind: str, tmp_path: Path) -> None:
    model, folder = tuned(tmp_path, kind, new=2)
    base = load_model(tmp_path / "base", device=CPU).get_input_embeddings().weight
    loaded: Any = load_model(folder, device=CPU)
    ids = PROMPTS.remainder(4) + 298
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    embeddings, output = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert torch.equal(embeddings[:300], base) and len(embeddings) == len(output) == 302
    for row in (300, 301):
        assert (embeddings[row] - base.mean(0)).abs().max() > 0.01
        assert torch.equal(embeddings[row], output[row]) is (kind != "llama")


def test_an_adapter_goes_on_with_the_tokens_that_it_has(tmp_path: Path) -> None:
    _, folder = tuned(tmp_path, "llama", new=2)
    loaded = recipe(tmp_path, f"finetune.adapter_from={folder}", "finetune.lora=null")
    model = load_model(tmp_path / "base", dtype="fp32", device=CPU)
    for size, tokens in ((300, []), (303, [300, 301, 302])):
        resize(model, size)
        with pytest.raises(RecipeError, match="the tokens that are new to the model are others"):
            put_adapter(model, loaded, tokens)
    put_adapter(model, loaded, [300, 301])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_training_an_adapter_leaves_its_base_as_it_was_to_the_last_bit(
    adapter: str, optimizer: str, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in make_model().state_dict().items()}
    model, loaded = make_model(), recipe(tmp_path, f"finetune.adapter={adapter}", f"train.optimizer={optimizer}")
    put_adapter(model, loaded)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, loaded)
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(torch.equal(dict(model.named_parameters())[name], value) for name, value in start.items())


def test_all_linear_layers_but_the_output_head_have_an_adapter(tmp_path: Path) -> None:
    for model in (make_model(), make_model("gpt2")):
        names = linear_names(model)
        layers = sum(1 for name, _ in model.named_modules() if name.rpartition(".")[2] in names)
        put_adapter(model, recipe(tmp_path))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trained) == 2 * layers and all(".lora_" in name for name in trained)
        assert type(model).__module__.startswith("transformers.models")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("adapter", "wanted"), [("lora", "[all-linear, embeddings]"), ("dora", "embeddings")])
def test_an_adapter_of_embeddings_changes_what_goes_in_alone_also_where_it_is_the_output_layer(
    adapter: str, wanted: str, kind: str, tmp_path: Path
) -> None:
    lora = f"finetune.lora={{r: 4, alpha: 16, target_modules: {wanted}}}"
    model, folder = tuned(tmp_path, kind, f"finetune.adapter={adapter}", lora)
    adapted = {name.rpartition(".lora_")[0] for name in dict(model.named_parameters()) if ".lora_" in name}
    table = "transformer.wte" if kind == "gpt2" else "model.embed_tokens"
    base = load_model(tmp_path / "base", device=CPU)
    linear = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in linear_names(base)}
    assert adapted == ({table} if wanted == "embeddings" else {table, *linear})
    assert (logits(model) - logits(base)).abs().max() > 0.05
    merge(folder)
    merged: Any = load_model(folder, device=CPU)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(texts(merged), texts(model)), "20 prompts"


def test_new_tokens_and_an_adapter_of_the_embeddings_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the 2 tokens that are new") as caught:
        tuned(tmp_path, "llama", "finetune.lora={r: 4, target_modules: [q_proj, embeddings]}", new=2)
    assert "Leave embeddings out" in str(caught.value.remedy)


def test_counts_are_those_of_what_is_trained(tmp_path: Path) -> None:
    model = make_model()
    whole = counts_of(model)
    put_adapter(model, recipe(tmp_path))
    counts = counts_of(model)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.trained == adapter == counts.total - whole.total == counts.hidden_matrices - counts.frozen_hidden
    assert counts.frozen_matrix == whole.matrix and counts.frozen_head and counts.head == whole.head
    assert not uses_a_matrix_twice(model)
    resize(model := make_model(), 302)
    put_adapter(model, recipe(tmp_path), [300, 301])
    assert not any("token" in name for name in hidden_matrices(model)), "embeddings are AdamW's"
    assert counts_of(model).vocabulary == 302


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_in_blocks_is_that_of_whole_logits(kind: str, new: int, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    ids = PROMPTS.remainder(300) + new
    found = []
    for block in (None, 16):
        model = make_model(name, **config)
        resize(model, 300 + new)
        put_adapter(model, recipe(tmp_path, "finetune.adapter=dora"), range(300, 300 + new))
        loss = TrainingLoss(model, block=block, z_loss=0.0)
        assert loss.in_blocks is (block is not None)
        objective = loss(model, {"input_ids": ids}, ids)[2]
        objective.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        found.append((objective.detach(), grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_an_adapter_is_written_and_read_again_to_the_last_bit(tmp_path: Path) -> None:
    model, folder = tuned(tmp_path, "gpt2", "finetune.lora.rank_stabilized=true", "finetune.lora.dropout=0.1")
    other = load_model(tmp_path / "base", dtype="fp32", device=CPU)
    put_adapter(other, recipe(tmp_path, f"finetune.adapter_from={tmp_path / 'adapter'}", "finetune.lora=null"))
    assert is_adapted(other) and torch.equal(logits(other.eval()), logits(model))
    (tmp_path / "again").mkdir()
    write(other, tmp_path / "again", Base(str(tmp_path / "base"), None, "print"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_adapter_of_other_layers_is_not_read(tmp_path: Path) -> None:
    _, folder = tuned(tmp_path, "llama")
    for config in ({"num_hidden_layers": 1}, {"intermediate_size": 128}):
        model = make_model(**config)
        put_adapter(model, recipe(tmp_path))
        with pytest.raises(CheckpointError, match=r"another base|does not fit"):
            read(model, folder)


def test_an_adapter_goes_on_on_its_own_base_alone(tmp_path: Path) -> None:
    tuned(tmp_path, "llama")
    loaded = recipe(tmp_path, f"finetune.adapter_from={tmp_path / 'adapter'}", "finetune.lora=null")
    check_adapter_from(loaded, Base("elsewhere", None, "print"))
    with pytest.raises(RecipeError, match=r"was trained on .*, and model.from is"):
        check_adapter_from(loaded, Base(str(tmp_path / "base"), None, "another print"))


def test_the_kind_of_an_adapter_that_goes_on_has_to_be_said(tmp_path: Path) -> None:
    tuned(tmp_path, "llama", "finetune.adapter=dora")
    loaded = recipe(tmp_path, f"finetune.adapter_from={tmp_path / 'adapter'}", "finetune.lora=null")
    with pytest.raises(RecipeError, match=r"finetune\.adapter: lora is not the kind"):
        put_adapter(make_model(), loaded)
    nothing = recipe(tmp_path, f"finetune.adapter_from={tmp_path / 'base'}", "finetune.lora=null")
    with pytest.raises(MissingError, match="no adapter"):
        put_adapter(make_model(), nothing)


def test_target_modules_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    for override, said in (("[q_proj, qproj]", "no module qproj"), (r"nothing\..*", "cannot put")):
        with pytest.raises(RecipeError, match=said) as caught:
            put_adapter(make_model(), recipe(tmp_path, f"finetune.lora.target_modules={override}"))
        assert "down_proj" in str(caught.value.remedy)


def test_frozen_modules_are_not_trained(tmp_path: Path) -> None:
    model = make_model()
    freeze(model, recipe(tmp_path, "finetune={adapter: none, freeze: [layers.0, model.norm]}"))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith(("model.layers.0.", "model.norm"))
    }
    with pytest.raises(RecipeError, match="nothing is left"):
        freeze(model, recipe(tmp_path, "finetune={adapter: none, freeze: [model, lm_head]}"))


def test_frozen_modules_get_no_adapter(tmp_path: Path) -> None:
    model = make_model()
    put_adapter(model, recipe(tmp_path, "finetune.freeze=[layers.0, layers.1.mlp]"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("model.layers.1.self_attn.") for name in trained)


def test_a_prefix_of_no_module_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no module vision_tower"):
        freeze(make_model(), recipe(tmp_path, "finetune={adapter: none, freeze: [vision_tower]}"))
    with pytest.raises(RecipeError) as caught:
        freeze(make_model(), recipe(tmp_path, "finetune={adapter: none, freeze: [layer.1]}"))
    assert "layers.1" in str(caught.value.remedy)


def test_a_file_holds_the_adapter_alone(tmp_path: Path) -> None:
    model, folder = tuned(tmp_path, "tied", new=2)
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_the_matrices_of_a_base_in_four_bits_are_as_they_were_after_training(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes: pip install 'gptcli[gpu]'")
    base = save_model(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=32)
    model: Any = load_model(base, dtype="fp32", device=CPU, four_bits=True)
    packed = model.model.layers[0].mlp.up_proj.weight
    before, start = packed.data.clone(), logits(model)
    loaded = recipe(tmp_path, "finetune.adapter=qlora")
    put_adapter(model, loaded)
    train(model, loaded)
    assert torch.equal(packed.data, before) and packed.dtype == torch.uint8
    assert (logits(model) - start).abs().max() > 0.05
