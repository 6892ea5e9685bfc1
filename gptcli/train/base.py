"""transformers' Trainer, imported without `datasets`, and with the state of a checkpoint read as a stranger's.

It only asks `datasets` whether the rows are one of its sets: with pandas and pyarrow that is 45 MiB of memory and 0.3 s
before the first step. State is read with `torch.load(weights_only=True)`, so that nothing in it can run; what that
refuses, and state that does not fit the model, ends in a `CheckpointError`.
"""

from __future__ import annotations

import pickle
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers.utils

from gptcli.device import is_out_of_memory
from gptcli.errors import CheckpointError, GptcliError, first_line
from gptcli.model.adapt import is_adapted, read
from gptcli.model.saved import saved_state
from gptcli.train import random_state, sharding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.train.plan import Plan

utils: Any = transformers.utils
_is_available = utils.is_datasets_available
utils.is_datasets_available = lambda: False
try:
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer import Trainer as _Trainer
    from transformers.trainer_callback import TrainerState
finally:
    utils.is_datasets_available = _is_available

__all__ = ["TRAINER_STATE_NAME", "Trainer", "restoring"]


class Trainer(_Trainer):
    """transformers' Trainer; what a checkpoint cannot give is a `CheckpointError` that names its part."""

    _plan: Plan

    @property
    def random_part(self) -> int:
        """Processes with the same number draw the same: those that divide matrices drop the same of what all have."""
        return int(self.args.process_index) // self._plan.tensor_parallel

    @property
    def plan(self) -> Plan:
        """The run's plan, with the micro-batch that is used now."""
        return self._plan

    def drop_gradient(self, model: Any) -> None:
        """Leave out the update of a step: without gradients an optimizer changes neither weights nor its own state."""
        model.zero_grad(set_to_none=True)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint whose state can be read if one is given."""
        if resume_from_checkpoint is not None:
            with restoring(f"the state of the trainer ({TRAINER_STATE_NAME})", resume_from_checkpoint):
                TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        with restoring("the weights", resume_from_checkpoint):
            mine, folder = cast("PreTrainedModel", self.model), Path(resume_from_checkpoint)
            if is_adapted(mine):
                read(mine, folder)
                return
            if sharding.is_divided(mine):
                result = sharding.load_weights(mine, folder)
            else:
                result = mine.load_state_dict(saved_state(mine, folder), strict=False)
            self._issue_warnings_after_load(result)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with restoring("the state of the loss scaler", checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rank, processes = self.args.process_index, self.args.world_size
        with restoring("the random state", checkpoint):
            if not random_state.load(Path(checkpoint), rank, processes):
                random_state.separate(self.args.seed, self.state.global_step, self.random_part)


@contextmanager
def restoring(what: str, folder: str | None) -> Iterator[None]:
    """Turn what is raised while `what` is restored into a `CheckpointError`, but for memory that ran out."""
    try:
        yield
    except GptcliError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "the file holds other objects than numbers and tensors, of which nothing was run"
        raise CheckpointError(
            f"{what} cannot be restored: {reason}",
            where=folder,
            remedy="Its manifest is right, so the checkpoint was changed on purpose or written by another version.\n"
            f"To go on from the one before it: rm -r {shlex.quote(str(folder))}",
        ) from error
