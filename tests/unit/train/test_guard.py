"""The judgement of steps: what a spike is, what the policies do, and that a resume judges as an undisturbed run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from gptcli.errors import DivergedError
from gptcli.recipe.schema import Train
from gptcli.reporting import Silent
from gptcli.train.guard import DEVIATIONS, LEAST, MOST_IN_A_ROW, StepGuard


class Said(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def make(waits: bool = True, **fields: Any) -> tuple[StepGuard, Said, list[int]]:
    said, left_out = Said(), []
    train = Train.model_validate({"max_steps": 1, "global_batch_size": 1, "learning_rate": 1e-3, **fields})
    guard = StepGuard(
        train,
        waits=waits,
        describe=lambda step: f"rows of {step}",
        leave_out=left_out.append,
        where="runs/x",
        reporter=said,
    )
    return guard, said, left_out


def judge(guard: StepGuard, step: int, loss: float, norm: float = 1.0) -> bool:
    return guard.judge(step, torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))


def settled(guard: StepGuard, steps: int = 60) -> int:
    """Steps whose loss is 2.9 and 3.1 in turns: mean 3, deviation 0.1."""
    for step in range(1, steps + 1):
        assert judge(guard, step, 3.0 + (0.1 if step % 2 else -0.1))
    return steps + 1


@pytest.mark.parametrize(
    "loss, is_spike", [(3.0 + 0.1 * DEVIATIONS + 0.01, True), (3.0 + 0.1 * DEVIATIONS - 0.01, False)]
)
def test_a_spike_is_six_deviations_above_the_mean(loss: float, is_spike: bool) -> None:
    guard, said, _ = make()
    assert judge(guard, settled(guard), loss)  # by default it is only said
    assert bool(said.warned) == is_spike
    assert guard.counts() == ({"spikes": 1} if is_spike else {})
    assert guard.counts() == {}


def test_the_first_steps_and_what_is_little_above_a_flat_loss_are_no_spikes() -> None:
    guard, said, _ = make()
    for step in range(1, LEAST):
        judge(guard, step, 10.0 / step)
    judge(guard, LEAST, 9.0)
    guard, _, _ = make()
    for step in range(1, 100):
        judge(guard, step, 3.0)
    judge(guard, 100, 3.5, norm=2.9)
    assert said.warned == []


def test_a_norm_alone_can_be_a_spike() -> None:
    guard, said, _ = make()
    judge(guard, settled(guard), 3.0, norm=50.0)
    assert said.warned == ["step 61 is a spike: gradient norm 50, 1 ± 0 in the last 60 steps"]


def test_a_skipped_spike_does_not_widen_what_is_usual() -> None:
    guard, said, left_out = make(loss_spike="skip")
    step = settled(guard)
    for _ in range(3):
        assert not judge(guard, step, 9.0)
        step += 1
    assert left_out == [61, 62, 63]
    assert judge(guard, step, 3.0)
    assert len(said.warned) == 3


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (3.0, math.inf), (3.0, math.nan)])
@pytest.mark.parametrize("waits", [True, False])
def test_stop_names_the_step_and_its_rows(waits: bool, loss: float, norm: float) -> None:
    guard, _, _ = make(waits)
    judge(guard, 1, 3.0)
    with pytest.raises(DivergedError, match="step 2 is not finite") as caught:
        judge(guard, 2, loss, norm)
        guard.settle()  # where nothing is waited for, it is found here, before a save
    assert "rows of 2" in str(caught.value.remedy)


def test_what_is_not_waited_for_is_judged_when_the_next_step_is_on_its_way() -> None:
    guard, said, left_out = make(waits=False, non_finite="skip")
    assert judge(guard, 1, math.nan)
    assert not said.warned
    assert judge(guard, 2, 3.0)
    assert left_out == [1]
    assert guard.counts() == {"skipped": 1}


def test_ten_in_a_row_stop_and_nine_do_not() -> None:
    guard, _, _ = make(non_finite="skip")
    for step in range(1, MOST_IN_A_ROW):
        assert not judge(guard, step, math.nan)
    assert judge(guard, MOST_IN_A_ROW, 3.0)
    for step in range(11, 20):
        judge(guard, step, math.nan)
    with pytest.raises(DivergedError, match="10 steps in a row were skipped"):
        judge(guard, 20, math.nan)


def test_a_resume_judges_as_an_undisturbed_run() -> None:
    whole, whole_said, _ = make(non_finite="skip", loss_spike="skip")
    first, _, _ = make(non_finite="skip", loss_spike="skip")
    second, second_said, _ = make(non_finite="skip", loss_spike="skip")
    generator = torch.Generator().manual_seed(0)
    losses = [3 + float(torch.randn((), generator=generator)) / 7 for _ in range(150)]
    losses[40], losses[100], losses[101] = math.nan, 9.0, math.nan
    expected = [judge(whole, step, loss) for step, loss in enumerate(losses, 1)]
    found = [judge(first, step, loss) for step, loss in enumerate(losses[:101], 1)]
    second.start_at(json.loads(json.dumps(first.state())))
    found += [judge(second, step, loss) for step, loss in enumerate(losses[101:], 102)]
    assert found == expected
    assert second_said.warned == whole_said.warned[-len(second_said.warned) :]
    assert json.dumps(second.state()["seen"]) == json.dumps(whole.state()["seen"])


def test_a_fused_adamw_does_nothing_where_it_is_told_that_a_number_is_not_finite() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(4, 4)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    before = weight.detach().clone(), {key: value.clone() for key, value in optimizer.state[weight].items()}
    weight.grad = torch.full((4, 4), math.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[weight].items())
