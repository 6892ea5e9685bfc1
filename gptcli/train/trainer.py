"""The trainer of causal language models on packed rows: our rows and our loss, in transformers' loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from gptcli.model.kernels import one_stream_rows
from gptcli.train import sharding
from gptcli.train.ahead import AheadTrainer
from gptcli.train.backoff import Replan
from gptcli.train.compiling import Compiler
from gptcli.train.halves import Inputs
from gptcli.train.loss import IGNORED, build_loss
from gptcli.train.measured import Tasks, as_line, as_text
from gptcli.train.meter import Meter
from gptcli.train.recorded import RecordedTrainer
from gptcli.train.rows import Features, RunRows, whole
from gptcli.train.validation import validation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from gptcli.data.media.reader import MediaReader
    from gptcli.data.packed import Rows
    from gptcli.data.shards import Shards
    from gptcli.recipe.schema import Recipe
    from gptcli.reporting import Progress, Reporter
    from gptcli.runs.folder import RunFolder
    from gptcli.train.callbacks import Schedule
    from gptcli.train.plan import Plan
    from gptcli.train.tower import Tower
    from gptcli.train.zero import Zero


class CausalTrainer(RecordedTrainer, AheadTrainer):
    """Train a causal language model.

    Args:
        model: the model, in fp32.
        args: the TrainingArguments that `train.arguments` derives from recipe and plan.
        recipe: the recipe.
        plan: its derived numbers.
        rows: the training data.
        validation: the held-out documents, or None.
        tasks: what else is measured at each evaluation, or None.
        tokenizer: saved with every checkpoint.
        run: the run's folder.
        facts: what a checkpoint's manifest records beside the decided values (fingerprints, recipe).
        replan: the plan with fewer rows at once, given those and the reason; called when memory runs out.
        schedule: the callback that decides when to log, evaluate, save, sample and stop.
        sample: generates and records texts; called between steps.
        reporter: where lines are printed.
        progress: the progress display.
        zero: the optimizer of a model that DeepSpeed divides.
        reader: of the images and sounds of the rows, where they have some.
        features: what is kept of a frozen tower's outputs for these, and that tower.
    """

    # Our loss is divided by the tokens of the whole accumulated batch already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: Recipe,
        plan: Plan,
        rows: Rows,
        validation: Shards | None,
        tasks: Tasks | None,
        tokenizer: PreTrainedTokenizerBase,
        run: RunFolder,
        facts: dict[str, Any],
        replan: Replan,
        schedule: Schedule,
        sample: Callable[[PreTrainedModel, int], None],
        reporter: Reporter,
        progress: Progress,
        zero: Zero | None = None,
        reader: MediaReader | None = None,
        features: tuple[Tower, Features] | None = None,
    ) -> None:
        self._rows, self._validation, self._tasks, self._replan = rows, validation, tasks, replan
        # Two threads cannot take a half each of media: no dimension of theirs is the batch's.
        self._halve_due = plan.halves and reader is None
        self._tower, kept = features or (None, None)
        self._run_rows = RunRows(rows, plan, reader, kept)
        self._reader = reader
        self._record(
            model=model,
            recipe=recipe,
            plan=plan,
            run=run,
            facts=facts,
            schedule=schedule,
            sample=sample,
            reporter=reporter,
            progress=progress,
            meter=Meter(plan, self._run_rows, args.device),
            zero=zero,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=whole,
            train_dataset=self._run_rows,
            processing_class=tokenizer,
            callbacks=[schedule],
        )
        # The number of predicted tokens is counted for every model: the loss is ours, labels are already shifted.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self._loss = build_loss(self.plain_model, plan, recipe.train, reporter)
        self._compiler = Compiler(self.plain_model, self._loss, plan, reporter)
        # torch's fused AdamW leaves weights and state alone where a flag on the device tells it to.
        self._watch(
            masks=args.device.type == "cuda"
            and recipe.train.optimizer == "adamw"
            and not sharding.is_divided(model)
            and zero is None
        )

    # ---- a step ----

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, forward and backward; the time between steps (saving, evaluating) is not counted."""
        self._meter.run()
        if self._halve_due:
            self._halve_due = False
            if (reason := self.halve(model)) is not None:
                self._reporter.say(f"rows: a micro-batch is not halved: {reason}")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's way to `losses`, where it does not take the short one."""
        loss, nats = self.losses(model, inputs, num_items_in_batch)
        self.count(nats)
        return (loss, {}) if return_outputs else loss

    def losses(self, model: Any, inputs: Inputs, num_items_in_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy over the tokens of the global batch, and its sum.

        A mixture of experts that returns its balancing loss (`output_router_logits` in model.config) has it added
        with its own coefficient; the logged loss is the cross entropy alone.
        """
        labels = inputs["labels"]
        given = {name: values for name, values in inputs.items() if name != "labels"}
        if self._cut is not None:
            given, labels = self._cut.inputs(given), self._cut.of_row(labels)
        with self._compiler.used_for(given):
            outputs, nats, objective = self._loss(model, given, labels)
        balance = getattr(outputs, "aux_loss", None)
        if balance is not None:
            weight = self.plain_model.config.get_text_config().router_aux_loss_coef
            objective = objective + weight * balance * labels.ne(IGNORED).sum()
        return objective / num_items_in_batch * self._plan.token_parallel, nats

    def count(self, nats: torch.Tensor) -> None:
        """Add the nats of a micro-batch to those of the next log line."""
        self._meter.count(nats)

    def _describe_rows(self, step: int) -> str:
        first = (step - 1) * self._plan.global_batch_size
        last = min(first + self._plan.global_batch_size, self._plan.total_rows) - 1
        names = ", ".join(self._rows.row_id(k) for k in dict.fromkeys((first, last)))
        return f"The step's rows are {first} to {last} of the run: {names}"

    @contextmanager
    def _training(self) -> Iterator[None]:
        with self.lean(), nullcontext() if self._rows.isolated else one_stream_rows():
            yield

    def _validate(self) -> tuple[dict[str, Any], str] | None:
        """Validation loss and tasks, by the functions that `gptcli eval` uses."""
        if self._validation is None and self._tasks is None:
            return None
        plan, model, result, found = self._plan, self.plain_model, None, None
        if self._validation is not None:
            result = validation_loss(
                model, self._validation, self._recipe, plan.precision, parts=plan.processes, reader=self._reader
            )
        if self._tasks is not None:
            found = self._tasks(model)
        sharding.part_again(model)
        line = as_line(result, found)
        return line, as_text(line)

    def tokens_at(self, step: int) -> int:
        """Input tokens, without padding, of so many steps."""
        return self._run_rows.tokens_at(step)
