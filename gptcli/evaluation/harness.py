"""Tasks of EleutherAI's lm-evaluation-harness, run in this process on a model that we load.

Prompts, metrics and the JSON of results are its own; the model and tokenizer are ours, so that no pickle and no code of
a model is touched. A task file is data here: one that would run Python (`!function`, code of the Hub) is refused unless
it is trusted, and its templates are rendered in Jinja's sandbox. The tasks that come with lm-eval are its own code.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gptcli.device import best_device
from gptcli.errors import DataError, GptcliError, MissingError, UsageError, first_line, not_installed
from gptcli.evaluation.task_files import TRUST, Asked, read_task
from gptcli.model.load import Precision, load_model, load_tokenizer, memory_errors
from gptcli.reporting import one_line
from gptcli.runs.metrics import finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptcli.reporting import Reporter


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found: what lm-eval takes, its task manager, and whether the templates run in the sandbox."""

    specs: list[Any]
    manager: Any
    sandboxed: bool


@dataclass(frozen=True)
class HarnessOptions:
    """What a command line or recipe says; None leaves it to the tasks and to lm-eval's defaults.

    Attributes:
        num_fewshot: examples before each question; a task that fixes it at 0 keeps that.
        limit: at most this many documents of each task.
        seed: of all that is drawn (lm-eval's own: 0 for Python, 1234 for the rest).
        sequence_length: the longest input in tokens.
        precision: of the weights.
        shown: whether lm-eval may show its progress on standard error.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    seed: int | None = None
    sequence_length: int | None = None
    precision: Precision = "auto"
    shown: bool = False


def find_tasks(asked: Sequence[Asked], model: str, *, trusted: bool, reporter: Reporter) -> Tasks:
    """Find tasks by name (or pattern) and read task files; nothing is loaded of a model or a data set yet.

    Raises:
        MissingError: lm-eval is not installed.
        UsageError: there is no such task, two files hold tasks of one name, or a file runs code and is not trusted.
        DataError: a file cannot be read.
    """
    _import()
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex

    configs = {each: read_task(each, trusted) for each in asked if each.is_file}
    files_only = len(configs) == len(asked) and not any("group" in config for config in configs.values())
    if not files_only:
        reporter.say("reading the names of lm-eval's own tasks: some seconds")
    with _hushed():
        manager: Any = TaskManager(include_defaults=not files_only, metadata={"pretrained": model})
    specs: list[Any] = []
    names: dict[str, str] = {}
    for each in asked:
        if each in configs:
            config = configs[each]
            name = str(config.get("task") if "group" not in config else config["group"])
            if other := names.get(name):
                raise UsageError(f"{other} and {each.name} both hold a task {name!r}", where=each.where)
            names[name] = each.name
            if "group" in config:
                for member in config["task"] if isinstance(config.get("task"), list) else []:
                    if isinstance(member, str):
                        _named(Asked(member, str(each.name)), manager)
                # Only by its name does lm-eval tell what a group says of itself from what it says of its members.
                manager.task_index[name] = TaskIndex.entry_from_config(config)
            specs.append(name if "group" in config else config)
        else:
            specs += [found for found in _named(each, manager) if found not in specs]
    return Tasks(specs, manager, sandboxed=bool(configs) and not trusted)


def run_tasks(
    folder: Path,
    tasks: Tasks,
    options: HarnessOptions,
    reporter: Reporter,
    load: Callable[[], PreTrainedModel] | None = None,
) -> dict[str, Any]:
    """lm-eval's results of a model on tasks, as its own JSON has them; numbers that are not finite are None.

    `load` gives the folder's model, in place of loading it.

    Raises:
        MissingError, CheckpointError: the model cannot be loaded.
        DataError: a task cannot be run, or its data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with memory_errors("Try --precision bf16, or a shorter --sequence-length."):
        model = load() if load is not None else load_model(folder, dtype=options.precision, device=best_device())
        tokenizer = load_tokenizer(folder)
        reporter.say(f"{folder} by lm-eval: {str(model.dtype).removeprefix('torch.')} on {model.device}")
        with ExitStack() as stack:
            stack.enter_context(_hushed(shown=options.shown))
            if tasks.sandboxed:
                stack.enter_context(_sandbox())
            stack.enter_context(_typed_errors())
            bad = stack.enter_context(_watched(model))
            harness = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                # A batch of one is lm-eval's default, and what it gives is exact; a GPU would idle.
                batch_size=1 if model.device.type == "cpu" else "auto",
                max_length=options.sequence_length,
            )
            results = simple_evaluate(
                model=harness,
                tasks=tasks.specs,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                log_samples=False,
                task_manager=tasks.manager,
                **({} if options.seed is None else dict.fromkeys(seeds, options.seed)),
            )
    plain: dict[str, Any] = finite(json.loads(json.dumps(results, default=handle_non_serializable)))
    if bad():  # an accuracy would be a number all the same
        for values in plain["results"].values():
            values.update({key: None for key in values if "," in key})
    return plain


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The results as lines of a table: task, filter, shots, metric, value, standard error."""
    lines = []
    for task, values in results["results"].items():
        shots = str(results.get("n-shot", {}).get(task, ""))
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            shown = [_number(value), _number(error) if isinstance(error, float) else ""]
            lines.append([str(values.get("alias", task)), name, shots, metric, *shown])
    return lines


def without_value(results: dict[str, Any]) -> list[str]:
    """The tasks a metric of which is not a finite number."""
    return [
        task
        for task, values in results["results"].items()
        if any(value is None and "_stderr" not in key for key, value in values.items())
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and math.isfinite(value) else "-" if value is None else str(value)


def _import() -> None:
    try:
        with _hushed():
            import lm_eval.models.huggingface
            import lm_eval.tasks
    except ImportError as error:
        raise not_installed("lm-evaluation-harness", error.name or "lm-eval", "eval") from error
    if not hasattr(lm_eval.tasks.TaskManager, "load") or not hasattr(lm_eval.utils, "env"):
        raise MissingError(
            f"lm-eval {lm_eval.__version__} is another than this was made for",
            remedy="pip install --upgrade 'gptcli[eval]'",
        )


def _named(asked: Asked, manager: Any) -> list[str]:
    """The names of lm-eval's tasks, groups and tags that a name or pattern means."""
    if found := manager.match_tasks([asked.name]):
        return list(found)
    near = difflib.get_close_matches(asked.name, manager.all_tasks, n=3, cutoff=0.6)
    remedy = f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them; a file ends in .yaml."
    raise UsageError(f"there is no task {one_line(asked.name)}", where=asked.where, remedy=remedy)


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[Callable[[], bool]]:
    """Inside, the logits of a model are watched; yields what tells whether any was NaN."""
    import torch

    bad = torch.zeros((), dtype=torch.bool, device=model.device)

    def look(_module: object, _inputs: object, output: Any) -> None:
        bad.logical_or_(output.logits.isnan().any())

    hook = model.register_forward_hook(look)
    try:
        yield lambda: bool(bad)
    finally:
        hook.remove()


@contextmanager
def _sandbox() -> Iterator[None]:
    """Inside, lm-eval renders templates where they cannot reach Python: in its own environment they can."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    own: Any = utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters = own.filters
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = own


@contextmanager
def _hushed(*, shown: bool = False) -> Iterator[None]:
    """Inside, standard output is ours alone, and lm-eval shows its progress only where it may."""
    logger = logging.getLogger("lm_eval")
    level, parallel = logger.level, os.environ.get("TOKENIZERS_PARALLELISM")
    logger.setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it forks to draw samples
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        screen = _no_children(stack)
        if not shown:
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        elif screen is not None:
            stack.enter_context(redirect_stderr(screen))
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            logger.setLevel(level)
            if parallel is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = parallel


def _no_children(stack: ExitStack) -> TextIO | None:
    """Until the stack ends, what child processes say of errors goes nowhere (git of a folder that is no repository).

    Returns what writes to the standard error of before; None where there is none.
    """
    try:
        before = os.dup(2)
    except OSError:
        return None
    screen = stack.enter_context(os.fdopen(before, "w", buffering=1))
    stack.callback(os.dup2, before, 2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    return screen


@contextmanager
def _typed_errors() -> Iterator[None]:
    """Turn what a task, its data or its templates raise into `DataError`."""
    try:
        yield
    except (GptcliError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        remedy = None
        if type(error).__name__ == "SecurityError":
            remedy = f"A template of a task file would reach Python. {TRUST}"
        elif type(error).__module__.startswith("jinja2"):
            remedy = "A template of a task names what its documents do not have, or is no template."
        elif isinstance(error, OSError):
            offline = (
                "HF_HUB_OFFLINE is set: only what is here can be read.\n" if os.environ.get("HF_HUB_OFFLINE") else ""
            )
            remedy = f"{offline}A relative data file is looked for in the current folder, then beside the task file."
        raise DataError(f"lm-eval stopped: {type(error).__name__}: {first_line(error)[:300]}", remedy=remedy) from error
