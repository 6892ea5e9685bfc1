"""The command line as a user meets it: help, errors, exit codes, the whole first run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_RECIPE, Cli, make_project

LAZY = "import sys; from gptcli.cli.main import main; code = main(sys.argv[1:]); print(code, *sys.modules)"


def modules_after(folder: Path, *arguments: str) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", LAZY, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    code, *names = done.stdout.splitlines()[-1].split()
    return int(code), {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("pretrain", "--help"), 0),
        (("eval", "--help"), 0),
        (("generate", "--help"), 0),
        (("recipes", "list"), 0),
        (("pretrain", "bad.yaml"), 2),
        (("pretrain", "nowhere.yaml"), 2),
        (("eval", "bad.yaml"), 2),
        (("tokenize", "tiny.yaml", "train.max_steps=x"), 2),
    ],
)
def test_help_and_recipe_errors_import_neither_torch_nor_transformers(
    project: Path, arguments: tuple[str, ...], code: int
) -> None:
    (project / "bad.yaml").write_text("data: {trian: x}\n")
    seen, modules = modules_after(project, *arguments)
    assert seen == code
    assert not modules & {"torch", "transformers", "datasets", "accelerate", "numpy"}


def test_the_whole_life_of_a_model(project: Path, run_cli: Cli) -> None:
    tokenized = run_cli("tokenize", "tiny.yaml", "--json", cwd=project)
    assert tokenized.code == 0, tokenized.err
    assert Path(tokenized.json()["train_folder"], "manifest.json").exists()

    trained = run_cli("pretrain", "tiny.yaml", "--json", cwd=project)
    assert trained.code == 0, trained.err
    result = trained.json()
    assert set(result) >= {
        "run", "status", "step", "tokens", "loss", "validation", "tokens_per_second", "wall_seconds", "peak_bytes",
    }  # fmt: skip
    assert (result["status"], result["step"], result["tokens"]) == ("done", 8, 8 * 4 * 32)
    run = project / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} >= {
        "recipe.yaml", "resolved.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "final",
        "checkpoint-4", "checkpoint-8",
    }  # fmt: skip
    assert (run / "recipe.yaml").read_text() == TINY_RECIPE
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert list(first) == [
        "step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "memory", "seconds",
    ]  # fmt: skip

    evaluated = run_cli("eval", "--json", cwd=project)
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json()["loss"] == pytest.approx(result["validation"]["loss"], abs=1e-6)

    generated = run_cli("generate", "--prompt", "The ", "--max-new-tokens", "5", "--json", cwd=project)
    assert generated.code == 0, generated.err
    assert generated.json()["completions"][0]["tokens"] <= 5

    tuned = run_cli("finetune", "tiny.yaml", "model={from: runs/tiny/final}", "name=tuned", "--json", cwd=project)
    assert tuned.code == 0, tuned.err
    assert tuned.json()["validation"]["loss"] < result["validation"]["loss"]

    planned = run_cli("plan", "tiny.yaml", "--json", cwd=project)
    assert planned.code == 0, planned.err
    assert planned.json()["steps"] == 8


BAD = {
    "unknown key": ("train: {max_steps: 4, lerning_rate: 1}", 2, ["r.yaml", "lerning_rate", "learning_rate"]),
    "doubled key": ("seed: 1\nseed: 2", 2, ["r.yaml:9", "seed"]),
    "wrong type": ("seed: many", 2, ["r.yaml", "seed"]),
    "two lengths": ("train: {max_steps: 4, epochs: 1}", 2, ["max_steps", "epochs"]),
    "no length": ("train: {learning_rate: 1e-3}", 2, ["max_tokens"]),
    "not yet": ("train: {max_steps: 4, objective: masked}", 2, ["objective", "not available yet"]),
    "unknown optimizer": ("train: {max_steps: 4, optimizer: adamww}", 2, ["adamww", "adamw"]),
    "unknown argument": ("train: {max_steps: 4, trainer_args: {warmup_stps: 1}}", 2, ["warmup_stps", "warmup_steps"]),
    "missing package": ("train: {max_steps: 4, optimizer: adamw_8bit}", 7, ["bitsandbytes", "pip install"]),
    "missing tracker": ("train: {max_steps: 4}\ntracking: {to: [mlflow]}", 7, ["mlflow", "pip install"]),
}
HEAD = """\
tokenizer: {train: {algorithm: bytes}}
data:
  train: text.txt
  validation: {tail: 10%}
  sequence_length: 32
model: {type: llama, config: {num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2}}
"""


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_ends_with_its_code_and_says_what_to_do(project: Path, run_cli: Cli, case: str) -> None:
    tail, code, words = BAD[case]
    (project / "r.yaml").write_text(f"{HEAD}\n{tail}\n")
    done = run_cli("pretrain", "r.yaml", cwd=project)
    assert done.code == code, done.err
    assert all(word in done.err for word in words), done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 8
    assert not (project / "runs").exists() or not list((project / "runs").iterdir())


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("data.train=gone.txt", 3, ["gone.txt", "data.train"]),
        ("data.train=empty.txt", 3, ["empty.txt"]),
        ("data.train=short.txt", 3, ["tokens", "sequence_length"]),
        ("data.train=pictures", 3, ["pictures", ".txt"]),
        ("model={from: nowhere/at-all}", 7, ["nowhere/at-all"]),
        ("model={from: pictures}", 7, ["pictures"]),
    ],
)
def test_bad_data_and_models_end_with_their_code(
    project: Path, run_cli: Cli, override: str, code: int, words: list[str]
) -> None:
    (project / "empty.txt").write_text("")
    (project / "short.txt").write_text("too short")
    (project / "pictures").mkdir()
    (project / "pictures" / "cat.png").write_bytes(b"\x89PNG")
    done = run_cli("pretrain", "tiny.yaml", override, cwd=project)
    assert done.code == code, done.err
    assert all(word in done.err for word in words), done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 8


def test_a_prompt_longer_than_the_context_says_both_numbers(project: Path, run_cli: Cli) -> None:
    assert run_cli("pretrain", "tiny.yaml", "--quiet", cwd=project).code == 0
    done = run_cli("generate", "--prompt", "x" * 100, cwd=project)
    assert done.code == 2
    assert "100" in done.err
    assert "32" in done.err


def test_quiet_prints_nothing_and_json_one_document(project: Path, run_cli: Cli) -> None:
    done = run_cli("pretrain", "tiny.yaml", "--quiet", cwd=project)
    assert (done.code, done.out, done.err) == (0, "", "")
    done = run_cli("pretrain", "tiny.yaml", "--json", cwd=project)
    assert done.json()["status"] == "done"


def test_debug_shows_the_traceback(project: Path, run_cli: Cli) -> None:
    done = run_cli("pretrain", "tiny.yaml", "data.train=gone.txt", "--debug", cwd=project)
    assert done.code == 3
    assert "Traceback" in done.err


def test_a_recipe_works_from_any_folder(tmp_path: Path, run_cli: Cli) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    make_project(home)
    done = run_cli("pretrain", str(home / "tiny.yaml"), "--quiet", "train.max_steps=1", cwd=elsewhere)
    assert done.code == 0, done.err
    assert (elsewhere / "runs" / "tiny" / "final").is_dir()


def test_doctor_says_what_is_here_and_how_to_get_the_rest(tmp_path: Path, run_cli: Cli) -> None:
    done = run_cli("doctor", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json()["machine"]["cores"] >= 1
    assert "torch" in done.json()["versions"]
    assert "pip install 'gptcli[" in run_cli("doctor", cwd=tmp_path, COLUMNS="200").out


@pytest.mark.parametrize("library", ["pydantic_core", "libtorch_cpu"])
def test_ctrl_c_before_training_ends_with_130_and_one_line(
    project: Path, environment: dict[str, str], library: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", "pretrain", "tiny.yaml"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    # While Python still imports: the library is in memory, and what uses it is not there yet.
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and library not in maps.read_text():
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors + out
    assert errors.count("stopped") == 1


def test_ctrl_c_that_falls_into_a_destructor_is_not_dropped(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(
        """
import os, signal, time
from gptcli import __main__ as process
from gptcli.cli import main

class Fallen:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

def command(arguments):
    Fallen()
    time.sleep(30)
    return 0

main.main = command
process.run()
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "\nstopped\n"


def test_a_reader_that_goes_away_does_not_end_the_training(project: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", "pretrain", "tiny.yaml"], cwd=project, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (project / "runs" / "tiny" / "final" / "model.safetensors").exists()


def test_a_closed_standard_output_is_no_crash(tmp_path: Path, environment: dict[str, str]) -> None:
    command = f"{shlex.quote(sys.executable)} -m gptcli runs list >&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
