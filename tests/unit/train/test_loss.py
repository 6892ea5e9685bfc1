"""The loss in blocks equals the loss of whole logits, value and gradient, and says where it cannot be had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptcli.train.loss import TrainingLoss, block_slopes, summed_loss, summed_squares
from gptcli.train.plan import LOGIT_BYTES, loss_block

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TYPES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2},
    "tied": {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "phi": {**SIZES, "intermediate_size": 64},  # its head has a bias
}


def make(kind: str, **fields: Any) -> Any:
    name = "llama" if kind == "tied" else kind
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TYPES.get(kind, {}), **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # a bias begins as zeros, which would prove nothing
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 11))
    labels = torch.randint(0, VOCABULARY, (3, 11))
    labels[0, 3:7] = -100
    labels[2] = -100
    return ids, labels


def gradients(model: Any, objective: torch.Tensor) -> dict[str, torch.Tensor]:
    (objective / 7).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[3, 100], ids=["pieces-of-3-rows", "whole-blocks"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic on a block in several pieces, the last of which is smaller, or in one."""
    monkeypatch.setattr("gptcli.train.loss.CACHED", -(-request.param * VOCABULARY // torch.get_num_threads()))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("block", [1, 4, 33, 64])
@pytest.mark.parametrize("kind", list(TYPES))
def test_blocks_give_the_loss_and_the_gradients_of_whole_logits(kind: str, block: int, z_loss: float) -> None:
    model = make(kind)
    ids, labels = rows()
    logits = model(input_ids=ids).logits
    expected = summed_loss(logits, labels)
    objective = expected + z_loss * summed_squares(logits, labels)
    other = copy.deepcopy(model)
    logits = other(input_ids=ids).logits
    wanted = gradients(other, summed_loss(logits, labels) + z_loss * summed_squares(logits, labels))

    loss = TrainingLoss(model, block=block, z_loss=z_loss)
    assert loss.in_blocks
    _, nats, minimised = loss(model, {"input_ids": ids}, labels)
    torch.testing.assert_close(nats, expected.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(minimised.detach(), objective.detach(), rtol=1e-6, atol=1e-5)
    found = gradients(model, minimised)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert model(input_ids=ids).logits.shape == (3, 11, VOCABULARY)  # the head is itself again


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("block", [None, 4, 33])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("kind", list(TYPES))
def test_smoothed_labels_are_those_of_torch_and_the_loss_that_is_told_is_plain(
    kind: str, block: int | None, z_loss: float
) -> None:
    model = make(kind)
    other = copy.deepcopy(model)
    ids, labels = rows()
    logits = other(input_ids=ids).logits
    objective = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1
    )
    plain = summed_loss(logits, labels).detach()
    wanted = gradients(other, objective + z_loss * summed_squares(logits, labels))
    loss = TrainingLoss(model, block=block, z_loss=z_loss, smoothing=0.1)
    assert loss.in_blocks == (block is not None)
    _, nats, minimised = loss(model, {"input_ids": ids}, labels)
    torch.testing.assert_close(nats, plain, rtol=1e-6, atol=1e-5)
    if not z_loss:
        torch.testing.assert_close(minimised.detach(), objective.detach(), rtol=1e-6, atol=1e-5)
    for name, gradient in gradients(model, minimised).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.usefixtures("pieces")
def test_in_bf16_blocks_are_as_close_to_fp32_as_whole_logits_are() -> None:
    ids, labels = rows()
    exact, whole, blocks = make("llama"), make("llama"), make("llama")
    wanted = gradients(exact, summed_loss(exact(input_ids=ids).logits, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = summed_loss(whole(input_ids=ids).logits, labels)
        _, nats, objective = TrainingLoss(blocks, block=4, z_loss=0.0)(blocks, {"input_ids": ids}, labels)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, plain.detach(), rtol=1e-3, atol=0)
    by_whole, by_blocks = gradients(whole, plain), gradients(blocks, objective)
    for name, gradient in wanted.items():
        bound = 2 * (by_whole[name] - gradient).norm() + 1e-4 * gradient.norm()
        assert (by_blocks[name] - gradient).norm() <= bound, name


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("gemma2", {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}),  # caps its logits
        ("granite", {**SIZES, "intermediate_size": 64, "logits_scaling": 8.0}),
        ("cohere", {**SIZES, "intermediate_size": 64, "logit_scale": 0.5, "pad_token_id": 0}),
    ],
)
def test_a_model_that_changes_its_logits_keeps_them_whole(kind: str, fields: dict[str, Any]) -> None:
    model = make(kind, **fields)
    ids, labels = rows()
    loss = TrainingLoss(model, block=4, z_loss=0.0)
    assert not loss.in_blocks
    outputs, nats, _ = loss(model, {"input_ids": ids}, labels)
    assert outputs.logits.shape == (3, 11, VOCABULARY)
    torch.testing.assert_close(nats, summed_loss(model(input_ids=ids).logits, labels).detach())


def test_no_logits_are_whole_when_they_would_be_large() -> None:
    assert loss_block(8 * 1024, 256) is None
    assert loss_block(4096, 16_384) == 512
    assert loss_block(8192, 152_000) == 512  # smaller blocks would be slower than they are worth
    assert loss_block(200, 1_000_000) is None
    for tokens, vocabulary in ((4096, 16_384), (32_768, 12_000), (1 << 20, 2048)):
        block = loss_block(tokens, vocabulary)
        assert block is not None and 4 * block * vocabulary <= LOGIT_BYTES


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_compiled_block_is_the_same_in_one_pass(z_loss: float, smoothing: float, has_bias: bool) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(16, VOCABULARY), rows()[1].flatten()[:16]
    bias = torch.randn(VOCABULARY) if has_bias else None
    compiled = torch.compile(block_slopes, backend="eager", dynamic=False)
    found = compiled(logits.clone(), bias, labels, z_loss, torch.float32, smoothing)
    expected = block_slopes(logits.clone(), bias, labels, z_loss, torch.float32, smoothing)
    for ours, plain in zip(found, expected, strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_ligers_kernel_is_left_where_it_cannot_run() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, on which it can")
    loss = TrainingLoss(make("llama"), block=4, z_loss=0.0, kernel="liger")
    assert loss.in_blocks
    assert loss.kernel == "blocks"


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("kind", list(TYPES))
def test_ligers_kernel_gives_the_loss_and_the_gradients_of_whole_logits(kind: str, z_loss: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels need a GPU")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model = make(kind).cuda()
    ids, labels = (tensor.cuda() for tensor in rows())
    loss = TrainingLoss(model, block=4, z_loss=z_loss, kernel="liger")
    assert loss.kernel == "liger"
    other = copy.deepcopy(model)
    logits = other(input_ids=ids).logits
    wanted = gradients(other, summed_loss(logits, labels) + z_loss * summed_squares(logits, labels))
    _, nats, minimised = loss(model, {"input_ids": ids}, labels)
    torch.testing.assert_close(nats, summed_loss(logits, labels).detach(), rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model, minimised).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
