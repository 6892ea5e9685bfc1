"""Plain causal attention without a mask: the same values, no value asked for, one graph; all else keeps its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from gptcli.model.kernels import NAME, attend_without_mask, one_stream_rows, settle_attention, usable_attention

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "mistral": {**SIZES, "num_key_value_heads": 2, "sliding_window": 5},  # shorter than the rows
}
IDS = torch.arange(2 * 16).view(2, 16) % 61


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]), dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device: a tensor's value that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_logits_stay_the_same(kind: str) -> None:
    model = make(kind)
    padding = torch.ones_like(IDS)
    padding[0, :4] = 0
    expected = [model(input_ids=IDS).logits, model(input_ids=IDS, attention_mask=padding).logits]
    assert attend_without_mask(model)
    assert model.config._attn_implementation == NAME
    with one_stream_rows():
        found = [model(input_ids=IDS).logits, model(input_ids=IDS, attention_mask=padding).logits]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0, 4:], plain[0, 4:])
        torch.testing.assert_close(ours[1], plain[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_value_is_asked_for_in_a_forward_and_backward_pass(kind: str) -> None:
    model = make(kind).train()
    assert attend_without_mask(model)
    with one_stream_rows(), Waits() as waits:
        model(input_ids=IDS).logits.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert waits.count == 0


@pytest.mark.parametrize("kind, masks", [("llama", 0), ("gpt2", 0), ("mistral", 2)])
def test_a_compiled_body_is_one_graph_and_has_a_mask_only_where_the_model_needs_one(kind: str, masks: int) -> None:
    model = make(kind)
    attend_without_mask(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.forward, backend=backend, dynamic=False)
    with one_stream_rows():
        compiled(input_ids=IDS)
    assert len(graphs) == 1
    calls = [n for n in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(calls) == 2
    assert sum(call.kwargs.get("attn_mask") is not None for call in calls) == masks


def test_another_attention_stays() -> None:
    model = make("llama")
    model.set_attn_implementation("eager")
    assert not attend_without_mask(model)
    assert model.config._attn_implementation == "eager"
    settle_attention(model, "sdpa")
    assert model.config._attn_implementation == "eager"


def test_documents_in_a_row_are_looked_for_again_afterwards() -> None:
    model = make("llama")
    positions = torch.arange(8).repeat(1, 2)
    apart = model(input_ids=IDS[:1], position_ids=positions).logits
    alone = model(input_ids=IDS[:1, 8:]).logits
    with one_stream_rows():
        model(input_ids=IDS)
    torch.testing.assert_close(model(input_ids=IDS[:1], position_ids=positions).logits, apart)
    torch.testing.assert_close(apart[0, 8:], alone[0])


def test_flash_attention_goes_with_some_sizes_of_heads() -> None:
    def names(**fields: int) -> frozenset[str]:
        return usable_attention(LlamaConfig(**{**KINDS["llama"], **fields}))

    both = {"flash_attention_2", "flash_attention_3"}
    assert names() == {"eager", "sdpa", "flex_attention", *both}
    assert names(head_dim=256) >= both
    assert not names(head_dim=12) & both
    assert not names(head_dim=320) & both
    assert "sdpa" in usable_attention(AutoConfig.for_model("gpt2"))


def test_a_model_that_brings_its_own_code_is_not_judged() -> None:
    from transformers import PreTrainedConfig

    assert usable_attention(PreTrainedConfig()) == frozenset()
