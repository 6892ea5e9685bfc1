"""From a recipe to `final/`: prepare the data, plan, assemble the trainer, train, and record what happened."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.media.reader import find_reader, open_reader
from gptcli.device import keep_freed_memory
from gptcli.endings import told_as_loss
from gptcli.errors import AbortedError, GptcliError, OutOfMemoryError, StoppedError
from gptcli.files import write_atomic
from gptcli.launch import is_main_process
from gptcli.recipe.load import LoadedRecipe, dump_yaml, resolved
from gptcli.reporting import Reporter
from gptcli.runs import metrics
from gptcli.runs.folder import RunFolder
from gptcli.train import group
from gptcli.train.assemble import Assembly, decided_recipe, set_trained
from gptcli.train.begin import Options, begin, write_start
from gptcli.train.finish import result_of, write_final, write_run_report
from gptcli.train.modes import BLOCKS
from gptcli.train.pairs import PreparedPairs, is_preference
from gptcli.train.plan import MICRO_BATCH, Plan, with_micro_batch
from gptcli.train.reading import watched
from gptcli.train.record import now, record_end
from gptcli.train.resume import Start, ended_early
from gptcli.train.shortage import explained, out_of_memory
from gptcli.train.strategy import by_zero, is_divided
from gptcli.train.zero_settings import zero_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.train.recorded import RecordedTrainer


def train(loaded: LoadedRecipe, options: Options, reporter: Reporter) -> dict[str, Any]:
    """Run a recipe to its end and return the result that `--json` prints (rank 0 has it).

    Raises:
        GptcliError: with the exit code of what happened; see `gptcli.errors`.
    """
    run = RunFolder(Path(loaded.recipe.output_dir) / loaded.recipe.name)
    existed = run.path.exists()
    keep_freed_memory()
    group.join()
    try:
        # Around all of it: the end of a reading process is told at any place, while a run is taken down too.
        with ExitStack() as held, told_as_loss(), watched():
            begun = begin(loaded, options, run, reporter, held)
            result = begun if isinstance(begun, dict) else _train(*begun, options, reporter)
            group.leave()
            return result
    finally:
        # A run that ended before it began (bad data, a wrong field) leaves no folder behind.
        if is_main_process() and not existed and not run.exists():
            shutil.rmtree(run.path, ignore_errors=True)


def _train(assembly: Assembly, start: Start, options: Options, reporter: Reporter) -> dict[str, Any]:
    ended = partial(record_end, assembly.run, reporter)
    try:
        with told_as_loss():
            return _run_compiled_or_not(assembly, options, start, reporter)
    except GptcliError as error:
        ended("stopped" if isinstance(error, StoppedError) else "failed", error.what)
        raise
    except KeyboardInterrupt:
        ended("stopped", "interrupted before the first step")
        raise AbortedError("before the first step; nothing was lost") from None
    except BaseException as error:
        ended("failed", f"{type(error).__name__}: {error}"[:300])
        raise


def _run_compiled_or_not(assembly: Assembly, options: Options, start: Start, reporter: Reporter) -> dict[str, Any]:
    """The run as it is planned; where the compiler fails, which is before the first step, as planned without it."""
    if assembly.uncompiled is None:
        return _run_trainer(assembly, options, start, reporter)
    from gptcli.device import free_memory
    from gptcli.train.compiling import CompilingFailed

    try:
        return _run_trainer(assembly, options, start, reporter)
    except CompilingFailed as error:
        reason = str(error)
        free_memory(error)
    plan = assembly.uncompiled
    reporter.say(f"compile: {reason}; training goes on uncompiled")
    for decision in plan.decisions:
        if decision not in assembly.plan.decisions:
            reporter.say(f"auto: {decision.key} = {decision.value} ({decision.reason})")
    plain = replace(assembly, plan=plan, uncompiled=None)
    write_start(plain, options)
    return _run_trainer(plain, options, start, reporter)


def _run_trainer(assembly: Assembly, options: Options, start: Start, reporter: Reporter) -> dict[str, Any]:
    from gptcli.train.callbacks import StopRequest

    train_section = assembly.loaded.recipe.train
    stop = StopRequest(max_seconds=train_section.max_time, after_step=options.stop_after)
    began = time.monotonic()
    with stop.on_signals(), reporter.progress("train", assembly.plan.steps, "steps") as progress:
        with explained(lambda: _out_of_memory(assembly, assembly.plan, "out of memory while the model was built")):
            model = _build_model(assembly, reporter)
            if assembly.plan.dry_step:
                assembly = _fitted(assembly, model, reporter)
            trainer = _build_trainer(assembly, model, stop, reporter, progress)
        if is_main_process():
            kept = -1 if start.checkpoint is None else start.step  # a line of eval_at_start is of step 0
            metrics.truncate(assembly.run.metrics, kept)
            metrics.truncate(assembly.run.samples, kept)
        progress.update(start.step)
        if start.checkpoint is not None:
            trainer.start_at(start.manifest)
        with explained(lambda: _out_of_memory(assembly, trainer.plan, _what_ran_out(trainer))):
            if train_section.eval_at_start and start.checkpoint is None:
                trainer.evaluate()
            if not ended_early(start, train_section):
                trainer.run_from(start.checkpoint)
        step = max(start.step, int(trainer.state.global_step))
        result = group.from_first(lambda: result_of(assembly, trainer, step, time.monotonic() - began))
        if step < assembly.plan.steps and not (trainer.best and trainer.best.over):
            result["status"] = "stopped"
            if is_main_process():
                assembly.run.update(result=result)
            raise StoppedError(
                f"{stop.reason}; step {step:,} of {assembly.plan.steps:,} is saved",
                remedy="The same command goes on from there.",
                result=result,
            )
        trainer.prune()  # a kill may have come between the last save and this
        write_final(assembly, trainer, result)
    if is_main_process():
        assembly.run.update(status="done", reason=None, ended=now(), result=result)
        write_run_report(assembly.run, reporter)
    reporter.say(f"done: {assembly.run.final}")
    return result


def _build_model(assembly: Assembly, reporter: Reporter) -> PreTrainedModel:
    import torch

    from gptcli.model.activation import keep_derivatives
    from gptcli.model.attention import attend_in_blocks
    from gptcli.model.build import build_model
    from gptcli.model.kernels import GPU_ONLY, attend_without_mask
    from gptcli.model.load import load_model
    from gptcli.model.resize import resize
    from gptcli.train import float8, sharding

    loaded, plan = assembly.loaded, assembly.plan
    recipe = loaded.recipe
    assert recipe.model is not None
    attention = "auto" if recipe.train.attention in GPU_ONLY else recipe.train.attention
    model: PreTrainedModel
    if recipe.model.from_ is not None:
        model = load_model(
            Path(recipe.model.from_),
            dtype="fp32",
            device=assembly.device,
            attention=attention,
            trust_remote_code=recipe.model.trust_remote_code,
            revision=recipe.model.revision,
            four_bits=recipe.finetune.adapter == "qlora",
        )
        resize(model, assembly.config.get_text_config().vocab_size, assembly.new_tokens)
        model.train()
    else:
        model = build_model(
            loaded, assembly.config, seed=recipe.seed, attention=None if attention == "auto" else attention
        )
    set_trained(model, loaded=loaded, new_tokens=assembly.new_tokens)
    if is_preference(loaded):
        return model  # its rows are padded, and it is trl that makes its logits
    if plan.attention == BLOCKS and not attend_in_blocks(model):
        reporter.say("attention: this model has its own, which stays")
    elif plan.attention == "sdpa" and (plan.compile or assembly.device.type == "cuda") and plan.context_parallel == 1:
        attend_without_mask(model)
    if plan.precision == "fp8":
        reporter.say(f"fp8: {float8.check_layers(loaded, model)} linear layers")
    if plan.tf32:
        torch.set_float32_matmul_precision("high")
    if assembly.device.type == "cpu" and not plan.compile:
        keep_derivatives(model)
    if is_divided(plan):
        # On a CPU autocast stays: evaluation there is in fp32, with whole weights.
        bf16 = plan.precision == "bf16" and assembly.device.type != "cpu"
        sharding.divide(model, recipe.launch, strategy=plan.strategy, processes=plan.world_size, bf16=bf16)
    return model


def _fitted(assembly: Assembly, model: PreTrainedModel, reporter: Reporter) -> Assembly:
    """The assembly with the micro-batch that a dry step on the device found, which is told and recorded."""
    from gptcli.train.fitting import dry_step

    section, length = assembly.loaded.recipe.train, assembly.plan.sequence_length
    moved: Any = model.to(assembly.device)  # type: ignore[arg-type]
    rows, reason = group.from_first(lambda: dry_step(moved, assembly.plan, section))
    if rows is None:
        one = with_micro_batch(assembly.plan, section, assembly.counts, 1, reason)
        raise _out_of_memory(assembly, one, f"one row of {length:,} tokens does not fit")
    plan = _replan(assembly, rows, reason)
    reporter.say(f"auto: {MICRO_BATCH} = {rows} ({reason})")
    return replace(assembly, plan=plan)


def _build_trainer(
    assembly: Assembly, model: PreTrainedModel, stop: Any, reporter: Reporter, progress: Any
) -> RecordedTrainer:
    from gptcli.evaluation.tasks import task_reader
    from gptcli.generation.carried import carry
    from gptcli.model.load import load_tokenizer
    from gptcli.reporting import quiet
    from gptcli.train.callbacks import Schedule
    from gptcli.train.measured import Tasks
    from gptcli.train.samples import Sampler

    loaded, plan = assembly.loaded, assembly.plan
    recipe = loaded.recipe
    tokenizer = load_tokenizer(assembly.prepared.tokenizer)
    known = find_reader(assembly.prepared.tokenizer)
    carry(model, tokenizer, loaded.written.get("generate"), None if known is None else known.tokens)
    record = {
        "recipe": recipe,
        "plan": plan,
        "run": assembly.run,
        "facts": {
            "processes": plan.world_size,
            "fingerprints": assembly.fingerprints,
            "recipe": resolved(loaded),
        },
        "schedule": Schedule(
            plan,
            recipe.train,
            stop,
            has_validation=assembly.prepared.validation is not None or assembly.task is not None,
            has_prompts=bool(recipe.generate.prompts),
        ),
        "sample": Sampler(recipe, tokenizer, assembly.run, reporter),
        "reporter": reporter,
        "progress": progress,
    }
    if isinstance(assembly.prepared, PreparedPairs):
        from gptcli.train.preference_run import preference_trainer

        return preference_trainer(assembly, assembly.prepared, model, tokenizer, record)
    from gptcli.train.arguments import training_arguments
    from gptcli.train.trainer import CausalTrainer
    from gptcli.train.zero import Zero

    assert assembly.rows is not None
    arguments = training_arguments(loaded, plan, assembly.run.path, assembly.device.type, media=assembly.has_media)
    zero = Zero(model, recipe.train, zero_settings(loaded, plan)) if by_zero(plan) else None
    tasks = None
    if assembly.task is not None:
        together = zero is not None or is_divided(plan)
        asked = task_reader(assembly.prepared.tokenizer, loaded)
        tasks = Tasks(assembly.task, model, tokenizer, plan, reporter, together=together, reader=asked)
    reader = open_reader(assembly.prepared.tokenizer) if assembly.has_media else None
    features = None
    if recipe.data is not None and recipe.data.cache_features:
        from gptcli.data.packed import PackedRows
        from gptcli.train.features import cached_features

        assert reader is not None and isinstance(assembly.rows, PackedRows)
        moved: Any = model.to(assembly.device)  # type: ignore[arg-type]
        workers = arguments.dataloader_num_workers
        features = cached_features(
            loaded, plan, moved, assembly.rows, reader, assembly.prepared.tokenizer, workers, reporter
        )
    with quiet():
        return CausalTrainer(
            model=model,
            args=arguments,
            rows=assembly.rows,
            validation=assembly.prepared.validation,
            tasks=tasks,
            tokenizer=tokenizer,
            replan=partial(_replan, assembly),
            zero=zero,
            reader=reader,
            features=features,
            **record,
        )


def _replan(assembly: Assembly, rows: int, reason: str) -> Plan:
    """The plan with micro-batches of `rows`, written to the run's folder."""
    plan = with_micro_batch(assembly.plan, assembly.loaded.recipe.train, assembly.counts, rows, reason)
    if is_main_process():
        write_atomic(assembly.run.resolved, dump_yaml(decided_recipe(assembly, plan)))
        assembly.run.update(plan=plan.as_dict())
    return plan


def _out_of_memory(assembly: Assembly, plan: Plan, what: str) -> OutOfMemoryError:
    return out_of_memory(what, assembly.loaded, assembly.config, assembly.counts, plan, assembly.device)


def _what_ran_out(trainer: RecordedTrainer) -> str:
    done, plan = int(trainer.state.global_step), trainer.plan
    if not trainer.in_pass:  # the optimizer's own state at the first step; evaluating, writing samples, saving
        return f"out of memory after {done:,} finished steps, outside of a forward or backward pass"
    rows = "one row" if plan.micro_batch_size == 1 else f"a micro-batch of {plan.micro_batch_size} rows"
    return f"{rows} of {plan.sequence_length:,} tokens does not fit (step {done + 1:,})"
