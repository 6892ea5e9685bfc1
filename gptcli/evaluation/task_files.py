"""Files of lm-evaluation-harness tasks, read as data: what would run code is refused before anything is imported."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.errors import DataError, UsageError, first_line
from gptcli.reporting import one_line

SUFFIXES = (".yaml", ".yml")
# Keys of a task file with which transformers, evaluate or lm-eval fetch or load code.
RUNS_CODE = ("class", "custom_generate", "hf_evaluate", "trust_remote_code")
TRUST = "If you trust where it comes from: --trust-tasks."


@dataclass(frozen=True)
class Asked:
    """A task's name or the path of a task YAML, and where it was written."""

    name: str
    where: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a path."""
        return self.name.endswith(SUFFIXES)


def read_task(asked: Asked, trusted: bool) -> dict[str, Any]:
    """What a task file says, with the files that it includes and its data files found; checked for code before."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(asked.name).expanduser()
    if not path.is_file():
        raise DataError(f"there is no task file {one_line(asked.name)}", where=asked.where)
    try:
        if not trusted:
            _check_tags(path.resolve(), set())
        config: dict[str, Any] = load_yaml(path, resolve_func=trusted)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"the task file cannot be read: {first_line(error)}", where=str(path)) from error
    except (ImportError, AttributeError) as error:  # of a !function
        raise DataError(f"a function of the task file is not there: {first_line(error)}", where=str(path)) from error
    if not ({"task", "group"} & config.keys()):
        raise DataError("the file holds neither a task nor a group", where=str(path))
    if not trusted:
        _check_keys(config, path)
    for each in [config, *(config["task"] if isinstance(config.get("task"), list) else [])]:
        if isinstance(each, dict) and isinstance(each.get("dataset_kwargs"), dict):
            each["dataset_kwargs"] = _found(each["dataset_kwargs"], path.resolve().parent)
    return config


def _check_tags(path: Path, seen: set[Path]) -> None:
    """Raise `UsageError` when a task file, or one that it includes, names Python; nothing of it is imported."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    if path in seen:
        return
    seen.add(path)
    # The parser that lm-eval reads it with, so that both see the same.
    with path.open("rb") as file:
        root: Any = yaml.compose(file, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.FullLoader)
    waiting, met = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in met:
            continue
        met.add(id(node))
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            place = f"{path}:{node.start_mark.line + 1}"
            raise UsageError(f"the task file runs Python code ({one_line(node.tag)})", where=place, remedy=TRUST)
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    included = load_yaml(path, resolve_func=False, recursive=False).get("include") or []
    for each in included if isinstance(included, list) else [included]:
        _check_tags((path.parent / str(each)).resolve(), seen)


def _check_keys(value: Any, path: Path) -> None:
    """Raise `UsageError` for what would fetch or load code in plain words: see `RUNS_CODE`, and metrics of the Hub."""
    from lm_eval.api import metrics
    from lm_eval.api.registry import METRIC_REGISTRY

    del metrics  # imported for what it registers
    if isinstance(value, list):
        for item in value:
            _check_keys(item, path)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in RUNS_CODE and item:
            raise UsageError(f"the task file runs code: {key}", where=str(path), remedy=TRUST)
        if key == "metric" and isinstance(item, str) and item not in METRIC_REGISTRY:
            what = f"lm-eval has no metric {one_line(item)}, and would run code of that name from the Hub"
            raise UsageError(what, where=str(path), remedy=TRUST)
        _check_keys(item, path)


def _found(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of a data set with its files found: in the current folder, as lm-eval has it, else beside the task."""

    def found(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: found(item) for key, item in value.items()}
        if isinstance(value, list):
            return [found(item) for item in value]
        if not isinstance(value, str) or "://" in value or os.path.isabs(value) or glob.glob(value, recursive=True):
            return value
        beside = os.path.join(glob.escape(str(folder)), value)
        matches = glob.glob(beside, recursive=True)
        return os.path.join(folder, value) if matches else value

    return {key: found(value) if key in ("data_files", "data_dir") else value for key, value in arguments.items()}
