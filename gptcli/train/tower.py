"""A frozen tower that answers with what is kept of its outputs: nothing here knows a family or the form of an output.

Kept are the tensors that a model reads of its tower's output, which gradients tell; what is given back has the form of
the output that was seen, with nothing in all other places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

# Where in a tower's output a tensor is: names of fields and numbers in tuples.
Place = tuple[str | int, ...]


class _Captured(BaseException):  # no Exception: nothing in a model's code may take it for an error
    pass


@dataclass(frozen=True)
class _Made:
    """A tower's output: `build` puts tensors in the places of `kept`, None in all others."""

    build: Any
    tensors: dict[Place, torch.Tensor]


class Tower:
    """A frozen tower whose output is taken from what is held, while something is; else it is the module that it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._forward = module.forward
        self._watch: list[_Made] | None = None
        self._stop = False
        self._build: Any = None
        self._held: dict[Place, torch.Tensor] | None = None
        self.kept: list[Place] = []
        module.forward = torch.compiler.disable(self._answer)  # type: ignore[no-untyped-call]

    def hold(self, parts: Sequence[torch.Tensor] | None) -> None:
        """From now on answer with these, in the order of `kept`; None: with what the module makes."""
        self._held = None if parts is None else dict(zip(self.kept, parts, strict=True))

    def made_by(self, run: Any, *, stop: bool) -> list[_Made]:
        """What the tower makes in each of its calls while `run` runs; `stop`: no further than the first.

        Without it each tensor is one that takes a gradient.
        """
        self._watch, self._stop = [], stop
        try:
            run()
        except _Captured:
            pass
        finally:
            made, self._watch = self._watch, None
        return made

    def keep(self, made: _Made, places: list[Place]) -> None:
        """Take the places of what is kept, and the form of the output around it, from one that was made."""
        self._build, self.kept = made.build, places

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if self._held is not None:
            return self._build(self._held)
        output = self._forward(*args, **kwargs)
        if self._watch is None:
            return output
        tensors: dict[Place, torch.Tensor] = {}
        build = _taken_apart(output, (), tensors)
        if not self._stop:
            tensors = {
                place: value.detach().clone().requires_grad_(value.is_floating_point())
                for place, value in tensors.items()
            }
        self._watch.append(_Made(build, tensors))
        if self._stop:
            raise _Captured
        return build(tensors)


def _taken_apart(value: Any, place: Place, tensors: dict[Place, torch.Tensor]) -> Any:
    """Put the tensors of an output into `tensors`; what makes the same output of them, None where one is not given."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return lambda given: given.get(place)
    if isinstance(value, dict):
        kind = type(value)
        inner = {name: _taken_apart(each, (*place, name), tensors) for name, each in value.items()}
        return lambda given: kind(**{name: build(given) for name, build in inner.items()})
    if isinstance(value, list | tuple):
        several, items = type(value), [_taken_apart(each, (*place, at), tensors) for at, each in enumerate(value)]
        return lambda given: several([build(given) for build in items])
    return lambda given: value
