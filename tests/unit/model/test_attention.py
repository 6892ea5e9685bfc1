"""Attention in blocks: the values and gradients of plain causal attention; all else is sdpa's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gptcli.model import attention
from gptcli.model.attention import attend_in_blocks, causal_attention


@pytest.mark.parametrize("length", [2, 7, 128, 129, 300])
@pytest.mark.parametrize("bytes_of_block", [1, 1 << 22])
def test_equal_to_plain_attention(monkeypatch: pytest.MonkeyPatch, length: int, bytes_of_block: int) -> None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", bytes_of_block)
    torch.manual_seed(0)
    inputs = [torch.randn(5, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slope = torch.randn(5, length, 8, dtype=torch.float64)
    expected = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3)
    found = causal_attention(*inputs, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, plain in zip(
        torch.autograd.grad(found, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def models() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    gpt2 = GPT2Config(vocab_size=64, n_positions=160, n_embd=32, n_layer=2, n_head=4, **none)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
    )
    return [GPT2LMHeadModel(gpt2).train(), LlamaForCausalLM(llama).train()]


def gradients(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(2 * 150).view(2, 150) % 61
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.parametrize("index", [0, 1])
def test_a_model_trains_the_same(monkeypatch: pytest.MonkeyPatch, index: int, tmp_path: Path) -> None:
    model = models()[index]
    exact = models()[index]
    ids = torch.arange(2 * 150).view(2, 150) % 61
    exact(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    truth = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    plain = gradients(model)
    assert attend_in_blocks(model)
    used = []
    blocks = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *inputs: used.append(1) or blocks(*inputs))
    ours = gradients(model)
    assert len(used) == 2  # layers
    # No further from fp32 than sdpa in bf16, but for the rounding's luck.
    assert (ours - truth).norm() <= 1.5 * (plain - truth).norm()
    assert (ours - truth).norm() < 0.05 * truth.norm()

    # A padding mask, no gradient and fp32 are sdpa's.
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[0, :20] = 0
    gradients(model, attention_mask=mask)
    with torch.no_grad():
        model(input_ids=ids)
    model(input_ids=ids)
    assert len(used) == 2
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


def test_another_attention_stays() -> None:
    model = models()[0]
    model.set_attn_implementation("eager")
    assert not attend_in_blocks(model)
    assert model.config._attn_implementation == "eager"
