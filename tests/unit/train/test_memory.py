"""The estimate of memory: what is counted against autograd itself, what is divided against the papers' arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcli.model.build import count_parameters
from gptcli.recipe.schema import Train
from gptcli.train.memory import CPU_HEAP, Step, memory_estimate, optimizer_bytes
from gptcli.train.plan import make_plan
from tests.tiny import make_model
from tests.unit.train.test_plan import COUNTS, CPU, GPU, plan, recipe

MILLIARD = replace(COUNTS, total=1_000_000_000, hidden_matrices=900_000_000, largest_units=50_000_000)


def saved_bytes(model: torch.nn.Module, rows: int, length: int, half: bool) -> int:
    """Bytes that a forward pass of the layers keeps, by autograd's own hooks on real tensors."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_what_the_layers_keep_is_counted_as_autograd_keeps_it(kind: str, half: bool) -> None:
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    model = make_model(kind, **plain).train()
    counts = count_parameters(model.config)
    kept = counts.kept_half if half else counts.kept
    assert kept is not None
    one, two = (saved_bytes(model, rows, 64, half) for rows in (1, 2))
    # Tables of positions are kept once for all rows, which a count of a single row takes for the row's.
    assert 64 * kept.token == pytest.approx(two - one, rel=0.05)
    assert kept.fixed == pytest.approx(2 * one - two, abs=0.05 * one)


def test_a_model_that_needs_values_to_run_is_estimated_by_its_width() -> None:
    step = Step("cuda", tokens=1000, length=1000, precision="bf16")
    memory = memory_estimate(COUNTS, recipe_train(), step)
    weights = 2 * COUNTS.hidden_matrices
    assert memory["activations"] == 34 * COUNTS.layers * COUNTS.width * 1000 + weights


def recipe_train() -> Train:
    return Train.model_validate({"max_steps": 1, "global_batch_size": 1})


def states(sharing: str, precision: str = "bf16", sharers: int = 64) -> int:
    step = Step("cuda", 1, 1, precision, accumulation=2, sharing=sharing, sharers=sharers)
    memory = memory_estimate(MILLIARD, recipe_train(), step)
    return sum(size for use, size in memory.items() if use not in ("activations", "logits"))


def test_zero_divides_as_in_its_paper() -> None:
    # Rajbhandari et al. 2020, figure 1, for 7.5 B parameters on 64 GPUs with K = 12: 120, 31.4, 16.6 and 1.9 GB.
    for sharing, gigabytes in (("zero0", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)):
        assert 7.5 * states(sharing) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_ddp_holds_buckets_of_the_gradients_size_and_fsdp_a_share_of_everything() -> None:
    whole = (4 + 4 + 8) * MILLIARD.total
    assert states("ddp", sharers=1) == whole
    assert states("ddp") == whole + 4 * MILLIARD.total
    assert states("fsdp") == pytest.approx(whole / 64 + 8 * MILLIARD.largest_units, abs=64)


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer() -> None:
    counts = count_parameters(make_model("llama").config)
    step = Step("cuda", tokens=4096, length=256)
    train = recipe_train()
    whole = memory_estimate(counts, train, step)["activations"]
    less = train.model_copy(update={"activation_checkpointing": True})
    kept = memory_estimate(counts, less, step)["activations"]
    assert kept == pytest.approx(4 * counts.layers * counts.width * 4096 + whole / counts.layers, rel=0.01)


def test_checkpointing_on_a_cpu_counts_what_its_heap_keeps_between_the_inputs() -> None:
    """The peak of whole processes, measured (benchmarks/memory.py): MiB at 4,096 tokens in fp32."""
    train = recipe_train().model_copy(update={"activation_checkpointing": True})
    llama = {"vocab_size": 258, "head_dim": 64}
    for layers, width, mlp, measured in ((6, 384, 1024, 967), (20, 256, 704, 1278)):
        sizes = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": width // 64}
        sizes |= {"num_hidden_layers": layers, "num_key_value_heads": width // 64}
        counts = count_parameters(make_model("llama", **{**llama, **sizes}).config)
        step = Step("cpu", tokens=4096, length=256, halves=True)
        assert sum(memory_estimate(counts, train, step).values()) / 2**20 == pytest.approx(measured, rel=0.15)


def test_eager_attention_keeps_its_matrix_and_blocks_keep_short_ones() -> None:
    counts = replace(COUNTS, heads=4)

    def more(attention: str, length: int) -> float:
        step = Step("cpu", tokens=1024, length=length, precision="bf16", attention=attention)
        plain = memory_estimate(counts, recipe_train(), replace(step, attention="sdpa"))
        found = memory_estimate(counts, recipe_train(), step)
        return (found["activations"] - plain["activations"]) / CPU_HEAP

    assert more("eager", 512) == pytest.approx(4 * 4 * 1024 * 512 * 6, rel=0.01)
    # Two bytes for each query and the keys up to the end of its block of 128: 128 for half of them, 256 for the other.
    assert more("blocks", 256) == pytest.approx(4 * 4 * 1024 * 2 * 192, rel=0.01)
    assert more("blocks", 512) == 0


def test_the_lines_are_those_of_one_moment_and_their_sum_is_the_peak(tmp_path: Path) -> None:
    made = plan(recipe(tmp_path), GPU)
    assert made.memory_bytes == sum(made.memory.values())
    large = replace(COUNTS, total=10**9)
    loaded = recipe(tmp_path, "train.micro_batch_size=16")
    last = make_plan(loaded, large, GPU, rows_per_epoch=10).memory
    first = make_plan(loaded, COUNTS, GPU, rows_per_epoch=10).memory
    assert last["gradients"] == 4 * 10**9 and "logits" not in last
    assert "gradients" not in first and first["logits"] > 0


def test_libraries_count_on_a_cpu_alone(tmp_path: Path) -> None:
    assert plan(recipe(tmp_path), CPU).memory["libraries"] > 0
    assert "libraries" not in plan(recipe(tmp_path), GPU).memory


def test_an_optimizers_state_is_counted_by_what_it_keeps() -> None:
    def state(name: str) -> int:
        return optimizer_bytes(COUNTS, name)

    assert state("adamw") == 8 * COUNTS.total
    assert state("muon") == 8 * COUNTS.total - 4 * COUNTS.hidden_matrices
    assert state("lion") == 4 * COUNTS.total
    assert state("adamw_8bit") == 2 * COUNTS.total
    assert state("sgd") == 0
    assert 0 < state("adafactor") < COUNTS.total
