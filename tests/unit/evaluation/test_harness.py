from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gptcli.errors import DataError, UsageError
from gptcli.evaluation.harness import _named, _sandbox, find_tasks
from gptcli.evaluation.task_files import Asked
from gptcli.reporting import Silent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'gptcli[eval]'"
)

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: [rows.jsonl, "other*.jsonl"]}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
"""


def find(folder: Path, text: str, *, trusted: bool = False, name: str = "task.yaml") -> dict[str, object]:
    (folder / name).write_text(text)
    found = find_tasks([Asked(str(folder / name))], "model", trusted=trusted, reporter=Silent())
    assert found.sandboxed != trusted
    return dict(found.specs[0])


@pytest.mark.parametrize(
    "line",
    [
        "process_results: !function code.run",
        "doc_to_choice: [a, {b: !function code.run}]",
        "process_docs: !!python/name:os.system",
        "process_docs: !!python/object/apply:os.system [true]",
        "class: !function code.Run",
        "class: code.Run",
        "include: base.yaml",
        "include: [task.yaml, base.yaml]",
        "<<: {include: base.yaml}",
        "metric_list: [{metric: acc, hf_evaluate: true}]",
        "metric_list: [{metric: someone/metric}]",
        "generation_kwargs: {custom_generate: someone/code, trust_remote_code: true}",
        "x: &a {y: !function code.run}\nz: *a",
    ],
)
def test_a_file_that_runs_code_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("import pathlib\npathlib.Path('RAN').touch()\n")
    (tmp_path / "base.yaml").write_text("process_results: !function code.run\n")
    with pytest.raises(UsageError) as caught:
        find(tmp_path, f"{TASK}{line}\n")
    assert caught.value.remedy is not None and "--trust-tasks" in caught.value.remedy
    assert caught.value.where is not None and ".yaml" in caught.value.where
    assert not (tmp_path / "RAN").exists()


def test_a_trusted_file_has_its_functions(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text("def run(doc, results):\n    return {'acc': 1}\n")
    config = find(tmp_path, f"{TASK}process_results: !function functions.run\n", trusted=True)
    assert callable(config["process_results"])
    with pytest.raises(DataError, match="not there"):
        find(tmp_path, f"{TASK}process_results: !function functions.absent\n", trusted=True)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert "class" in utils.apply_template(hostile, {})
    with _sandbox():
        with pytest.raises(SecurityError):
            utils.apply_template(hostile, {})
        assert utils.apply_template("{{ a | regex_replace('b', 'c') }}\n", {"a": "abc"}) == "acc\n"
    assert "class" in utils.apply_template(hostile, {})


def test_data_is_found_here_then_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    for folder in (beside, elsewhere):
        folder.mkdir()
    (beside / "rows.jsonl").touch()
    (beside / "other1.jsonl").touch()
    monkeypatch.chdir(elsewhere)
    found = find(beside, TASK)["dataset_kwargs"]
    assert found == {"data_files": {"test": [str(beside / "rows.jsonl"), str(beside / "other*.jsonl")]}}
    (elsewhere / "rows.jsonl").touch()
    found = find(beside, TASK)["dataset_kwargs"]
    assert found == {"data_files": {"test": ["rows.jsonl", str(beside / "other*.jsonl")]}}


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "nothing: here", "include: absent.yaml\n", "task: a\ninclude: task.yaml"]
)
def test_a_file_that_is_no_task_is_an_error_of_data(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError):
        find(tmp_path, text)


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "task.yaml").write_text(TASK)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert _named(Asked("mi*"), manager) == ["mine"]
    with pytest.raises(UsageError) as caught:
        _named(Asked("mnie"), manager)
    assert caught.value.remedy == "Did you mean mine?"
    with pytest.raises(DataError, match="no task file"):
        find_tasks([Asked("absent.yaml")], "model", trusted=False, reporter=Silent())


def test_two_files_of_one_task_are_a_mistake(tmp_path: Path) -> None:
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(TASK)
    asked = [Asked(str(tmp_path / name)) for name in ("one.yaml", "two.yaml")]
    with pytest.raises(UsageError, match="both hold a task 'mine'"):
        find_tasks(asked, "model", trusted=False, reporter=Silent())
