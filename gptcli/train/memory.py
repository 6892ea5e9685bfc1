"""What training needs in memory, estimated: arithmetic on a model's parameters, what its layers keep, and the step.

The lines are what is there at one moment, the fullest of a step, so that their sum is the peak: most of the activations
are gone when the last gradients come. Measured beside the peak of real runs by benchmarks/memory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcli.model.build import Counts
    from gptcli.recipe.schema import Train

# Anonymous memory of a process on a CPU that is no tensor of training: Python, torch, transformers, and what their
# threads take in the first products; what is left of the peak of a run of one short row (benchmarks/memory.py).
LIBRARIES_BYTES = 300 << 20
# glibc's heap grows to this many times the activations in it, as what is freed between tensors that stay is kept and
# does not always fit the next (benchmarks/memory.py). A GPU's caching allocator has it far less, see HEAD_ROOM.
CPU_HEAP = 1.4
# With checkpointing the heap grows by more than that. glibc before 2.38 gives a hole to no aligned block of the hole's
# own size, only to smaller ones or together with a neighbour (its bug 14581), and torch aligns every tensor: what a
# layer computes on the way lies between the inputs that stay, and the next layer's, of the same sizes, beyond it. The
# tensors themselves are there once; both numbers are measured, on four models of 4 to 20 layers (benchmarks/memory.py).
CPU_HEAP_INPUTS, CPU_HEAP_LAYER = 7, 2
# Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1: a layer keeps 34 bytes for each value of the model's width in
# half precision, without the attention matrix; in fp32 twice that. For models whose layers could not be counted.
HALF_BYTES = 34
# Newton-Schulz (train/optim.py) works on all matrices of a shape at once: their updates, a stack of these and the
# iteration's own, of about half of all matrices in models of usual shape.
MUON_BYTES = 10
# Of a value in 4 bits, with its scales quantized too (Dettmers et al. 2023, arXiv:2305.14314, section 3: 4.127 bits).
QUANTIZED_BYTES = 4.127 / 8


@dataclass(frozen=True)
class Step:
    """What of a plan decides the memory of one process.

    Attributes:
        kind: cpu, cuda or mps.
        tokens: of a micro-batch, on this process.
        length: of a row.
        precision, attention: as in the plan.
        block: positions whose logits are there at once; None: all.
        halves: whether two threads take half of the rows each.
        accumulation: micro-batches of a step.
        sharing: ddp, fsdp, or zero0 to zero3 for DeepSpeed's stages: what the processes hold once for all of them.
        sharers: processes among which that is divided.
        tensor_parallel: processes among which each matrix is divided.
    """

    kind: str
    tokens: int
    length: int
    precision: str = "fp32"
    attention: str = "sdpa"
    block: int | None = None
    halves: bool = False
    accumulation: int = 1
    sharing: str = "ddp"
    sharers: int = 1
    tensor_parallel: int = 1


SHARINGS = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def memory_estimate(counts: Counts, train: Train, step: Step) -> dict[str, int]:
    """Bytes that training needs on one device, by use, at the fullest moment of a step; uses of no bytes are left out.

    Weights, gradients and optimizer: in fp32, divided by the processes that share them. DDP holds its buckets beside
    the gradients, of the same size (torch's DistributedDataParallel, `gradient_as_bucket_view`). FSDP2 has the two
    largest of its units unsharded, one being used and the next being gathered, with their gradients. ZeRO:
    Rajbhandari et al. 2020 (arXiv:1910.02054), section 5: stage 1 divides the optimizer's state, stage 2 the gradients
    too, stage 3 the weights too; in half precision weights and gradients are 2 bytes each, and the optimizer has the
    fp32 weights as well.
    """
    held = _states(counts, train, step)
    gradients = held.pop("gradients")
    activations, layers = _activations(counts, train, step), max(1, counts.layers)
    logits = _logits(counts, step)
    # A block's loss works out the head's gradient in the forward pass, in each thread.
    head = 0 if step.block is None or counts.frozen_head else 4 * counts.head * (2 if step.halves else 1)
    before = gradients if step.accumulation > 1 else 0
    if step.sharing.startswith("zero"):
        before, head = gradients, 0  # in buffers of DeepSpeed's own, always there
    working = MUON_BYTES * (counts.hidden_matrices - counts.frozen_hidden) if train.optimizer == "muon" else 0
    twice = 2 if step.halves and step.accumulation > 1 else 1
    moments = (
        {"gradients": before + head, "activations": activations, "logits": logits},  # the backward pass begins
        {"gradients": twice * gradients, "activations": activations // layers},  # it ends
        {"gradients": gradients, "update": working},
    )
    fullest = max(moments, key=lambda uses: sum(uses.values()))
    libraries = LIBRARIES_BYTES if step.kind == "cpu" else 0
    return {use: size for use, size in {**held, **fullest, "libraries": libraries}.items() if size}


def optimizer_bytes(counts: Counts, optimizer: str) -> int:
    """Bytes of an optimizer's state, whole: of the parameters that are trained."""
    if optimizer == "muon":
        hidden = counts.hidden_matrices - counts.frozen_hidden
        return 4 * hidden + 8 * (counts.trained - hidden)
    if optimizer == "sgd":  # as transformers builds it, without momentum
        return 0
    if optimizer == "adafactor":  # a row and a column of each matrix
        return 8 * counts.trained // max(1, counts.width)
    moments = 1 if "lion" in optimizer else 2
    return moments * (1 if "8bit" in optimizer else 4) * counts.trained


def _states(counts: Counts, train: Train, step: Step) -> dict[str, int]:
    total, trained = counts.total // step.tensor_parallel, counts.trained // step.tensor_parallel
    divided = step.sharers
    optimizer = optimizer_bytes(counts, train.optimizer) // step.tensor_parallel
    if step.sharing == "ddp":
        buckets = 4 * trained if divided > 1 else 0
        weights = 4 * (total - counts.quantized) + int(QUANTIZED_BYTES * counts.quantized)
        return {"weights": weights, "gradients": 4 * trained, "optimizer": optimizer, "buckets": buckets}
    if step.sharing == "fsdp":
        return {
            "weights": 4 * total // divided,
            "gradients": 4 * trained // divided,
            "optimizer": optimizer // divided,
            "unsharded layers": 8 * counts.largest_units // step.tensor_parallel,
        }
    stage, half = int(step.sharing.removeprefix("zero")), step.precision != "fp32"
    size = 2 if half else 4
    return {
        "weights": size * total // (divided if stage >= 3 else 1),
        "gradients": size * trained // (divided if stage >= 2 else 1),
        # The fp32 weights once more, but where they are the divided ones themselves.
        "optimizer": (optimizer + (4 * trained if half or stage < 3 else 0)) // (divided if stage >= 1 else 1),
    }


def _activations(counts: Counts, train: Train, step: Step) -> int:
    """What the layers keep until the backward pass, of all tokens of the micro-batch."""
    half = step.precision != "fp32"
    kept, layers = counts.kept_half if half else counts.kept, max(1, counts.layers)
    width = counts.layers * counts.width
    token = kept.token if kept is not None else (HALF_BYTES if half else 2 * HALF_BYTES) * width
    token += counts.layers * counts.heads * _probabilities(step)
    # A tower is counted by the rule for layers: what runs without values has no picture in it.
    token += (HALF_BYTES if half else 2 * HALF_BYTES) * counts.towers / step.length
    fixed = kept.fixed if kept is not None else (2 * counts.hidden_matrices if half else 0)
    cpu = step.kind == "cpu"
    if train.activation_checkpointing:  # the input of each layer, and one layer as it is computed again
        inputs, layer = (CPU_HEAP_INPUTS, CPU_HEAP_LAYER) if cpu else (1, 1)
        # Never more than where all is kept.
        heaped = min(inputs * 4 * width + layer * token / layers, CPU_HEAP * token if cpu else math.inf)
        return int(heaped * step.tokens) + fixed // layers
    return int((CPU_HEAP if cpu else 1.0) * token * step.tokens) + fixed


def _probabilities(step: Step) -> float:
    """Bytes of attention's probabilities that are kept for a token and head: none with kernels that make them again."""
    if step.attention == "eager":  # the softmax in fp32, and its half for the product
        return step.length * (4 if step.precision == "fp32" else 6)
    if step.attention != "blocks":
        return 0
    from gptcli.model.attention import BLOCK_QUERIES, KEPT_LENGTH

    # A block of queries sees the keys up to its own last one.
    return step.length + min(step.length, BLOCK_QUERIES) if step.length <= KEPT_LENGTH else 0


def _logits(counts: Counts, step: Step) -> int:
    """The logits, their softmax and its gradient in fp32; of a block the logits and their gradient."""
    if step.block is None:
        return 3 * 4 * counts.vocabulary * step.tokens
    threads = 2 if step.halves else 1
    # On a CPU the gradient takes the logits' own place; in half precision the head and its gradient are there in half.
    size = (2 if step.precision != "fp32" else 4) if step.kind == "cpu" else 8
    rounded = 4 * counts.head if step.precision != "fp32" else 0
    return threads * (size * counts.vocabulary * step.block + rounded)
