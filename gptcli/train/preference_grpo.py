"""grpo: training on a model's own completions, by what a reward says of them (Shao et al. 2024, arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptcli.train.preference import PreferenceTrainer, parts  # isort: skip
from trl import GRPOTrainer

from gptcli.model.load import evaluating

if TYPE_CHECKING:
    from gptcli.train.pair_encoder import Encoder


class Grpo(PreferenceTrainer, GRPOTrainer):  # type: ignore[misc]
    """Group relative policy optimization: the model writes several completions of a prompt, and a reward tells them.

    A step's prompts are completed at its beginning by the model as it is then, all at once.
    """

    encoder: Encoder

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids of prompts, as `generate` has them."""
        return [self.encoder.prompt_ids(prompt) for prompt in prompts], None, {}

    def _collated(self, rows: list[dict[str, Any]]) -> Any:
        return rows

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """trl's loss, which is a part of the step's mean already."""
        loss: torch.Tensor = GRPOTrainer.compute_loss(self, model, inputs)
        if self.model.training:  # type: ignore[union-attr]
            self._meter.count(loss.detach() * self._plan.global_batch_size)
        return loss

    def _validate(self) -> tuple[dict[str, Any], str] | None:
        """The mean reward of completions of the held-out prompts, drawn from the same random numbers every time."""
        if self._held_out is None:
            return None
        rows = self._held_out
        model: Any = self.model
        rewards: list[float] = []
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(self._recipe.seed)
            for part in parts(rows, self._plan.global_batch_size):
                rewards += self.rewards_of(part)
        mean = float(np.mean(rewards))
        return {"loss": None, "bits_per_byte": None, "reward": mean, "rows": len(rows)}, f"validation reward {mean:.4f}"

    def rewards_of(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """The reward of one completion of each of the rows' prompts."""
        prompts = [row["prompt"] for row in rows]
        _, ids, _, completions, *_ = self._generate(prompts)
        self._figures("eval").clear()
        found: torch.Tensor = self._calculate_rewards(list(rows), prompts, completions, ids)
        return [float(value) for value in found[:, 0]]
