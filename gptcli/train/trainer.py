"""The one subclass of transformers' Trainer: our rows, our loss, our log lines, our checkpoints; its loop.

Evaluation, saving and sampling are triggered by `callbacks.Schedule`, so the Trainer's own strategies are off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gptcli.errors import CheckpointError
from gptcli.evaluation.loss import LossResult
from gptcli.model.kernels import one_stream_rows
from gptcli.runs import metrics
from gptcli.train import checkpoint, group, optim, optimizer_state, random_state, sharding, weights
from gptcli.train.adapter_base import base_in
from gptcli.train.ahead import AheadTrainer
from gptcli.train.backoff import Replan
from gptcli.train.base import TRAINER_STATE_NAME, restoring
from gptcli.train.best import Best
from gptcli.train.compiling import Compiler
from gptcli.train.guard import StepGuard
from gptcli.train.halves import Inputs
from gptcli.train.loss import IGNORED, build_loss
from gptcli.train.measured import Tasks, as_line, as_text, value_of
from gptcli.train.meter import Meter
from gptcli.train.rows import RunRows, whole
from gptcli.train.scaling import follow_scaler
from gptcli.train.together import Write, write_together
from gptcli.train.validation import validation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from gptcli.data.packed import Rows
    from gptcli.data.shards import Shards
    from gptcli.recipe.schema import Recipe
    from gptcli.reporting import Progress, Reporter
    from gptcli.runs.folder import RunFolder
    from gptcli.train.callbacks import Schedule
    from gptcli.train.plan import Plan
    from gptcli.train.zero import Zero


class CausalTrainer(AheadTrainer):
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
    ) -> None:
        self._recipe = recipe
        self._plan = plan
        self._rows = rows
        self._validation = validation
        self._tasks = tasks
        self._run = run
        self._facts = facts
        self._replan = replan
        self._schedule = schedule
        self._sample = sample
        self._reporter = reporter
        self._progress = progress
        self._use_cache = getattr(model.config, "use_cache", None)
        self._sampled_at = 0
        self._halve_due = plan.halves
        self.validation_result: LossResult | None = None
        patience = recipe.train.early_stopping_patience
        self.best = None if patience is None else Best(patience, recipe.train.best_metric)
        self._run_rows = RunRows(rows, plan)
        self._meter = Meter(plan, self._run_rows, args.device)
        self._zero = zero
        super().__init__(
            model=model,
            args=args,
            data_collator=whole,
            train_dataset=self._run_rows,
            processing_class=tokenizer,
            callbacks=[schedule],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The number of predicted tokens is counted for every model: the loss is ours, labels are already shifted.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self._loss = build_loss(self.plain_model, plan, recipe.train, reporter)
        self._compiler = Compiler(self.plain_model, self._loss, plan, reporter)
        self._scaled = follow_scaler(self, str(run.path), reporter)
        # torch's fused AdamW leaves weights and state alone where a flag on the device tells it to.
        self._masks = (
            args.device.type == "cuda"
            and recipe.train.optimizer == "adamw"
            and self._scaled is None
            and not sharding.is_divided(model)
            and self._zero is None
        )
        self._guard = StepGuard(
            recipe.train,
            waits=not self._masks or recipe.train.loss_spike == "skip",
            describe=self._describe_rows,
            leave_out=self._meter.leave_out,
            where=str(run.path),
            reporter=reporter,
        )

    # ---- data, optimizer, schedule ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; names other than adamw and muon are built by transformers."""
        if self.optimizer is None:
            built: Any = self._zero or optim.build_optimizer(self.plain_model, self._recipe.train)
            self.optimizer = built
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model itself, without what accelerate, DDP or the compiler wrap around it."""
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return model

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's learning-rate schedule; names other than ours are built by transformers."""
        if self.lr_scheduler is None:
            optimizer = optimizer if self._zero is None else self._zero.inner
            built: Any = optimizer or self.optimizer
            self.lr_scheduler = optim.build_schedule(
                built,
                self._recipe.train,
                steps=self._plan.steps,
                warmup_steps=self._plan.warmup_steps,
                decay_steps=self._plan.decay_steps,
            )
        return super().create_scheduler(num_training_steps, optimizer)

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

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if self._scaled is not None:
            self._scaled.watch(norm)
            return norm
        step = self.state.global_step + 1
        loss = self._meter.step_loss(step, self._summed)
        if self._masks:
            finite = torch.isfinite(torch.as_tensor(norm, device=loss.device))
            optimizer: Any = self.optimizer
            optimizer.optimizer.found_inf = (~finite).float()
            self._meter.take_back(keep=finite)
        if not self._guard.judge(step, loss, norm):
            self._meter.take_back()
            self.drop_gradient(model)
        return norm

    def _summed(self, nats: torch.Tensor) -> torch.Tensor:
        # Where several processes work on the same tokens, all together have counted them several times.
        total: torch.Tensor = self.accelerator.reduce(nats, "sum") / self._plan.tensor_parallel
        return total

    def _describe_rows(self, step: int) -> str:
        first = (step - 1) * self._plan.global_batch_size
        last = min(first + self._plan.global_batch_size, self._plan.total_rows) - 1
        names = ", ".join(self._rows.row_id(k) for k in dict.fromkeys((first, last)))
        return f"The step's rows are {first} to {last} of the run: {names}"

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        checkpoint.check_filled(self.plain_model, load_result, str(self._run.path))

    # ---- log, evaluate, sample, save ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self._meter.pause()
        if self.control.should_log or self.control.should_save:
            self._guard.settle()
            if self._scaled is not None:
                self._scaled.check(self.state.global_step)
        # The Trainer comes here once more at the end of its epoch, for the step that it has reported already.
        if self._sampled_at != self.state.global_step and self._schedule.sample_due(self.state.global_step):
            self._sampled_at = self.state.global_step
            if self.is_world_process_zero() or self._zero is not None or sharding.is_divided(self.plain_model):
                self._sample(self.plain_model, self.state.global_step)
                sharding.part_again(self.plain_model)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics.jsonl and hand it to the trackers; the Trainer's own summary is not written."""
        del start_time
        if "loss" not in logs:
            return
        line = self._meter.line(
            self.state.global_step,
            rate=logs["learning_rate"],
            norm=logs.get("grad_norm"),
            reduce=self._summed,
        )
        line |= self._guard.counts()
        if self.is_world_process_zero():
            metrics.append(self._run.metrics, line)
        self.show_progress()
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(line))

    def show_progress(self) -> None:
        """Update the progress display with what is known."""
        result = self.validation_result
        self._progress.update(self.state.global_step, **self._meter.shown(None if result is None else result.loss))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss and tasks by the functions that `gptcli eval` uses; adds a line to metrics.jsonl."""
        del args, kwargs
        if self._validation is None and self._tasks is None:
            return {}
        plan, model, result, found = self._plan, self.plain_model, None, None
        if self._validation is not None:
            result = validation_loss(model, self._validation, self._recipe, plan.precision, parts=plan.processes)
        if self._tasks is not None:
            found = self._tasks(model)
        sharding.part_again(model)
        self.validation_result = result
        step, line = self.state.global_step, as_line(result, found)
        if self.is_world_process_zero():
            metrics.append(self._run.metrics, {"step": step, "validation": line})
        self._reporter.say(f"step {step:,}  {as_text(line)}")
        self.show_progress()
        flat = {} if result is None else {"eval_loss": result.loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(flat))
        if self.best is not None and step:
            self._follow(self.best, value_of(line, result, self.best.metric))
        return flat

    def _follow(self, best: Best, value: float | None) -> None:
        """Have a checkpoint of the best evaluation, and stop when there was none for too long."""
        if best.observe(self.state.global_step, value):
            self.control.should_save = True
        elif best.over:
            self.control.should_save = self.control.should_training_stop = True
            self._reporter.say(
                f"no better {best.metric} in {best.waited} evaluations: training stops, step {best.step:,} is the best"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        del model, trial
        step = self.state.global_step
        facts = {
            **self._facts,
            "decided": self._plan.decided,
            "tokens": self.tokens_at(step),
            "steps": self._plan.steps,
            "unlogged": self._meter.state(self._summed),
            "guard": self._guard.state(),
            "best": None if self.best is None else self.best.state(),
        }
        random_states = group.gathered(random_state.state())
        digests: dict[str, str] = {}

        def rest(work: Path) -> None:
            self.save_tokenizer(work)
            optimizer_state.save_schedule(work, self.lr_scheduler)
            self._save_scaler(str(work))
            random_state.save(work, random_states)
            self.state.save_to_json(str(work / TRAINER_STATE_NAME))

        try:
            committing = checkpoint.committing(self._run, step, facts, digests)
            write_together(committing, lambda writers: self.collect(writers, self.optimizer), rest, digests)
        except CheckpointError as error:
            # What follows the last save, or one before a stop, would be lost without a word.
            if self._recipe.train.on_save_error == "stop" or self.control.should_training_stop:
                raise
            self._reporter.warn(f"step {step:,}: {error.what}; training goes on (train.on_save_error)")
            return
        self.prune()

    def prune(self) -> None:
        """Remove the checkpoints that are not to be kept; the best one is."""
        if not self.is_world_process_zero():
            return
        spared = {self.best.step} if self.best is not None else set()
        checkpoint.prune(self._run, self._recipe.train.save_total_limit, spared)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            what = "the state of optimizer and schedule"
            with restoring(what, checkpoint), optim.own_settings(self.optimizer, self.lr_scheduler):
                optimizer_state.load(Path(checkpoint), self.plain_model, self.optimizer, self.lr_scheduler)

    def collect(self, writers: Sequence[int], optimizer: Any = None) -> Write | None:
        """`weights.collect` of the model."""
        base = base_in(self._recipe, self._facts["fingerprints"])
        return weights.collect(
            self.plain_model, writers, use_cache=self._use_cache, optimizer=optimizer, zero=self._zero, base=base
        )

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer into a folder."""
        tokenizer: Any = self.processing_class
        tokenizer.save_pretrained(str(folder))

    def run_from(self, start: Path | None) -> None:
        """Train to the end, or until the schedule stops it, from a checkpoint or from the first step."""
        self._meter.begin()
        if start is None and self.args.world_size > 1:
            random_state.separate(self.args.seed, 0, self.random_part)
        with self.lean(), nullcontext() if self._rows.isolated else one_stream_rows():
            self.train(resume_from_checkpoint=None if start is None else str(start))

    def start_at(self, manifest: dict[str, Any]) -> None:
        """Tell the log lines that training goes on from the checkpoint of a manifest."""
        self._meter.start_at(int(manifest["step"]), manifest["unlogged"], first=self.is_world_process_zero())
        self._guard.start_at(manifest["guard"])
        if self.best is not None:
            self.best.start_at(manifest["best"])

    def tokens_at(self, step: int) -> int:
        """Input tokens, without padding, of so many steps."""
        return self._run_rows.tokens_at(step)

    @property
    def meter(self) -> Meter:
        """What the log lines say."""
        return self._meter
