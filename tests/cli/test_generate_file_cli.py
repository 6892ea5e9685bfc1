"""`gptcli generate --file`: what goes in, what comes out, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs import Jobs, make_jobs, rows
from tests.runs import Forks


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Jobs:
    return make_jobs(tmp_path_factory.mktemp("jobs"), forks)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_output_row_is_the_input_row_and_what_generate_gives_for_its_prompt_alone(jobs: Jobs) -> None:
    found = written(jobs.output("undisturbed"))
    assert [{**row, "completions": None} for row in found] == [{**row, "completions": None} for row in rows()]
    assert all(list(row) == ["id", "prompt", "more", "completions"] for row in found)
    alone = [option for row in rows()[:5] for option in ("--prompt", row["prompt"])]
    how = ("--max-new-tokens", "6", "--seed", "1", "--precision", "fp32")
    done = jobs.forks("generate", "model", *alone, *how, "--json", cwd=jobs.folder)
    assert [json.loads(line)["completions"] for line in done.out.splitlines()] == [
        row["completions"] for row in found[:5]
    ]


def test_json_is_one_document_and_a_second_time_the_same(jobs: Jobs) -> None:
    first = jobs.run("json", "--json")
    assert first.code == 0, first.err
    result = first.json()
    assert set(result) == {"output", "prompts", "tokens", "seconds", "tokens_per_second"}
    tokens = sum(each["tokens"] for row in written(jobs.output("json")) for each in row["completions"])
    assert (result["output"], result["prompts"], result["tokens"]) == ("json.jsonl", 40, tokens)
    before = jobs.output("json").stat()
    again = jobs.run("json", "--json")
    assert again.code == 0 and again.json() == result and "json.jsonl is finished" in again.err
    assert jobs.output("json").stat() == before
    anew = jobs.run("json", "--json", "--overwrite")
    assert anew.code == 0 and "is finished" not in anew.err and jobs.output("json").stat() != before


def test_an_output_of_another_command_is_replaced_on_request_only(jobs: Jobs) -> None:
    jobs.output("there").write_text("mine\n")
    done = jobs.run("there")
    assert done.code == 2 and "there.jsonl is there already" in done.err and "--overwrite" in done.err
    assert jobs.output("there").read_text() == "mine\n" and not jobs.partial("there").exists()
    jobs.ends_the_same("there", "--overwrite")


def test_every_format_gives_the_same_completions_and_keeps_its_columns(jobs: Jobs) -> None:
    prompts = [row["prompt"] for row in rows()[1:6]]
    table = pa.table({"prompt": prompts, "n": list(range(5))})
    pq.write_table(table, jobs.folder / "in.parquet")
    (jobs.folder / "in.csv").write_text("n,prompt\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(prompts)))
    (jobs.folder / "in.txt").write_text("\n\n".join(prompts) + "\n")
    expected = [row["completions"] for row in written(jobs.output("undisturbed"))[1:6]]
    for suffix, more in (("parquet", {"n": 2}), ("csv", {"n": "2"}), ("txt", {})):
        done = jobs.run(suffix, file=f"in.{suffix}")
        assert done.code == 0, done.err
        assert ("blank lines: 4 of them are left out" in done.out) == (suffix == "txt")
        found = written(jobs.output(suffix))
        assert [row["completions"] for row in found] == expected
        assert found[2] == {"prompt": prompts[2], **more, "completions": expected[2]}


def test_several_sequences_and_another_column(jobs: Jobs) -> None:
    (jobs.folder / "q.jsonl").write_text('{"question": "hello", "prompt": 3}\n')
    done = jobs.run("several", "-n", "3", "--prompt-column", "question", file="q.jsonl")
    assert done.code == 0, done.err
    (row,) = written(jobs.output("several"))
    assert row["prompt"] == 3 and len({each["text"] for each in row["completions"]}) == 3


ROWS = {
    "column.jsonl": ('{"prompt": "a"}\n{"text": "b"}\n', "column.jsonl:2: has no column 'prompt'"),
    "type.jsonl": ('{"prompt": "a"}\n{"prompt": 3}\n', "type.jsonl:2: column 'prompt' holds a number"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": "b"\n', "broken.jsonl:2: is not a JSON object"),
    "latin.jsonl": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "latin.jsonl:2: is not UTF-8"),
    "empty.jsonl": ("", "empty.jsonl: there is no prompt in it"),
    "twice.jsonl": ('{"prompt": "a", "completions": 1}\n', "twice.jsonl:1: has a column 'completions' already"),
    "table.csv": ("id,prompts\n1,a\n", "--prompt-column prompts"),
    "long.jsonl": ('{"prompt": "a"}\n\n{"prompt": "' + "x" * 99 + '"}\n', "long.jsonl:3: the prompt has 99 tokens"),
    "longer.jsonl": ('{"prompt": "' + "x" * 99_000 + '"}\n', "longer.jsonl:1: the prompt has 99,000 characters"),
    "missing.jsonl": (None, "missing.jsonl: there is no such file"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_with_a_fault_is_refused_by_row_before_the_weights_are_read(jobs: Jobs, name: str) -> None:
    content, said = ROWS[name]
    if content is not None:
        (jobs.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = jobs.run("bad", file=name, fault={"at": r"open .*/model\.safetensors", "do": "SIGKILL", "reading": True})
    assert done.code == 3, done.err
    assert said in done.err and "Traceback" not in done.err and len(done.err.splitlines()) <= 3
    assert not jobs.output("bad").exists() and not jobs.partial("bad").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--file", "in.jsonl"], "--file needs --output"),
        (["--output", "a.jsonl"], "--output goes with --file"),
        (["--prompt", "x", "--prompt-column", "y"], "--prompt-column goes with --file"),
        (["--file", "in.jsonl", "--output", "a.jsonl", "--prompt", "x"], "exclude each other"),
        (["--file", "in.jsonl", "--output", "in.jsonl"], "is the file of the prompts itself"),
        (["--file", "in.jsonl", "--output", "no/a.jsonl"], "no/a.jsonl: there is no such folder"),
        (["--file", "in.jsonl", "--output", "a.csv"], "its name ends in .jsonl"),
        (["--file", "in.pdf", "--output", "a.jsonl"], "a file of prompts is .jsonl .txt"),
        (["--file", "in.jsonl", "--output", "a.jsonl", "--processes", "0"], "neither a number nor auto"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(jobs: Jobs, arguments: list[str], said: str) -> None:
    done = jobs.forks("generate", "model", *arguments, cwd=jobs.folder)
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) <= 3


def test_a_folder_that_cannot_be_written_is_a_typed_error(jobs: Jobs) -> None:
    sealed = jobs.folder / "sealed"
    sealed.mkdir(mode=0o555)
    arguments = ["generate", "model", "--file", "in.jsonl", "--output", "sealed/a.jsonl"]
    done = jobs.forks(*arguments, cwd=jobs.folder, fault={"unprivileged": True})
    assert done.code == 4 and "Permission denied" in done.err and len(done.err.splitlines()) <= 3
