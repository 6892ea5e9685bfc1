"""Halves of a micro-batch in two threads: gradients and losses of the whole, the same bits in every run and resume."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptcli.errors import StoppedError
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train import lean
from gptcli.train import plan as plan_module
from gptcli.train.begin import Options
from gptcli.train.halves import NO_SUM, Halves, Inputs, why_whole
from gptcli.train.loss import TrainingLoss
from gptcli.train.plan import HALVES
from gptcli.train.run import train
from tests.conftest import Cli, make_project
from tests.tiny import make_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def model() -> Any:
    # An average weight, as training begins with: rounding in a steep model would hide what is to be seen.
    return make_model(initializer_range=0.05).train()


@pytest.fixture
def halves(model: Any) -> Iterator[Halves]:
    made = Halves(trained(model))
    yield made
    made.close()


def tokens(rows: int, length: int = 12) -> Inputs:
    torch.manual_seed(rows)
    ids = torch.randint(0, 300, (rows, length + 1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def nats(model: Any, inputs: Inputs) -> torch.Tensor:
    """The loss of a plain autograd pass: no code of ours."""
    logits = model(input_ids=inputs["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")


def backward(model: Any, inputs: Inputs) -> float:
    loss = nats(model, inputs)
    loss.backward()
    return float(loss.detach())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        mine = found[name]
        assert (mine is None) == (gradient is None), name
        if mine is not None and gradient is not None:
            assert (mine - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


# ---- a pass ----


@pytest.mark.parametrize("rows", [2, 3, 4, 7])
def test_loss_and_gradients_are_the_wholes(model: Any, halves: Halves, rows: int) -> None:
    inputs = tokens(rows)
    expected = backward(model, inputs), gradients(model)
    seen: list[tuple[int, str, int]] = []

    def run(part: Inputs) -> float:
        seen.append((len(part["labels"]), threading.current_thread().name, torch.get_num_threads()))
        return backward(model, part)

    found = halves(inputs, run)
    assert sum(found) == pytest.approx(expected[0], rel=1e-6)
    assert_close(gradients(model), expected[1])
    assert sorted(size for size, _, _ in seen) == [rows // 2, (rows + 1) // 2]
    assert len({name for _, name, _ in seen}) == 2
    assert [threads for _, _, threads in seen] == [1, 1]
    assert torch.get_num_threads() == 2


def test_a_single_row_is_the_whole(model: Any, halves: Halves) -> None:
    inputs = tokens(1)
    expected = backward(model, inputs), gradients(model)
    found = halves(inputs, lambda part: (backward(model, part), threading.current_thread(), torch.get_num_threads()))
    assert found == [(expected[0], threading.main_thread(), 2)]
    for name, gradient in gradients(model).items():
        assert gradient is not None and torch.equal(gradient, expected[1][name])  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(4, 4), (3, 2, 5), (2, 1, 3)])
def test_micro_batches_accumulate(model: Any, halves: Halves, sizes: tuple[int, ...]) -> None:
    batches = [tokens(rows) for rows in sizes]
    losses = [backward(model, inputs) for inputs in batches]
    expected = gradients(model)
    found = [sum(halves(inputs, lambda part: backward(model, part))) for inputs in batches]
    assert found == pytest.approx(losses, rel=1e-6)
    assert_close(gradients(model), expected)


def test_parameters_without_a_gradient_keep_what_they_have(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    unused = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    unused[1].grad = torch.full((3,), 5.0)
    halves = Halves([*trained(model), *unused])
    expected = backward(model, tokens(4)), gradients(model)
    for _ in range(2):
        found = halves(tokens(4), lambda part: backward(model, part))
        assert sum(found) == pytest.approx(expected[0], rel=1e-6)
        assert_close(gradients(model), expected[1])
        assert unused[0].grad is None
        assert unused[1].grad is not None and unused[1].grad.tolist() == [5.0] * 3
    halves.close()


def test_a_parameter_that_one_half_alone_uses_gets_its_gradient() -> None:
    weight, before = torch.nn.Parameter(torch.ones(2)), torch.full((2,), 10.0)
    halves = Halves([weight])

    def run(part: Inputs) -> None:
        rows = part["x"]
        (rows.sum() * (weight.sum() if rows[0, 0] > 2 else torch.ones((), requires_grad=True))).backward()

    for start, expected in ((None, 3.0), (before.clone(), 13.0)):
        weight.grad = start
        halves({"x": torch.tensor([[1.0], [3.0]])}, run)
        assert weight.grad is not None and weight.grad.tolist() == [expected] * 2
    halves.close()


def test_two_passes_give_the_same_bits(model: Any, halves: Halves) -> None:
    def both() -> tuple[list[float], dict[str, torch.Tensor | None]]:
        found = [loss for rows in (6, 5, 4) for loss in halves(tokens(rows), lambda part: backward(model, part))]
        return found, gradients(model)

    first, slopes = both()
    for _ in range(5):
        losses, again = both()
        assert losses == first
        assert all(torch.equal(again[name], slope) for name, slope in slopes.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("failing", [{"main"}, {"other"}, {"main", "other"}])
def test_an_error_in_either_half_is_raised_when_both_have_ended(model: Any, halves: Halves, failing: set[str]) -> None:
    ended = []
    together = threading.Barrier(2)

    def run(part: Inputs) -> float:
        name = "main" if threading.current_thread() is threading.main_thread() else "other"
        together.wait(timeout=60)
        try:
            if name in failing:
                raise torch.OutOfMemoryError(f"in the {name} half")
            return backward(model, part)
        finally:
            ended.append(name)

    with pytest.raises(torch.OutOfMemoryError, match=f"in the {'main' if 'main' in failing else 'other'} half"):
        halves(tokens(4), run)
    assert sorted(ended) == ["main", "other"]
    assert torch.get_num_threads() == 2
    model.zero_grad(set_to_none=True)
    expected = backward(model, tokens(4)), gradients(model)
    assert sum(halves(tokens(4), lambda part: backward(model, part))) == pytest.approx(expected[0], rel=1e-6)
    assert_close(gradients(model), expected[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2's head is its embedding
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", [5, 16])
def test_the_loss_in_blocks_may_be_in_two_threads_at_once(kind: str, precision: str, block: int) -> None:
    none = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if kind == "gpt2" else {}
    model = make_model(kind, initializer_range=0.05, **none)
    model.train()
    inputs = tokens(5)
    exact = backward(model, inputs), gradients(model)
    loss = TrainingLoss(model, block=block, z_loss=0.0)
    assert loss.in_blocks
    head = model.get_output_embeddings()
    halves, together = Halves(trained(model)), threading.Barrier(2)

    # Neither thread reaches the head before the other is inside too.
    def wait(*_: Any) -> None:
        together.wait(timeout=60)

    waiting = model.base_model.register_forward_hook(wait)

    def run(part: Inputs) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            _, found, objective = loss(model, {"input_ids": part["input_ids"]}, part["labels"])
        objective.backward()  # type: ignore[no-untyped-call]
        return found

    found = float(sum(halves(inputs, run)))
    waiting.remove()
    halves.close()
    slopes = gradients(model)
    if precision == "fp32":
        assert found == pytest.approx(exact[0], rel=1e-6)
        assert_close(slopes, exact[1])
    else:
        assert found == pytest.approx(exact[0], rel=2e-3)
        for name, gradient in exact[1].items():
            mine = slopes[name]
            assert mine is not None and gradient is not None
            assert (mine - gradient).norm() <= 0.05 * gradient.norm(), name
    assert "forward" not in vars(head)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (5, 12, 300)


# ---- which models ----


def test_a_trial_leaves_gradients_and_random_state_alone(model: Any, halves: Halves) -> None:
    backward(model, tokens(3))
    model.lm_head.weight.grad = None
    before = {name: p.grad for name, p in model.named_parameters()}
    values = {name: None if grad is None else grad.clone() for name, grad in before.items()}
    state = torch.get_rng_state()
    assert why_whole(halves, trained(model), lambda part: backward(model, part), CPU) is None

    def fail(part: Inputs) -> None:
        torch.rand(3)
        backward(model, part)
        raise MemoryError

    with pytest.raises(MemoryError):
        why_whole(halves, trained(model), fail, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name], name
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])  # type: ignore[arg-type]


def test_a_loss_of_all_rows_together_is_found(model: Any, halves: Halves) -> None:
    def balanced(part: Inputs) -> None:
        hidden = model.model(input_ids=part["input_ids"]).last_hidden_state
        (nats(model, part) + 10 * hidden.mean((0, 1)).square().sum() * part["labels"].numel()).backward()

    assert why_whole(halves, trained(model), balanced, CPU) == NO_SUM


# ---- the command ----

# At least 3e9 FLOPs a micro-batch, so that the plan chooses halves by itself.
LARGER = (
    "data.sequence_length=128",
    "model.config={num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 2}",
    "train.global_batch_size=66",
    "train.micro_batch_size=33",
    "train.max_steps=4",
    "train.log_every=1",
    "train.save_every=2",
    "train.eval_every=2",
    "train.sample_every=0",
)
HALVED = f"auto: {HALVES} = two threads, half of the rows each"


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(folder: Path, *overrides: str, stop_after: int | None = None) -> tuple[Path, list[str]]:
    loaded = load_recipe(str(folder / "tiny.yaml"), [f"output_dir={folder}/runs", *overrides])
    lines = Lines()
    train(loaded, Options("pretrain", stop_after=stop_after), lines)
    return folder / "runs" / loaded.recipe.name, lines.said


def figures(run_folder: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("validation")) for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    mine, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each micro-batch that is halved."""
    seen: list[int] = []

    class Watched(Halves):
        def __call__(self, inputs: Inputs, run: Any) -> list[Any]:
            seen.append(len(inputs["labels"]))
            return super().__call__(inputs, run)

    monkeypatch.setattr(lean, "Halves", Watched)
    return seen


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory, run_cli: Cli) -> Path:
    folder = make_project(tmp_path_factory.mktemp("halves"))
    done = run_cli("pretrain", "tiny.yaml", *LARGER, cwd=folder, OMP_NUM_THREADS="2")
    assert done.code == 0, done.err
    assert HALVED in done.out
    assert "is not halved" not in done.out
    return folder / "runs" / "tiny"


@pytest.mark.slow_fault
def test_another_process_gives_the_same_bits(by_command: Path, tmp_path: Path, passes: list[int]) -> None:
    again, said = run(make_project(tmp_path), *LARGER)
    assert any(line.startswith(HALVED) for line in said)
    assert passes == [2, *[33] * 8]  # a trial, then 4 steps of 2 micro-batches
    assert_same_run(again, by_command)


def test_a_resume_is_exact_and_takes_halves_again(by_command: Path, tmp_path: Path, passes: list[int]) -> None:
    folder = make_project(tmp_path)
    with pytest.raises(StoppedError):
        run(folder, *LARGER, stop_after=3)
    passes.clear()
    resumed, said = run(folder, *LARGER)
    assert f"auto: {HALVES} = two threads, half of the rows each (as this run began)" in said
    assert passes == [2, 33, 33]
    assert_same_run(resumed, by_command)


def test_halves_train_as_wholes_do(by_command: Path, tmp_path: Path, passes: list[int]) -> None:
    torch.set_num_threads(1)
    whole, said = run(make_project(tmp_path), *LARGER)
    assert not any(line.startswith(f"auto: {HALVES} ") for line in said)
    assert passes == []
    for (step, loss, norm, held_out), other in zip(figures(whole), figures(by_command), strict=True):
        assert other[0] == step
        if held_out is None:
            assert other[1:3] == pytest.approx((loss, norm), rel=1e-4)


GPT2 = "{n_layer: 2, n_embd: 32, n_head: 2, resid_pdrop: 0.1}"
EXPERTS = (
    "{num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, num_experts: 4, num_experts_per_tok: 2, "
    "moe_intermediate_size: 32, output_router_logits: true}"
)


@pytest.mark.parametrize(
    "kind, config, reason",
    [("gpt2", GPT2, "this model draws random numbers in training"), ("qwen3_moe", EXPERTS, NO_SUM)],
)
def test_a_model_that_cannot_be_halved_says_so_and_trains_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int], kind: str, config: str, reason: str
) -> None:
    folder = make_project(tmp_path)
    settings = (f"model.type={kind}", f"model.config={config}", "train.log_every=1", "train.max_steps=3")
    untried, said = run(folder, *settings, "name=untried")
    assert not any("halved" in line for line in said)
    monkeypatch.setattr(plan_module, "HALVES_FLOPS", 0)
    tried, said = run(folder, *settings, "name=tried")
    assert f"rows: a micro-batch is not halved: {reason}" in said
    assert 4 not in passes
    assert_same_run(tried, untried)  # the trial took no random number


def test_experts_without_a_balancing_loss_are_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    monkeypatch.setattr(plan_module, "HALVES_FLOPS", 0)
    config = EXPERTS.replace(": true", ": false")
    _, said = run(make_project(tmp_path), "model.type=qwen3_moe", f"model.config={config}", "train.max_steps=2")
    assert not any("is not halved" in line for line in said)
    assert passes == [2, 4, 4]
