"""What every run promises, whatever its loss is: log lines, evaluations, checkpoints, a guard, an exact resume.

A trainer that trains something else than packed rows (`preference`) has the same run folder by this class.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gptcli.errors import CheckpointError
from gptcli.processors import PROCESSOR_FILES
from gptcli.runs import metrics
from gptcli.train import checkpoint, group, optim, optimizer_state, random_state, sharding, weights
from gptcli.train.adapter_base import base_in
from gptcli.train.base import TRAINER_STATE_NAME, Trainer, restoring
from gptcli.train.best import Best, value_of
from gptcli.train.guard import StepGuard
from gptcli.train.meter import Meter
from gptcli.train.scaling import follow_scaler
from gptcli.train.together import Write, write_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.recipe.schema import Recipe
    from gptcli.reporting import Progress, Reporter
    from gptcli.runs.folder import RunFolder
    from gptcli.train.callbacks import Schedule
    from gptcli.train.plan import Plan
    from gptcli.train.zero import Zero


class RecordedTrainer(Trainer):
    """A Trainer that writes a run's folder; `Schedule` triggers evaluating, saving and sampling.

    A subclass calls `_record` before its own base is built, and `_watch` after that.

    Attributes:
        best: the best evaluation, where the recipe has a patience.
        validation_loss: of the last evaluation.
        in_pass: whether a forward or backward pass is running, or was when an error was raised.
    """

    in_pass = False
    _zero: Zero | None = None

    def _record(
        self,
        *,
        model: PreTrainedModel,
        recipe: Recipe,
        plan: Plan,
        run: RunFolder,
        facts: dict[str, Any],
        schedule: Schedule,
        sample: Callable[[PreTrainedModel, int], None],
        reporter: Reporter,
        progress: Progress,
        meter: Meter,
        zero: Zero | None = None,
    ) -> None:
        """Take what a run is recorded with.

        Args:
            model: the model that is trained.
            recipe: the recipe.
            plan: its derived numbers.
            run: the run's folder.
            facts: what a checkpoint's manifest records beside the decided values (fingerprints, recipe).
            schedule: the callback that decides when to log, evaluate, save, sample and stop.
            sample: generates and records texts; called between steps.
            reporter: where lines are printed.
            progress: the progress display.
            meter: what the log lines say.
            zero: the optimizer of a model that DeepSpeed divides.
        """
        self._recipe, self._plan, self._run, self._facts = recipe, plan, run, facts
        self._schedule, self._sample, self._reporter, self._progress = schedule, sample, reporter, progress
        self._meter, self._zero = meter, zero
        self._use_cache = getattr(model.config, "use_cache", None)
        self._sampled_at = 0
        self.validation_loss: float | None = None
        patience = recipe.train.early_stopping_patience
        self.best = None if patience is None else Best(patience, recipe.train.best_metric)

    def _watch(self, *, masks: bool) -> None:
        """Judge every step; `masks`: the update is masked on the device where the gradient is not finite."""
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        where, train = str(self._run.path), self._recipe.train
        self._scaled = follow_scaler(self, where, self._reporter)
        self._masks = masks and self._scaled is None
        self._guard = StepGuard(
            train,
            waits=not self._masks or train.loss_spike == "skip",
            describe=self._describe_rows,
            leave_out=self._meter.leave_out,
            where=where,
            reporter=self._reporter,
        )

    # ---- what a subclass has of its own ----

    def _describe_rows(self, step: int) -> str:
        """The rows of a step, for a message."""
        raise NotImplementedError

    def _validate(self) -> tuple[dict[str, Any], str] | None:
        """The figures of an evaluation, `loss` among them, and the line that is said; None: nothing is held out."""
        raise NotImplementedError

    def _more_figures(self) -> dict[str, Any]:
        """What a log line says beside the meter's figures."""
        return {}

    def _more_state(self) -> dict[str, Any]:
        """What a checkpoint's manifest holds beside the state that all trainers have."""
        return {}

    def _start_more(self, manifest: dict[str, Any]) -> None:
        """Take what `_more_state` gave."""

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training is inside."""
        yield

    def tokens_at(self, step: int) -> int:
        """Tokens that were trained on after `step` steps, the ones that are finished."""
        raise NotImplementedError

    # ---- optimizer, schedule ----

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

    # ---- the end of a step ----

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
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

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        checkpoint.check_filled(self.plain_model, load_result, str(self._run.path))

    # ---- log, evaluate, sample, save ----

    def wait(self) -> None:
        """Let a GPU finish where something other than a step follows, so that a step's time is its own."""
        follows = self.control.should_log or self.control.should_evaluate or self.control.should_save
        if follows and self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)

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
        line |= self._guard.counts() | self._more_figures()
        if self.is_world_process_zero():
            metrics.append(self._run.metrics, line)
        self.show_progress()
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(line))

    def show_progress(self) -> None:
        """Update the progress display with what is known."""
        self._progress.update(self.state.global_step, **self._meter.shown(self.validation_loss))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation of what is held out; adds a line to metrics.jsonl."""
        del args, kwargs
        found = self._validate()
        if found is None:
            return {}
        values, said = found
        self.validation_loss = values.get("loss")
        step = self.state.global_step
        if self.is_world_process_zero():
            metrics.append(self._run.metrics, {"step": step, "validation": values})
        self._reporter.say(f"step {step:,}  {said}")
        self.show_progress()
        flat = {f"eval_{name}": value for name, value in values.items() if isinstance(value, float)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(flat))
        if self.best is not None and step:
            self._follow(self.best, value_of(values, self.best.metric))
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
            **self._more_state(),
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
        """Write the tokenizer into a folder, and the processor of a model that reads images or sounds."""
        tokenizer: Any = self.processing_class
        tokenizer.save_pretrained(str(folder))
        for path in map(Path(tokenizer.name_or_path).joinpath, PROCESSOR_FILES):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)

    def run_from(self, start: Path | None) -> None:
        """Train to the end, or until the schedule stops it, from a checkpoint or from the first step."""
        self._meter.begin()
        if start is None and self.args.world_size > 1:
            random_state.separate(self.args.seed, 0, self.random_part)
        with self._training():
            self.train(resume_from_checkpoint=None if start is None else str(start))

    def start_at(self, manifest: dict[str, Any]) -> None:
        """Tell the log lines that training goes on from the checkpoint of a manifest."""
        self._meter.start_at(int(manifest["step"]), manifest["unlogged"], first=self.is_world_process_zero())
        self._guard.start_at(manifest["guard"])
        if self.best is not None:
            self.best.start_at(manifest["best"])
        self._start_more(manifest)

    @property
    def meter(self) -> Meter:
        """What the log lines say."""
        return self._meter
