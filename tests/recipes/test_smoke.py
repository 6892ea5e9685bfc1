"""Every recipe that ships works: `make test` smokes one of each folder, `make recipes` all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.smoke import TINY, _model_cuts
from tests.conftest import REPOSITORY, Cli

RECIPES = REPOSITORY / "recipes"
COMMANDS = {"finetune": "finetune", "eval": "eval"}


def all_recipes() -> list[str]:
    names = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
    return [name for name in names if Path(name).parts[0] != "cluster"]  # files for schedulers: test_cluster.py


def one_of_each_folder() -> list[str]:
    return sorted({Path(name).parent: name for name in reversed(all_recipes())}.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-recipes")
        metafunc.parametrize("recipe", all_recipes() if every else one_of_each_folder())


def test_a_recipe_passes_smoke_and_leaves_nothing_behind(recipe: str, tmp_path: Path, run_cli: Cli) -> None:
    loaded = load_recipe(str(RECIPES / f"{recipe}.yaml")).recipe
    command = COMMANDS.get(Path(recipe).parts[0]) or ("finetune" if loaded.model and loaded.model.from_ else "pretrain")
    if Path(recipe).parts[0] == "multimodal":
        for package in ("PIL", "soundfile", "soxr"):
            pytest.importorskip(package, reason="pictures and sounds need the extra multimodal")
    if loaded.finetune.method != "sft":
        pytest.importorskip("trl", reason="preference tuning needs the extra rl")
    done = run_cli(command, recipe, "--smoke", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    result = done.json()
    assert result["status"] == "done"
    assert result["step"] == 4
    if (evaluation := result["evaluation"]) is not None:
        assert evaluation["metrics"] if evaluation["loss"] is None else evaluation["loss"] > 0
    assert list(tmp_path.iterdir()) == []


def test_every_recipe_is_headed_by_its_command_and_hardware() -> None:
    for name in all_recipes():
        head = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
        assert "gptcli " in head, name
        assert "Hardware:" in head, name


def test_smoke_replaces_what_needs_the_hub_and_says_so(tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "hub.yaml").write_text(
        "data: {train: {path: 'hub:some/set', text: content}, sequence_length: 32}\n"
        "model: {from: some/model, smoke_type: gpt2}\n"
        "train: {epochs: 1}\n"
    )
    done = run_cli("finetune", "hub.yaml", "--smoke", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "hub:some/set" in done.out
    assert "tiny random gpt2 stands in for some/model" in done.out
    assert not (tmp_path / "runs").exists()


LARGE = """\
data: {train: text.txt, validation: {tail: 10%}, sequence_length: 64}
tokenizer: {train: {algorithm: bytes}}
model: {type: TYPE, config: CONFIG}
train: {max_steps: 100, global_batch_size: 512}
"""
CLUSTER = "launch: {processes: 8, nodes: 4, strategy: fsdp, rendezvous: 'head:29500', parallel: {tp: 2}}\n"
SIZES = {
    "llama": "{num_hidden_layers: 24, hidden_size: 2048, num_attention_heads: 32, num_key_value_heads: 8, "
    "intermediate_size: 5632, head_dim: 64, hidden_act: gelu, pad_token_id: 50000}",
    "gpt2": "{n_layer: 24, n_embd: 2048, n_head: 32, n_inner: 8192, activation_function: relu}",
}


@pytest.mark.parametrize("kind", SIZES)
def test_smoke_cuts_all_sizes_of_a_model_and_runs_in_one_process(kind: str, project: Path, run_cli: Cli) -> None:
    (project / "large.yaml").write_text(LARGE.replace("TYPE", kind).replace("CONFIG", SIZES[kind]) + CLUSTER)
    done = run_cli("pretrain", "large.yaml", "model.config.hidden_size=1024", "--smoke", cwd=project)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "one process stands in for launch" in done.out


def test_smoke_keeps_what_is_no_size() -> None:
    sizes = load_recipe("quickstart", ["model.preset=null", f"model.config={SIZES['llama']}"])
    assert _model_cuts(sizes, Silent())["model.config"] == {**TINY, "hidden_act": "gelu", "tie_word_embeddings": True}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_smoke_of_one_of_several_processes_is_refused(rank: str, project: Path, run_cli: Cli) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    done = run_cli("pretrain", "tiny.yaml", "--smoke", cwd=project, **group)
    assert done.code == 2
    assert "--smoke runs in one process, and 2 were started" in done.err
