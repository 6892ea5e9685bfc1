from __future__ import annotations

from pathlib import Path

from tests.conftest import Cli


def test_overlap_needs_no_model_and_names_the_documents(project: Path, run_cli: Cli) -> None:
    paragraphs = (project / "text.txt").read_text().split("\n\n")
    asked = "\n\n".join(["Too short.", paragraphs[3].upper(), "nothing of this is there " * 5])
    (project / "asked.txt").write_text(asked)
    arguments = ["eval", "--check-overlap", "tiny.yaml", "data.validation=0", "--data", "asked.txt"]
    arguments += ["--documents", "blank-line"]
    found = run_cli(*arguments, "--json", cwd=project).json()
    assert (found["documents"], found["short"], found["overlapping"], found["share"]) == (3, 1, 1, 0.5)
    assert [each["where"] for each in found["worst"]] == ["asked.txt:3"]
    shown = run_cli(*arguments, cwd=project)
    assert "1 (50.00% of those judged)" in shown.out and "asked.txt:3" in shown.out


def test_overlap_with_a_model_is_a_mistake(project: Path, run_cli: Cli) -> None:
    done = run_cli("eval", "some-run", "--check-overlap", "tiny.yaml", cwd=project)
    assert done.code == 2 and "takes no model" in done.err
