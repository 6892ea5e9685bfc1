"""What training needs in memory, estimated: arithmetic on a model's parameters, its shape and the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcli.model.build import Counts
    from gptcli.recipe.schema import Train


def memory_estimate(counts: Counts, train: Train, micro_tokens: int, block: int | None = None) -> dict[str, int]:
    """Bytes that training needs on one device, by use, in fp32 master weights.

    Activations: about 34 values of the model's width a layer and token are kept for the backward pass (Korthikanti
    et al. 2022, arXiv:2205.05198, without the attention matrix, which sdpa does not keep), 4 bytes each, or 2 with
    activation checkpointing; the logits, their gradient and the softmax 4 bytes each; of a `block` of positions the
    logits and their gradient.
    """
    kept = 2 if train.activation_checkpointing else 34
    return {
        "weights": 4 * counts.total,
        "gradients": 4 * counts.total,
        "optimizer": _optimizer_bytes(counts, train.optimizer),
        "activations": 4 * kept * counts.layers * counts.width * micro_tokens,
        "logits": 4 * counts.vocabulary * (2 * block if block else 3 * micro_tokens),
    }


def _optimizer_bytes(counts: Counts, optimizer: str) -> int:
    if optimizer == "muon":
        return 4 * counts.hidden_matrices + 8 * (counts.total - counts.hidden_matrices)
    if optimizer == "sgd":  # as transformers builds it, without momentum
        return 0
    if optimizer == "adafactor":  # a row and a column of each matrix
        return 8 * counts.total // max(1, counts.width)
    moments = 1 if "lion" in optimizer else 2
    return moments * (1 if "8bit" in optimizer else 4) * counts.total


def mebibytes(count: int) -> str:
    """Bytes as estimates show them: MiB, or GiB from one on."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
