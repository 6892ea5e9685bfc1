"""A micro-batch in two halves on a CPU: two threads take half of the rows each through the forward and backward pass.

Threads that share every operation wait for each other hundreds of times a pass; these wait once. Measured on two cores
(benchmarks/halves.py): a tenth to a fifth more tokens a second from ten million parameters on. The gradient is the sum
of the two halves', in whichever order they come: a sum of two numbers has no order, so it is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from gptcli.device import keep_freed_memory

Inputs = dict[str, torch.Tensor]
Found = TypeVar("Found")

PROBE_TOKENS = 8
NO_SUM = "this model's loss is not a sum over rows"


class Halves:
    """Runs a forward and backward pass on both halves of a micro-batch at once.

    Args:
        parameters: those whose gradients the passes add to. One more copy of their gradients is held while several
            micro-batches are accumulated.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._threads = torch.get_num_threads()
        self._each = max(1, self._threads // 2)
        keep_freed_memory(one_heap=True)
        # torch's number of threads belongs to the thread that sets it.
        self._other = ThreadPoolExecutor(1, "half", initializer=torch.set_num_threads, initargs=(self._each,))

    def __call__(self, inputs: Inputs, run: Callable[[Inputs], Found]) -> list[Found]:
        """What `run`, a forward and backward pass, returns for each half; for a single row, for the whole."""
        rows = len(next(iter(inputs.values())))
        if rows < 2:
            return [run(inputs)]
        middle = (rows + 1) // 2
        # Two sums have no order, three have: what was accumulated before is added when both are there.
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        second = self._other.submit(run, {name: values[middle:] for name, values in inputs.items()})
        torch.set_num_threads(self._each)
        try:
            first = run({name: values[:middle] for name, values in inputs.items()})
        finally:
            wait([second])
            torch.set_num_threads(self._threads)
        found = [first, second.result()]
        self._add(before)
        return found

    def _add(self, before: list[torch.Tensor | None]) -> None:
        both = [(p, old) for p, old in zip(self._parameters, before, strict=True) if old is not None]
        for parameter, old in both:
            if parameter.grad is None:
                parameter.grad = old
        added = [(p.grad, old) for p, old in both if p.grad is not None and p.grad is not old]
        if added:
            torch._foreach_add_([new for new, _ in added], [old for _, old in added])

    def close(self) -> None:
        """End the second thread."""
        self._other.shutdown()


def why_whole(
    halves: Halves, parameters: list[torch.nn.Parameter], run: Callable[[Inputs], object], device: torch.device
) -> str | None:
    """Why a model's micro-batches cannot be halved, None if they can: tried on two short rows.

    Two threads would take random numbers (dropout) in an order that differs from run to run, and a loss that is no sum
    over rows (the balance of a mixture of experts) is another one in halves. Gradients and random state are left as
    they were.
    """
    # Two rows that differ: what depends on all rows at once would be the same in each of two equal ones.
    ids = torch.arange(PROBE_TOKENS, device=device).remainder(2) * torch.tensor([[1], [0]], device=device)
    state = torch.get_rng_state()
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        run({"input_ids": ids, "labels": ids})
        if not torch.equal(state, torch.get_rng_state()):
            return "this model draws random numbers in training"
        whole = _signature(parameters)
        halves({"input_ids": ids, "labels": ids}, run)
        same = torch.allclose(whole, _signature(parameters), rtol=1e-2, atol=1e-5)
        return None if same else NO_SUM
    finally:
        torch.set_rng_state(state)
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _signature(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of each gradient; the gradients are dropped, so that two sets of them are never there at once."""
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in parameters]
    norms = torch.stack(torch._foreach_norm(gradients))
    for parameter in parameters:
        parameter.grad = None
    return norms
