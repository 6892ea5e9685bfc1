"""`gptcli plan` for machines that are not here: batches, memory a strategy, time; nothing is timed on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("plan"))


def test_eight_of_a_card_that_is_not_here(run_cli: Cli, project: Path, tmp_path: Path) -> None:
    arguments = ("plan", "tiny.yaml", "train.global_batch_size=16", "--processes", "8", "--device", "h100")
    done = run_cli(*arguments, "--json", cwd=project, GPTCLI_CACHE=str(tmp_path))
    assert done.code == 0, done.err
    found = done.json()
    assert (found["device"], found["device_memory_bytes"], found["precision"]) == ("H100", 80 * 10**9, "bf16")
    assert found["processes"] * found["micro_batch_size"] * found["gradient_accumulation_steps"] == 16
    assert found["strategy"] == "ddp" and "launch.strategy" in {d["key"] for d in found["decisions"]}
    assert set(found["strategies"]) == {"ddp", "fsdp", "zero1", "zero2", "zero3"}
    for each in found["strategies"].values():
        assert each["memory_bytes"] == sum(each["memory"].values()) and each["fits"]
    assert found["strategies"]["ddp"]["memory"] == found["memory"]
    assert found["estimated_seconds"] > 0
    assert not (tmp_path / "choices").exists(), "something was timed here"
    shown = run_cli(*arguments, cwd=project)
    assert "8 x H100, bf16" in shown.out and "ddp (chosen)" in shown.out


def test_two_machines_take_half_the_time_of_one(run_cli: Cli, project: Path) -> None:
    one, two = (
        run_cli("plan", "tiny.yaml", "--device", "l4", "--processes", "2", "--nodes", nodes, "--json", cwd=project)
        for nodes in ("1", "2")
    )
    assert (one.json()["world_size"], two.json()["world_size"]) == (2, 4)
    assert two.json()["estimated_seconds"] == pytest.approx(one.json()["estimated_seconds"] / 2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--device", "h1000"), "h100"),
        (("--device", "rtx4090"), "rtx-4090"),
        (("--device", "nothing-like-it"), "a100-80gb"),
        (("--device", "h100", "--processes", "3"), "nearest"),
        (("--device", "h100", "--processes", "2", "launch.parallel={tp: 4}"), "4 and 8"),
    ],
)
def test_what_cannot_be_is_a_usage_error(run_cli: Cli, project: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run_cli("plan", "tiny.yaml", *arguments, cwd=project)
    assert done.code == 2
    assert said in done.err


def test_without_options_it_is_the_recipes_processes_on_this_machine(run_cli: Cli, project: Path) -> None:
    plain = run_cli("plan", "tiny.yaml", "train.precision=fp32", "--json", cwd=project).json()
    assert list(plain["strategies"]) == [plain["sharing"]]
    several = run_cli(
        "plan", "tiny.yaml", "train.precision=fp32", "launch.processes=2", "--device", "cpu", "--json", cwd=project
    ).json()
    assert (several["world_size"], several["kind"]) == (2, "cpu")
