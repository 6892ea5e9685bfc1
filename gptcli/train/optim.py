"""Optimizers and learning-rate schedules.

`adamw` is torch's fused AdamW with weight decay on matrices only; `muon` is Muon on the hidden matrices and AdamW on
the rest, in one optimizer; every other name goes to transformers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gptcli.device import has_fast_bf16
from gptcli.model.build import hidden_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.schema import Train

# The quintic of Muon's Newton-Schulz iteration, as in torch.optim.Muon (Jordan et al. 2024,
# https://kellerjordan.github.io/posts/muon/).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")
_OWN_SCHEDULES = ("cosine", "linear", "constant", "wsd")


class Muon(torch.optim.Muon):
    """torch.optim.Muon with the Newton-Schulz iteration in the type that the hardware multiplies fast.

    torch's is fixed to bfloat16, which a CPU without AVX512-BF16 emulates a hundred times slower than fp32. Matrices
    of one shape are stacked and orthogonalized together. State and options are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape, parameter.device].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        rows, columns = parameters[0].shape
        # Update sizes as AdamW's, so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
        scale = 0.2 * math.sqrt(max(rows, columns))
        orthogonal = orthogonalize(torch.stack(updates))
        weights: list[torch.Tensor] = list(parameters)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(orthogonal.to(parameters[0].dtype).unbind()), alpha=-group["lr"] * scale)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly (singular values 0.7 to 1.2), by Newton-Schulz iterations.

    Args:
        matrices: [count, rows, columns].
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if has_fast_bf16(matrices.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(Optimizer):
    """Muon on some parameters and AdamW on the others, as one optimizer with one state dict.

    The groups of both are this optimizer's own groups, so a schedule or a checkpoint sees nothing special.
    """

    def __init__(self, adamw: AdamW, muon: Muon) -> None:
        # AdamW first: the rate of the first group is the one that is logged, and it is `train.learning_rate`.
        self._parts = (adamw, muon)
        super().__init__([{**group} for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same kind; see `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._share()


def build_optimizer(model: PreTrainedModel, train: Train) -> Optimizer | None:
    """The optimizer of `adamw` and `muon`; None for a name that transformers builds."""
    if train.optimizer not in {"adamw", "muon"}:
        return None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices: dict[str, torch.nn.Parameter] = {}
    if train.optimizer == "muon":
        matrices = {name: p for name, p in hidden_matrices(model).items() if name in trained and p.ndim == 2}
    others = {name: p for name, p in trained.items() if name not in matrices}
    decayed = {name: p for name, p in others.items() if p.ndim >= 2}
    rest = {name: p for name, p in others.items() if p.ndim < 2}
    rate = train.learning_rate if train.muon_learning_rate is None else train.muon_learning_rate
    if not others:  # an adapter's matrices
        return Muon(list(matrices.items()), lr=rate, weight_decay=train.weight_decay)
    adamw = AdamW(
        [
            *({"params": alike, "weight_decay": train.weight_decay} for alike in _by_mesh(decayed)),
            *({"params": alike, "weight_decay": 0.0} for alike in _by_mesh(rest)),
        ],
        lr=train.learning_rate,
        betas=(train.betas[0], train.betas[1]),
        eps=train.adam_epsilon,
        fused=True,
    )
    if not matrices:
        return adamw
    return MuonAdamW(adamw, Muon(list(matrices.items()), lr=rate, weight_decay=train.weight_decay))


def _by_mesh(parameters: dict[str, torch.nn.Parameter]) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters that one kernel can update together: of a divided model, those divided over the same processes."""
    groups: dict[Any, list[tuple[str, torch.nn.Parameter]]] = defaultdict(list)
    for name, parameter in parameters.items():
        groups[getattr(parameter, "device_mesh", None)].append((name, parameter))
    return list(groups.values())


def build_schedule(
    optimizer: Optimizer, train: Train, *, steps: int, warmup_steps: int, decay_steps: int
) -> LambdaLR | None:
    """The schedule of `cosine`, `linear`, `constant` and `wsd`; None for a name that transformers builds."""
    if train.lr_scheduler not in _OWN_SCHEDULES:
        return None
    kind, minimum = train.lr_scheduler, train.min_lr_ratio

    def factor(step: int) -> float:
        return schedule_factor(
            kind, step, steps=steps, warmup_steps=warmup_steps, decay_steps=decay_steps, minimum=minimum
        )

    return LambdaLR(optimizer, factor)


@contextmanager
def own_settings(optimizer: Any, schedule: Any) -> Iterator[None]:
    """Inside, a checkpoint's state is loaded; after it, settings and rate are those of this optimizer and schedule.

    A state holds the settings it was made with. The recipe's may be others by now: a run that became longer, and what
    `--allow-changes` let through. Where nothing changed this changes nothing, to the last bit.
    """
    own = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def schedule_factor(kind: str, step: int, *, steps: int, warmup_steps: int, decay_steps: int, minimum: float) -> float:
    """The share of the peak learning rate in step `step` (from 0): linear warm-up, then the schedule's shape.

    The last step has exactly the minimum (cosine, linear, wsd). `wsd` is warm-up, stable, linear decay over the last
    `decay_steps` (Hu et al. 2024, arXiv:2404.06395).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    start = max(warmup_steps, steps - decay_steps) if kind == "wsd" else warmup_steps
    if step < start:
        return 1.0
    done = min(1.0, (step - start + (kind == "wsd")) / max(1, steps - start - (kind != "wsd")))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return minimum + (1 - minimum) * shape
