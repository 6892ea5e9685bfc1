"""fp8 by accelerate and torchao: which layers, and that the optimizer keeps the parameters that it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptcli.errors import RecipeError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.runs.folder import RunFolder
from gptcli.train.arguments import training_arguments
from gptcli.train.assemble import assemble
from gptcli.train.float8 import check_layers, handler, layers
from gptcli.train.plan import Plan
from tests.conftest import make_project


def make(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)


LLAMA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def test_all_linear_layers_but_the_first_and_the_head_take_fp8() -> None:
    found = layers(make("llama", **LLAMA))
    assert len(found) == 2 * 7 - 1
    assert "model.layers.0.self_attn.q_proj" not in found
    assert "lm_head" not in found
    # 40 is no multiple of 16: what reads or makes it stays.
    odd = layers(make("llama", **{**LLAMA, "intermediate_size": 40}))
    assert not [name for name in odd if "mlp" in name]


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    loaded = load_recipe("smoke/tiny", ["train.precision=fp8"])
    gpt2 = make("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with pytest.raises(RecipeError, match="gpt2 has no layer that fp8 can take"):
        check_layers(loaded, gpt2)


def test_transformers_hands_fp8_to_accelerate(tmp_path: Path) -> None:
    loaded = load_recipe(str(make_project(tmp_path) / "tiny.yaml"), ["train.precision=fp32"])
    plan = assemble(loaded, RunFolder(tmp_path / "run"), Silent()).plan
    fp8 = Plan(**{**plan.__dict__, "precision": "fp8"})
    assert training_arguments(loaded, fp8, tmp_path / "run", "cpu").mixed_precision == "fp8"


def test_fp8_trains_the_parameters_that_the_optimizer_has() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from accelerate import Accelerator

    model = make("llama", **LLAMA)
    names, parameters = list(model.state_dict()), {id(parameter) for parameter in model.parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[handler()])
    model, optimizer = accelerator.prepare(model, optimizer)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert list(model.state_dict()) == names
    ids = (torch.arange(2 * 16, device=accelerator.device) % 61).view(2, 16)
    accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
    optimizer.step()
    assert all(not torch.equal(p.detach().cpu(), before[name]) for name, p in model.named_parameters())
