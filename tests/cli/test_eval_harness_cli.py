from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY, Cli
from tests.tiny import make_model, save_model

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'gptcli[eval]'"
)

CHOICE = r"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/questions.jsonl, train: data/questions.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Q: {{question}}\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: data/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = r"""
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: data/questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

MEMBER = CHOICE.replace("\n", "\n    ").replace("    task: tiny_choice", "  - task: {name}", 1)
GROUP = (
    "group: pair\ntask:"
    + "".join(MEMBER.rstrip().replace("{name}", name) for name in ("one", "two"))
    + "\naggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and three tasks with their data beside them."""
    folder = tmp_path_factory.mktemp("harness")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat", "hello", "world"]) for _ in range(count))

    questions = [
        {"question": words(5), "choices": [words(1), words(2), words(3)], "answer": rng.randrange(3)} for _ in range(12)
    ]
    data = folder / "tasks" / "data"
    data.mkdir(parents=True)
    (data / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (data / "texts.jsonl").write_text("".join(json.dumps({"text": words(60)}) + "\n" for _ in range(3)))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE), ("group", GROUP)):
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    save_model(folder / "model")
    (folder / "text.txt").write_text("the cat sat on the mat")
    return folder


@installed
def test_results_are_those_of_lm_evals_own_command(here: Path, run_cli: Cli, environment: dict[str, str]) -> None:
    names = ["choice.yaml", "rolling.yaml", "generate.yaml"]
    model = "--model hf --model_args pretrained=../model,dtype=float32 --device cpu"
    others = ["--num_fewshot", "2", "--output_path", "../own.json"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *model.split(), "--tasks", ",".join(names), *others],
        cwd=here / "tasks",  # it finds data in the current folder alone
        env={**environment, "HF_HOME": str(here / "hub")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    theirs: dict[str, Any] = json.loads(next(here.glob("own_*.json")).read_text())
    names.append("group.yaml")
    (here / "r.yaml").write_text(
        f"eval: {{tasks: {[f'tasks/{name}' for name in names]}, num_fewshot: 2}}".replace("'", '"')
    )
    ours = run_cli("eval", "./model", "r.yaml", "--json", cwd=here, HF_HOME=str(here / "hub")).json()["harness"]
    assert set(theirs["results"]) == {"tiny_choice", "tiny_rolling", "tiny_generate"}
    for part in ("results", "n-shot", "n-samples"):
        assert {name: ours[part][name] for name in theirs["results"]} == theirs[part]
    one, two = (ours["results"][f"pair::{name}"]["acc,none"] for name in ("one", "two"))
    assert ours["results"]["pair"]["acc,none"] == pytest.approx((one + two) / 2)


@installed
def test_tasks_stand_beside_the_loss_and_hostile_files_are_refused(here: Path, run_cli: Cli) -> None:
    hostile = Path(shutil.copytree(here / "tasks", here / "hostile"))
    (hostile / "code.py").write_text("import pathlib\npathlib.Path('RAN').touch()\ndef text(doc):\n    return 'x'\n")
    (hostile / "choice.yaml").write_text(CHOICE.replace('"Q: {{question}}\\nA:"', "!function code.text"))
    arguments = ["eval", "./model", "--tasks", "tasks/choice.yaml", "--limit", "3", "--sequence-length", "32"]
    done = run_cli(*arguments, "--data", "text.txt", "--json", cwd=here, HF_HOME=str(here / "hub"))
    found = done.json()
    assert found["loss"] > 0 and found["harness"]["n-samples"]["tiny_choice"] == {"original": 12, "effective": 3}
    assert "fatal" not in done.err and "Traceback" not in done.err
    refused = run_cli("eval", "./model", "--tasks", "hostile/choice.yaml", cwd=here)
    assert refused.code == 2 and "choice.yaml:8" in refused.err and "--trust-tasks" in refused.err
    assert not (here / "RAN").exists()


@installed
def test_an_accuracy_of_a_model_with_nan_logits_is_no_number(here: Path, run_cli: Cli) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(shutil.copytree(here / "model", here / "nan"))
    arguments = ["--tasks", "tasks/choice.yaml", "--limit", "2", "--json"]
    done = run_cli("eval", "./nan", *arguments, cwd=here, HF_HOME=str(here / "hub"))
    assert done.code == 5 and "not a finite number" in done.err
    assert done.json()["harness"]["results"]["tiny_choice"]["acc,none"] is None


@installed
def test_ctrl_c_while_tasks_run_ends_with_130_and_no_traceback(here: Path, environment: dict[str, str]) -> None:
    many = json.dumps({"text": "the cat sat on a mat"}) + "\n"
    (here / "tasks" / "data" / "many.jsonl").write_text(many * 20_000)
    (here / "tasks" / "many.yaml").write_text(ROLLING.replace("texts.jsonl", "many.jsonl"))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gptcli", "eval", "./model", "--tasks", "tasks/many.yaml"],
        cwd=here,
        env={**environment, "HF_HOME": str(here / "hub")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any("by lm-eval" in line for line in process.stdout), "it began"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "there was nothing to save" in said and "Traceback" not in said


def test_without_lm_eval_the_install_command_is_named(here: Path, run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('none', name='lm_eval')")
    places = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = run_cli("eval", "./model", "--tasks", "tasks/choice.yaml", cwd=here, PYTHONPATH=places)
    assert done.code == 7 and "pip install 'gptcli[eval]'" in done.err
