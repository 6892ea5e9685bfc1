from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptcli.recipe.load import dump_yaml, load_recipe, resolved
from gptcli.runs.folder import RunFolder
from tests.conftest import Cli, make_project
from tests.tiny import byte_tokenizer, make_model, save_model, wrapped


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run: a random model, and the recipe of `make_project`, whose prompt is "The "."""
    folder = make_project(tmp_path_factory.mktemp("generate"))
    run = RunFolder(folder / "runs" / "tiny-run")
    run.update(name="tiny-run", status="done", started="2026-01-01T00:00:00+00:00")
    run.resolved.write_text(dump_yaml(resolved(load_recipe(str(folder / "tiny.yaml")))))
    save_model(run.final)
    make_model().save_pretrained(folder / "other")
    wrapped(byte_tokenizer(260)).save_pretrained(str(folder / "other"))
    return folder


def test_json_is_one_line_a_prompt(here: Path, run_cli: Cli) -> None:
    done = run_cli(
        "generate", "tiny-run", "--prompt", "hello", "--prompt", "世界", "--json", "--seed", "1", "-n", "2", cwd=here
    )
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["hello", "世界"]
    for line in lines:
        assert set(line) == {"prompt", "completions"} and len(line["completions"]) == 2
        for completion in line["completions"]:
            assert set(completion) == {"text", "tokens", "finish_reason"}
            assert completion["tokens"] <= 8, "the run's own recipe says max_new_tokens: 8"


def test_text_is_the_prompt_and_what_json_gives(here: Path, run_cli: Cli) -> None:
    arguments = ("--seed", "3", "--max-new-tokens", "12", "--temperature", "0.7", "--top-k", "20", "--top-p", "0.9")
    plain = run_cli("generate", *arguments, "--prompt", "hello", cwd=here)
    again = run_cli("generate", *arguments, "--prompt", "hello", "--json", cwd=here)
    assert plain.code == 0, plain.err
    assert plain.out == "hello" + json.loads(again.out)["completions"][0]["text"] + "\n"
    assert "runs/tiny-run/final" in plain.err, "the newest run, named"


def test_a_prompt_comes_from_standard_input_else_from_the_runs_recipe(here: Path, run_cli: Cli) -> None:
    piped = run_cli("generate", "--json", "--greedy", cwd=here, stdin="two\nlines\n")
    assert json.loads(piped.out)["prompt"] == "two\nlines"
    own = run_cli("generate", "--json", "--greedy", cwd=here)
    assert json.loads(own.out)["prompt"] == "The "


def test_several_sequences_are_numbered(here: Path, run_cli: Cli) -> None:
    done = run_cli("generate", "-p", "你好", "--num-return-sequences", "5", "--seed", "1", "--quiet", cwd=here)
    assert done.code == 0 and done.err == ""
    assert all(f"[{number}] 你好" in done.out for number in range(1, 6))
    texts = {part.split("] 你好", 1)[1] for part in done.out.split("\n[")}
    assert len(texts) == 5


def test_ways_to_the_same_text_and_logprobs_in_json(here: Path, run_cli: Cli) -> None:
    arguments = ("generate", "--prompt", "the cat sat on the mat. the cat", "--seed", "2", "--json", "--logprobs", "1")
    plain = run_cli(*arguments, cwd=here)
    completion = json.loads(plain.out)["completions"][0]
    assert len(completion["logprobs"]) == completion["tokens"]
    assert all(set(token) == {"id", "token", "logprob", "top"} for token in completion["logprobs"])
    for way in (("--draft", "tiny-run"), ("--prompt-lookup", "3")):
        done = run_cli(*arguments[:-2], *way, cwd=here)
        assert json.loads(done.out)["completions"][0]["text"] == completion["text"], done.err
    beams = run_cli(*arguments[:-2], "--num-beams", "3", "-n", "2", "--no-repeat-ngram-size", "2", cwd=here)
    assert "3 beams" in beams.err and len(json.loads(beams.out)["completions"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--prompt", "\x01" * 64], 2, "context of 64"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["--prompt", "x", "--precision", "fp7"], 2, "fp7"),
        (["--prompt", "x", "--greedy", "-n", "2"], 2, "greedy"),
        (["--prompt", "x", "--num-beams", "2", "-n", "3"], 2, "num_beams"),
        (["--prompt", "x", "--logprobs", "2"], 2, "--json"),
        (["--prompt", "x", "--draft", "tiny-run", "--prompt-lookup", "2"], 2, "--draft"),
        (["--prompt", "x", "--draft", "other"], 2, "vocabulary"),
        (["--prompt", "x", "--min-p", "2"], 2, "min_p"),
        (["tiny-rum", "--prompt", "x"], 7, "tiny-run"),
        (["nobody/nothing", "--prompt", "x"], 7, "nobody/nothing"),
    ],
)
def test_errors_are_a_few_lines(here: Path, run_cli: Cli, arguments: list[str], code: int, text: str) -> None:
    done = run_cli("generate", *arguments, cwd=here)
    assert done.code == code
    assert text in done.err and "Traceback" not in done.err and done.out == ""
    assert len(done.err.splitlines()) <= 9


def test_no_prompt_and_no_model_are_told(tmp_path: Path, run_cli: Cli) -> None:
    assert run_cli("generate", "--prompt", "x", cwd=tmp_path).code == 7
    save_model(tmp_path / "model")
    done = run_cli("generate", "model", cwd=tmp_path)
    assert done.code == 2 and "--prompt" in done.err


def test_help_imports_no_torch(tmp_path: Path, run_cli: Cli) -> None:
    for command in ("generate", "eval", "runs"):
        done = run_cli(command, "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
        assert done.code == 0
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.err.splitlines()}
        assert not imported & {"torch", "transformers", "numpy", "tokenizers"}


def test_constrained_output_is_what_was_asked_for_or_said_not_to_be_whole(here: Path, run_cli: Cli) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'gptcli[constrain]'")
    schema = (
        '{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": false}'
    )
    many = ("--max-new-tokens", "40", "--json", "--seed", "1")
    done = run_cli("generate", "--prompt", "x", "--json-schema", schema, *many, "-n", "3", cwd=here)
    assert done.code == 0, done.err
    for completion in json.loads(done.out)["completions"]:
        assert json.loads(completion["text"])["n"] in (1, 22) and completion["finish_reason"] == "stop"
    (here / "schema.json").write_text(schema)
    again = run_cli("generate", "--prompt", "x", "--json-schema", "schema.json", *many, "-n", "3", cwd=here)
    assert again.out == done.out
    cut = run_cli("generate", "--prompt", "x", "--regex", "[a-z]{50}", "--max-new-tokens", "3", cwd=here)
    assert cut.code == 0 and "before the output was whole" in cut.err
    both = run_cli("generate", "--prompt", "x", "--regex", "a", "--json-schema", schema, cwd=here)
    assert both.code == 2 and "exclude" in both.err
