"""dpo, kto, orpo and grpo: trl's trainers and losses, in runs that keep the same promises as all others.

Each class joins `RecordedTrainer` (the run's folder, the guard, signals, the exact resume) to a trainer of trl's, whose
loss, reference model and generation it leaves alone. Ours are the rows (encoded as `generate` sees them, see `pairs`),
their order, the optimizer and its schedule. Nothing is sent: trl's report of use to the Hub is left out.

The losses: Rafailov et al. 2023 (arXiv:2305.18290, dpo), Ethayarajh et al. 2024 (arXiv:2402.01306, kto), Hong et al.
2024 (arXiv:2403.07691, orpo), Shao et al. 2024 (arXiv:2402.03300, grpo).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

# Before trl, which imports transformers' Trainer its own way.
from gptcli.train.recorded import RecordedTrainer  # isort: skip
import datasets
from datasets import Dataset
from trl import DPOTrainer, KTOTrainer
from trl.experimental.orpo import ORPOTrainer

from gptcli.model.load import evaluating
from gptcli.train.preference_rows import RowMeter, RunOrder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from gptcli.train.pair_encoder import Encoder
    from gptcli.train.pairs import Side
    from gptcli.train.reward import Reward

# What trl counts that depends on the clock, or that the log lines have already.
_NOT_LOGGED = ("num_tokens", "step_time", "mean_token_accuracy", "logits/chosen", "logits/rejected")
_IGNORED = -100


class PreferenceTrainer(RecordedTrainer):
    """What the four methods share; each stands before a trainer of trl's, whose constructor `others` go to.

    Args:
        model: the model, in fp32.
        args: trl's arguments, see `train.arguments`.
        order: the order of the rows.
        train: the rows that are trained on.
        validation: those held out, or None.
        tokenizer: saved with every checkpoint.
        record: what `RecordedTrainer._record` takes, but for model and meter.
        others: what trl's trainer takes beside that.
    """

    # A micro-batch's loss is multiplied by its part of the step's rows.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        order: RunOrder,
        train: Side,
        validation: Side | None,
        tokenizer: PreTrainedTokenizerBase,
        record: dict[str, Any],
        others: dict[str, Any],
    ) -> None:
        self._order, self._places = order, train.places
        self._rows = train.rows
        self._held_out = None if validation is None else validation.rows
        self._begun, self._tokens_before = -1, 0
        self._evaluated: dict[str, list[float]] = {}
        meter = RowMeter(record["plan"], args.device, lambda: self.tokens_at(0))
        self._record(model=model, meter=meter, **record)
        super().__init__(
            model=model,
            args=args,
            # trl wants a data set of its kind, and reads none of it: the loader has the rows.
            train_dataset=Dataset.from_dict({"row": list(range(len(train.rows)))}),
            processing_class=tokenizer,
            callbacks=[record["schedule"]],
            **others,
        )
        self._watch(masks=False)

    @contextmanager
    def _training(self) -> Iterator[None]:
        with _without_notices():
            yield

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As all trainers evaluate, without the notices of the libraries."""
        with _without_notices():
            return super().evaluate(*args, **kwargs)

    # ---- what trl would do itself ----

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows as they are: they are encoded."""
        del args, kwargs
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    # ---- rows ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The micro-batches of the run, from its first step to its last."""
        rows: Any = self._rows
        return DataLoader(
            rows,
            batch_sampler=self._order,
            collate_fn=self._collated,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            generator=torch.Generator(),  # a loader draws a seed, which is not to be one of the model's
        )

    def _collated(self, rows: list[dict[str, Any]]) -> Any:
        """Rows as the inputs of trl's loss."""
        return self.data_collator(rows)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Nothing: a step has `global_batch_size` rows."""
        del batch_samples, device

    def _describe_rows(self, step: int) -> str:
        rows = self._order.of_step(step - 1)
        names = ", ".join(dict.fromkeys(self._places[row] for row in (rows[0], rows[-1])))
        return f"The first and the last of the step's rows: {names}"

    # ---- a step ----

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch."""
        self._meter.run()
        if self._begun != self.state.global_step:
            self._begun = self.state.global_step
            self._meter.begin_step()
        self.in_pass = True
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.in_pass = False
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """trl's loss of a micro-batch, in training its part of the step's mean over rows."""
        del return_outputs, num_items_in_batch
        found: Any = super().compute_loss(model, inputs)
        loss: torch.Tensor = found
        if not self.model.training:  # type: ignore[union-attr]
            return loss
        rows, tokens = self._size(inputs)
        self.state.num_input_tokens_seen += tokens
        loss = loss * (rows / self._plan.global_batch_size)
        self._meter.count(loss.detach() * self._plan.global_batch_size)
        return loss

    def _size(self, inputs: Any) -> tuple[int, int]:
        """Rows and tokens of a micro-batch."""
        raise NotImplementedError

    # ---- log lines, state ----

    def _figures(self, mode: str) -> dict[str, list[float]]:
        """What trl has counted since the last log line (`train`), or in an evaluation (`eval`)."""
        figures: dict[str, list[float]] = self._metrics[mode]  # type: ignore[attr-defined]
        return figures

    def _averages(self, mode: str) -> dict[str, float]:
        found = {name: float(np.mean(values)) for name, values in self._figures(mode).items() if values}
        self._figures(mode).clear()
        return {name: value for name, value in sorted(found.items()) if name not in _NOT_LOGGED}

    def _more_figures(self) -> dict[str, Any]:
        return self._averages("train")

    def _more_state(self) -> dict[str, Any]:
        return {"figures": {name: list(values) for name, values in self._figures("train").items()}}

    def _start_more(self, manifest: dict[str, Any]) -> None:
        self._tokens_before = int(manifest["tokens"])
        meter = self._meter
        assert isinstance(meter, RowMeter)
        meter.begin_tokens(self._tokens_before)
        self._figures("train").update({name: list(values) for name, values in manifest["figures"].items()})

    def tokens_at(self, step: int) -> int:
        """Tokens that were trained on so far; rows differ in length, so they are counted."""
        del step
        state = getattr(self, "state", None)
        return max(self._tokens_before, 0 if state is None else int(state.num_input_tokens_seen))

    # ---- evaluation ----

    def _validate(self) -> tuple[dict[str, Any], str] | None:
        if self._held_out is None:
            return None
        rows = self._held_out
        model: Any = self.model
        totals: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        with evaluating(model), torch.no_grad():
            for part in parts(rows, self._plan.micro_batch_size):
                batch: Any = self._prepare_inputs(self._collated(part))
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, batch)
                weights = self._weights(batch)
                for name, value in {**self._averages("eval"), "loss": float(loss)}.items():
                    weight = weights.get(name, weights["loss"])
                    totals[name] += weight * value
                    counts[name] += weight
        means = {name: totals[name] / counts[name] for name in totals if counts[name]}
        return self._told(means, len(rows))

    def _weights(self, inputs: Any) -> dict[str, float]:
        """By how many rows each figure of an evaluation's batch is averaged; `loss` is that of the others."""
        return {"loss": float(self._size(inputs)[0])}

    def _told(self, means: dict[str, float], rows: int) -> tuple[dict[str, Any], str]:
        values: dict[str, Any] = {"loss": means["loss"], "bits_per_byte": None}
        said = f"validation loss {means['loss']:.4f}"
        if "rewards/chosen" in means and "rewards/rejected" in means:
            values["margin"] = means["rewards/chosen"] - means["rewards/rejected"]
            said += f"  margin {values['margin']:.4f}"
        if "rewards/accuracies" in means:
            values["accuracy"] = means["rewards/accuracies"]
            said += f"  accuracy {values['accuracy']:.1%}"
        return {**values, "rows": rows}, said


class Dpo(PreferenceTrainer, DPOTrainer):  # type: ignore[misc]
    """Direct preference optimization."""

    def _size(self, inputs: Any) -> tuple[int, int]:
        return len(inputs["input_ids"]) // 2, int(inputs["attention_mask"].sum())


class Kto(PreferenceTrainer, KTOTrainer):  # type: ignore[misc]
    """Kahneman-Tversky optimization: answers that are good or bad, without pairs."""

    def _collated(self, rows: list[dict[str, Any]]) -> Any:
        # The answer of another prompt of the same micro-batch, by which the distance from the reference is estimated.
        others = [rows[-1], *rows[:-1]]
        pairs = zip(rows, others, strict=True)
        return self.data_collator([{**row, "KL_completion_ids": other["completion_ids"]} for row, other in pairs])

    def _size(self, inputs: Any) -> tuple[int, int]:
        return len(inputs["label"]), int(inputs["attention_mask"].sum())

    def _weights(self, inputs: Any) -> dict[str, float]:
        good, rows = float(inputs["label"].sum()), float(len(inputs["label"]))
        return {"loss": rows, "rewards/chosen": good, "rewards/rejected": rows - good}


class Orpo(PreferenceTrainer, ORPOTrainer):  # type: ignore[misc]
    """Odds ratio preference optimization: without a reference model."""

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        """The row as it is: it is encoded."""
        del model
        return feature

    def _collated(self, rows: list[dict[str, Any]]) -> Any:
        batch: dict[str, Any] = {}
        pad = self.padding_value
        for name in ("chosen", "rejected"):
            whole = [[*row["prompt_ids"], *row[f"{name}_ids"]] for row in rows]
            answer = [[*[_IGNORED] * len(row["prompt_ids"]), *row[f"{name}_ids"]] for row in rows]
            batch[f"{name}_input_ids"] = _padded(whole, pad)
            batch[f"{name}_attention_mask"] = _padded([[1] * len(ids) for ids in whole], 0)
            batch[f"{name}_labels"] = _padded(answer, _IGNORED)
        return batch

    def _size(self, inputs: Any) -> tuple[int, int]:
        tokens = inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum()
        return len(inputs["chosen_input_ids"]), int(tokens)

    def _figures(self, mode: str) -> dict[str, list[float]]:
        # trl stores what its loss gives under `train`, in an evaluation too.
        if mode == "eval":
            return self._evaluated
        found: dict[str, list[float]] = self._stored_metrics["train"]
        return found

    def store_metrics(self, metrics: dict[str, float], train_eval: str = "train") -> None:
        """Keep the figures of a micro-batch, those of an evaluation by themselves."""
        del train_eval
        training = self.model.training  # type: ignore[union-attr]
        kept = self._stored_metrics["train"] if training else self._evaluated
        for name, value in metrics.items():
            kept.setdefault(name, []).append(value)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Inside, trl's use of names that transformers is about to drop is not told to the user, who cannot change it.

    Neither is the progress of what the libraries do with the rows.
    """
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def parts(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows, `size` at a time."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def build_preference(
    method: str,
    *,
    encoder: Encoder | None = None,
    reference: PreTrainedModel | None = None,
    reward: Reward | None = None,
    **given: Any,
) -> PreferenceTrainer:
    """The trainer of a method; `given` are `PreferenceTrainer`'s arguments but `others`.

    Args:
        method: dpo, kto, orpo or grpo.
        encoder: grpo's, of prompts.
        reference: the model that dpo and kto compare with.
        reward: grpo's.
        given: see `PreferenceTrainer`.
    """
    with _without_notices():
        return _built(method, encoder, reference, reward, given)


def _built(
    method: str,
    encoder: Encoder | None,
    reference: PreTrainedModel | None,
    reward: Reward | None,
    given: dict[str, Any],
) -> PreferenceTrainer:
    if method == "grpo":
        from gptcli.train.preference_grpo import Grpo

        trainer = Grpo(others={"reward_funcs": reward}, **given)
        assert encoder is not None
        trainer.encoder = encoder
        return trainer
    if method == "orpo":
        return Orpo(others={}, **given)
    kind = Dpo if method == "dpo" else Kto
    return kind(others={"ref_model": reference}, **given)
