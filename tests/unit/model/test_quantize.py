from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import GptcliError, MissingError, UsageError
from gptcli.model.export import export
from gptcli.model.load import load_model
from gptcli.model.quantize import model_bytes, quantize
from gptcli.reporting import Silent
from tests.tiny import make_model, save_model

IDS = torch.arange(24)[None]
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
}
HERE = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HERE, reason="needs the package torchao: pip install 'gptcli[quantize]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def model(kind: str = "llama", **sizes: Any) -> Any:
    sizes = {"initializer_range": 0.1, **sizes}  # with larger weights every small error becomes a large one
    return make_model(kind, **({"hidden_size": 64, "num_attention_heads": 4} if kind == "gpt2" else SIZES) | sizes)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def rounded(model: Any, kind: str) -> Any:
    """The same model with its matrices rounded by the plain definition, one number at a time."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            if kind == "int8":  # a scale a row
                scale = weight.abs().amax(1, keepdim=True) / 127.5
                module.weight.data = (weight / scale).round().clamp(-128, 127) * scale
            else:  # 16 steps between the least and the most of 32 weights
                groups = weight.reshape(weight.shape[0], -1, 32)
                least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
                step = (most - least) / 15
                module.weight.data = (((groups - least) / step).round() * step + least).reshape(weight.shape)
    return model


@needs_torchao
@pytest.mark.parametrize(("kind", "share"), [("int8", 0.05), ("int4", 0.3)])
def test_the_error_is_that_of_rounding(kind: str, share: float) -> None:
    exact = logits(model())
    plain = (logits(rounded(model(), kind)) - exact).norm()
    quantized = model()
    done = quantize(quantized, kind)
    error = (logits(quantized) - exact).norm()
    assert 0 < error < 1.5 * plain, "as much as rounding by hand brings, with bf16's own in int4"
    assert error / exact.norm() < share
    assert (done.matrices, done.left) == (14, 0)
    assert done.bytes_before == 4 * sum(parameter.numel() for parameter in model().parameters())
    assert done.bytes_after == model_bytes(quantized) < 0.51 * done.bytes_before
    assert f"{kind}: 14 matrices of linear layers; the model from" in str(done)


@needs_torchao
def test_the_output_layer_and_the_embeddings_stay() -> None:
    tied = model(tie_word_embeddings=True)
    before = tied.get_input_embeddings().weight.detach().clone()
    quantize(tied, "int8")
    assert torch.equal(tied.get_input_embeddings().weight, before)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gpt2_s_transposed_layers_are_quantized_in_memory(kind: str) -> None:
    exact, quantized = logits(model("gpt2")), model("gpt2")
    done = quantize(quantized, kind)
    assert done.matrices == 8
    assert (logits(quantized) - exact).norm() / exact.norm() < 0.2


@needs_torchao
def test_matrices_that_int4_cannot_take_stay_and_are_counted() -> None:
    odd = model(intermediate_size=120)  # 120 = 7.5 x 16
    done = quantize(odd, "int4")
    assert (done.matrices, done.left) == (8, 6)
    assert "8 matrices of linear layers, 6 stay as they are" in str(done)


@needs_torchao
def test_what_was_saved_loads_again_as_the_same_numbers(tmp_path: Path) -> None:
    save_model(tmp_path / "plain", **SIZES, initializer_range=0.1)
    export(tmp_path / "plain", tmp_path / "small", quantization="int8", reporter=Silent())
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 0.6 * (
        tmp_path / "plain" / "model.safetensors"
    ).stat().st_size
    quantized = model()
    quantize(quantized, "int8")
    again = load_model(tmp_path / "small", device=torch.device("cpu"))
    assert torch.equal(logits(again), logits(quantized))
    with pytest.raises(UsageError) as caught:
        quantize(again, "int8")
    assert "quantized already (torchao)" in caught.value.what
    with pytest.raises(UsageError) as caught:
        export(tmp_path / "small", tmp_path / "again", reporter=Silent())
    assert "is quantized, and an export begins with whole weights" in caught.value.what


@needs_torchao
@pytest.mark.parametrize(
    ("kind", "to_save", "what", "error", "said"),
    [
        ("int5", False, "llama", UsageError, "--quantize int5 is not one of int8, int4"),
        ("int4", True, "llama", MissingError, "int4 weights cannot be saved on a cpu"),
        ("int8", True, "gpt2", UsageError, "gpt2 has no linear layer that int8 can take"),
    ],
)
def test_what_is_not_possible_is_told(kind: str, to_save: bool, what: str, error: type[GptcliError], said: str) -> None:
    with pytest.raises(error) as caught:
        quantize(model(what), kind, to_save=to_save)
    assert said in caught.value.what


@needs_torchao
def test_a_model_that_is_too_narrow_for_int4_is_told() -> None:
    with pytest.raises(UsageError) as caught:
        quantize(make_model(hidden_size=24, head_dim=12, intermediate_size=40), "int4")
    assert "Take --quantize int8" in str(caught.value.remedy)


@pytest.mark.skipif(HERE, reason="torchao is here")
def test_small_weights_of_a_folder_name_the_package_that_reads_them(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", **SIZES)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": {}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingError) as caught:
        load_model(folder, device=torch.device("cpu"))
    assert str(caught.value.remedy).endswith("pip install 'gptcli[quantize]'")


@pytest.mark.skipif(HERE, reason="torchao is here")
def test_without_torchao_the_package_is_named() -> None:
    with pytest.raises(MissingError) as caught:
        quantize(model(), "int8")
    assert caught.value.lines() == [
        "--quantize int8 needs the package torchao, which is not installed",
        "pip install 'gptcli[quantize]'",
    ]
