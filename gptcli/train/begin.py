"""What comes before the first step: where the run starts, what it is made of, and whether it may begin.

Rank 0 decides it, and the other processes of the run hear what `auto` stands for and where to go on from.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from gptcli.data.tokenize import Prepared
from gptcli.errors import CheckpointError
from gptcli.evaluation.tasks import Task
from gptcli.files import cache_root, write_atomic
from gptcli.launch import is_main_process, restarted
from gptcli.model.adapt import check_adapter_from
from gptcli.model.folder import is_adapter
from gptcli.recipe.load import LoadedRecipe, dump_yaml, resolved
from gptcli.reporting import Reporter, mebibytes
from gptcli.runs.folder import RunFolder
from gptcli.train import group
from gptcli.train.adapter_base import BASE, find_base
from gptcli.train.assemble import Assembly, assemble, decided_recipe, describe
from gptcli.train.finish import write_run_report
from gptcli.train.measured import task_of
from gptcli.train.record import now
from gptcli.train.resume import Start, check_unchanged, clear, decided_before, ended_early, find_start, locked


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe.

    Attributes:
        command: pretrain or finetune.
        resume: auto, never, or the path of a checkpoint.
        overwrite: remove a run that is there.
        allow_changes: keys that may differ from the run's recipe.
        verify: read all sources and shards again before the first step.
        stop_after: stop (with code 75) after this many steps; for `--smoke`.
    """

    command: str
    resume: str = "auto"
    overwrite: bool = False
    allow_changes: tuple[str, ...] = ()
    verify: bool = False
    stop_after: int | None = None


def allowed_keys(values: Sequence[str] | None) -> tuple[str, ...]:
    """`--allow-changes a,b --allow-changes c` as ("a", "b", "c")."""
    return tuple(key.strip() for value in values or () for key in value.split(",") if key.strip())


@dataclass(frozen=True)
class _Begun:
    """What rank 0 tells the others; `result` is that of a run that is finished already."""

    start: Start
    decided: dict[str, str]
    dry_step: bool
    strategy: str
    task: Task | None
    result: dict[str, Any] | None


def begin(
    loaded: LoadedRecipe, options: Options, run: RunFolder, reporter: Reporter, held: ExitStack
) -> tuple[Assembly, Start] | dict[str, Any]:
    """Decide where a run starts and prepare it; the result of one that is finished.

    Args:
        loaded: the recipe.
        options: of the command line.
        run: the run's folder, which rank 0 holds from now on, until `held` is closed.
        reporter: where the plan is said.
        held: what is held while the run goes on.

    Raises:
        GptcliError: the recipe, the data, the folder or the checkpoints do not let it begin; on all processes.
    """
    own: list[Assembly] = []

    def decide() -> _Begun:
        held.enter_context(locked(run))
        anew = options.overwrite and not restarted()
        resume = "auto" if restarted() and options.resume == "never" else options.resume
        start = find_start(run, resume=resume, overwrite=anew, reporter=reporter)
        assembly = assemble(
            loaded, run, reporter, decided=decided_before(start, resolved(loaded)), verify=options.verify or None
        )
        if (base := find_base(loaded, assembly.config)) is not None:
            check_adapter_from(loaded, base)
            assembly = replace(assembly, fingerprints={**assembly.fingerprints, BASE: base.fingerprint})
        plan = assembly.plan
        if start.checkpoint is not None:
            result = _check_resume(assembly, options, start, reporter)
            if result is not None:
                return _Begun(start, {}, False, "", None, result)
        for line in describe(assembly):
            reporter.say(line)
        _check_disk(assembly)
        assembly = replace(assembly, task=task_of(loaded, assembly.prepared.tokenizer, reporter))
        if anew:
            clear(run)
        write_start(assembly, options)
        own.append(assembly)
        return _Begun(start, plan.decided, plan.dry_step, plan.strategy, assembly.task, None)

    begun = group.from_first(decide)
    if begun.result is not None:
        return begun.result
    if own:
        return own[0], begun.start
    # What rank 0 has read and verified is there for all: the cache and the run's folder are on a disk that they share.
    if begun.start.checkpoint is not None and not begun.start.checkpoint.is_dir():
        raise CheckpointError(
            "the checkpoint that the run goes on from is not on this machine",
            where=f"{platform.node()}: {begun.start.checkpoint}",
            remedy="Put output_dir on a file system that all machines share.",
        )
    assembly = assemble(loaded, run, reporter, decided=begun.decided, verify=False)
    plan = replace(assembly.plan, dry_step=begun.dry_step, strategy=begun.strategy)
    return replace(assembly, plan=plan, task=begun.task), begun.start


def _check_resume(assembly: Assembly, options: Options, start: Start, reporter: Reporter) -> dict[str, Any] | None:
    """Check that a run goes on as it began; the result of one that is finished, None for one that is not."""
    run, loaded, steps = assembly.run, assembly.loaded, assembly.plan.steps
    harmless = check_unchanged(
        start,
        recipe=resolved(loaded),
        fingerprints=assembly.fingerprints,
        steps=steps,
        allowed=options.allow_changes,
        prepared=assembly.prepared.train.folder.parent if isinstance(assembly.prepared, Prepared) else cache_root(),
    )
    whole = start.step >= steps or ended_early(start, loaded.recipe.train)
    finetune = loaded.recipe.finetune
    as_asked = finetune.adapter == "none" or is_adapter(run.final) is not finetune.merge
    if whole and as_asked and run.final.is_dir() and run.read().get("status") == "done":
        if not run.report.is_file():
            write_run_report(run, reporter)
        reporter.say(f"{run.name} is finished: {start.step:,} steps, {run.final}")
        reporter.say("--overwrite trains it again; name=NAME trains another; a larger train.max_steps goes on.")
        return run.read().get("result") or {}
    assert start.checkpoint is not None
    reporter.say(f"resuming {run.name} from {start.checkpoint.name} ({start.step:,} of {steps:,} steps)")
    for line in harmless:
        reporter.say(f"changed since: {line}")
    return None


def write_start(assembly: Assembly, options: Options) -> None:
    """Write the run's recipe, the resolved one and `run.json`: from here on it is a run. Only rank 0 writes."""
    from gptcli.device import device_name
    from gptcli.train.record import command_line, git_commit, versions

    run, loaded, plan = assembly.run, assembly.loaded, assembly.plan
    if not is_main_process():
        return
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomic(run.recipe, loaded.text)
    write_atomic(run.resolved, dump_yaml(decided_recipe(assembly, plan)))
    run.update(
        name=run.name,
        command=options.command,
        status="running",
        reason=None,
        pid=os.getpid(),
        host=platform.node(),
        started=now(),
        ended=None,
        command_line=command_line(),
        versions=versions(),
        git_commit=git_commit(loaded.path.parent),
        device=device_name(assembly.device),
        seed=loaded.recipe.seed,
        fingerprints=assembly.fingerprints,
        parameters=plan.parameters,
        plan=plan.as_dict(),
        data=assembly.prepared.report,
    )


def _check_disk(assembly: Assembly) -> None:
    """Compare the bytes that the run will write with what is free, before the first step."""
    folder = assembly.run.path
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, assembly.plan.disk_bytes
    if free < needed:
        raise CheckpointError(
            f"the run needs about {mebibytes(needed)} of disk and {mebibytes(free)} are free",
            where=str(folder),
            remedy="Make room, lower train.save_total_limit, or set output_dir to another disk.",
        )
