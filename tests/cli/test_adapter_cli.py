"""`gptcli finetune` with an adapter: small checkpoints, an exact resume, a `final/` that every command takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcli.train.checkpoint import verify
from tests.conftest import make_project
from tests.runs import Forks, lines
from tests.tiny import save_model

pytest.importorskip("peft", reason="needs the package peft: pip install 'gptcli[adapters]'")

RECIPE = """\
name: tuned
data:
  train: {path: text.txt, documents: blank-line}
  validation: {tail: 10%}
  sequence_length: 32
model: {from: base}
finetune: {adapter: lora, lora: {r: 4, alpha: 8, dropout: 0.1}}
train: {max_steps: 4, global_batch_size: 4, learning_rate: 1e-2, log_every: 1, eval_every: 2, save_every: 2,
        sample_every: 2, precision: fp32}
generate: {prompts: ["The "], max_new_tokens: 8}
"""
GREEDY = ("--prompt", "The model ", "--greedy", "--max-new-tokens", "12", "--quiet")
WITHOUT_PEFT = """
import sys
sys.modules["peft"] = sys.modules["gptcli"] = None  # as if they were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = model.generate(**tokenizer("The model ", return_tensors="pt"), do_sample=False, max_new_tokens=12)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A project with a base and a finished run of an adapter on it."""
    folder = make_project(tmp_path_factory.mktemp("tuned"))
    save_model(folder / "base")
    (folder / "ft.yaml").write_text(RECIPE)
    done = forks("finetune", "ft.yaml", cwd=folder)
    assert done.code == 0, done.err
    assert "trained: 4,352 parameters" in done.out and "lora, r 4, alpha 8" in done.out
    return folder


def copy(here: Path, folder: Path) -> Path:
    return Path(shutil.copytree(here, folder, dirs_exist_ok=True))


def same_adapter(one: Path, other: Path) -> None:
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_is_the_adapter_and_the_state_of_training(here: Path) -> None:
    run = here / "runs" / "tuned"
    for step in (2, 4):
        folder = run / f"checkpoint-{step}"
        assert verify(folder) is None
        assert not list(folder.glob("model*.safetensors")) and not (folder / "config.json").exists()
        assert (folder / "adapter_model.safetensors").stat().st_size < 4 * 4352 + 8192
        assert (folder / "optimizer.pt").stat().st_size < 8 * 4352 + 32768
    assert json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        here / "base"
    )
    card = (run / "final" / "README.md").read_text()
    assert f"| base | {here / 'base'} |" in card and "PeftModel" in card
    plan = json.loads((run / "run.json").read_text())["plan"]
    assert plan["trained_parameters"] == 4352 and plan["checkpoint_bytes"] == 12 * 4352


def test_final_generates_is_evaluated_and_merges(here: Path, forks: Forks, tmp_path: Path) -> None:
    folder = copy(here, tmp_path)
    merged = forks("export", "tuned", "--merge", "--output", "merged", cwd=folder)
    assert merged.code == 0, merged.err
    texts = [forks("generate", name, *GREEDY, cwd=folder).out for name in ("tuned", "merged", "base")]
    assert texts[0] == texts[1] != texts[2]
    (folder / "runs" / "tuned" / "final").rename(folder / "alone")  # a run has a length of rows of its own
    scored = forks("eval", "alone", "merged", "--data", "text.txt", "--json", cwd=folder)
    adapter, whole = (result["loss"] for result in json.loads(scored.out))
    assert adapter == pytest.approx(whole, rel=1e-5)


def test_merge_makes_a_final_that_loads_where_there_is_no_peft(here: Path, forks: Forks, tmp_path: Path) -> None:
    folder = copy(here, tmp_path)
    unmerged = forks("generate", "tuned", *GREEDY, cwd=folder).out
    done = forks("finetune", "ft.yaml", "--merge", cwd=folder)  # the run is finished but for that
    assert done.code == 0, done.err
    final = folder / "runs" / "tuned" / "final"
    same_adapter(final / "adapter", folder / "runs" / "tuned" / "checkpoint-4")
    plain = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, str(final)], capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == unmerged.strip()
    assert forks("generate", "tuned", *GREEDY, cwd=folder).out == unmerged
    assert "is finished" in forks("finetune", "ft.yaml", "--merge", cwd=folder).out


def test_a_stopped_run_goes_on_to_the_last_bit(here: Path, forks: Forks, tmp_path: Path) -> None:
    folder = copy(here, tmp_path)
    run = folder / "runs" / "tuned"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")
    done = forks("finetune", "ft.yaml", cwd=folder)
    assert done.code == 0 and "resuming tuned from checkpoint-2" in done.out, done.err
    same_adapter(run / "final", here / "runs" / "tuned" / "final")
    assert lines(run) == lines(here / "runs" / "tuned")
    assert lines(run, "samples.jsonl") == lines(here / "runs" / "tuned", "samples.jsonl")


def test_a_base_that_was_changed_ends_a_run_and_one_that_was_moved_does_not(
    here: Path, forks: Forks, tmp_path: Path
) -> None:
    folder = copy(here, tmp_path)
    (folder / "base").rename(folder / "moved")
    shutil.rmtree(folder / "runs" / "tuned" / "checkpoint-4")
    moved = forks("finetune", "ft.yaml", "model.from=moved", cwd=folder)
    assert moved.code == 0 and "changed since: model.from" in moved.out, moved.err
    shutil.rmtree(folder / "runs" / "tuned" / "checkpoint-4")
    weights = load_file(folder / "moved" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "moved" / "model.safetensors", metadata={"format": "pt"})
    changed = forks("finetune", "ft.yaml", "model.from=moved", cwd=folder)
    assert changed.code == 4 and "its weights are others" in changed.err, changed.err
    went_on = ("finetune.adapter_from=runs/tuned/final", "finetune.lora=null", "name=more", "model.from=moved")
    other = forks("finetune", "ft.yaml", *went_on, cwd=folder)
    assert other.code == 2 and "finetune.adapter_from: the adapter was trained on" in other.err, other.err


def test_an_adapter_goes_on_in_another_run(here: Path, forks: Forks, tmp_path: Path) -> None:
    folder = copy(here, tmp_path)
    went_on = ("finetune.adapter_from=runs/tuned/final", "finetune.lora=null", "name=more")
    done = forks("finetune", "ft.yaml", *went_on, "train.eval_at_start=true", cwd=folder)
    assert done.code == 0, done.err
    first = next(line["validation"]["loss"] for line in lines(folder / "runs" / "more") if "validation" in line)
    last = [line["validation"]["loss"] for line in lines(here / "runs" / "tuned") if "validation" in line][-1]
    assert first == pytest.approx(last, rel=1e-6)
    resolved = forks("finetune", "runs/more/resolved.yaml", "name=again", cwd=folder)
    assert resolved.code == 0, resolved.err
    same_adapter(folder / "runs" / "again" / "final", folder / "runs" / "more" / "final")


def test_tokens_of_a_chat_template_are_added_and_trained(here: Path, forks: Forks, tmp_path: Path) -> None:
    folder = copy(here, tmp_path)
    chat = ("tokenizer={from: base, chat_template: chatml}", "name=chat", "train.max_steps=2")
    done = forks("finetune", "ft.yaml", *chat, cwd=folder)
    assert done.code == 0 and "tokens are new to it (<|im_start|>, <|im_end|>)" in done.out, done.err
    final = folder / "runs" / "chat" / "final"
    rows = [name for name in load_file(final / "adapter_model.safetensors") if "trainable_tokens_delta" in name]
    assert len(rows) == 2, "of the embeddings and of the output layer"
    merged = forks("finetune", "ft.yaml", *chat, "--merge", cwd=folder)
    assert merged.code == 0, merged.err
    assert json.loads((final / "config.json").read_text())["vocab_size"] > 300 - 2
    assert forks("generate", "chat", *GREEDY, cwd=folder).code == 0


def test_pretrain_leaves_the_section_aside_and_plan_does_not(here: Path, forks: Forks, tmp_path: Path) -> None:
    folder = copy(here, tmp_path)
    planned = forks("plan", "ft.yaml", "--json", cwd=folder)
    assert json.loads(planned.out)["trained_parameters"] == 4352
    shown = forks("plan", "ft.yaml", cwd=folder)
    assert "4,352 parameters (" in shown.out
    done = forks("pretrain", "ft.yaml", "name=whole", "train.max_steps=1", cwd=folder)
    assert done.code == 0 and "finetune: left aside" in done.out, done.err
    assert (folder / "runs" / "whole" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (("finetune.adapter=qlora",), 7, "finetune.adapter: qlora needs "),
        (("finetune.adapter=none", "finetune.merge=true"), 2, "merge needs an adapter"),
        (("finetune.adapter_from=nowhere", "finetune.lora=null"), 7, "no adapter"),
        (("finetune.adapter_from=nowhere",), 2, "lora is that of adapter_from"),
        (("finetune.freeze=[vision_tower]",), 2, "no module vision_tower"),
        (("tokenizer={train: {algorithm: bytes}}",), 2, "ids of both mean other texts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    overrides: tuple[str, ...], code: int, said: str, here: Path, forks: Forks
) -> None:
    done = forks("finetune", "ft.yaml", "name=refused", *overrides, cwd=here)
    assert done.code == code and said in done.err, done.err
    assert not (here / "runs" / "refused").exists()


@pytest.mark.slow_fault
def test_smoke_takes_an_adapter_through_every_stage(here: Path, forks: Forks) -> None:
    done = forks("finetune", "ft.yaml", "--smoke", "finetune.adapter=dora", cwd=here)
    assert done.code == 0 and "works" in done.out, done.err


@pytest.mark.slow_fault
def test_two_processes_train_the_adapter_that_one_does(here: Path, forks: Forks) -> None:
    same = ("ft.yaml", "finetune.lora.dropout=0", "train.sample_every=0")
    for name, count in (("one", 1), ("two", 2)):
        done = forks("finetune", *same, f"name={name}", f"launch.processes={count}", cwd=here)
        assert done.code == 0, done.err
    one, two = (load_file(here / "runs" / name / "final" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=1e-5)
    for strategy in ("launch.strategy=fsdp", "launch.parallel.tp=2", "launch.parallel.cp=2"):
        done = forks("finetune", *same, "name=divided", "launch.processes=2", strategy, cwd=here)
        assert done.code == 2 and "finetune.adapter: lora is not known to work with launch" in done.err, done.err
