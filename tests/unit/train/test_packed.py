"""Training on rows of documents: the same losses and gradients as on each document alone, packed or padded."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptcli.data.packed import PackedRows
from gptcli.errors import RecipeError
from gptcli.model.attention import attend_in_blocks
from gptcli.model.isolation import check, mixes
from gptcli.model.kernels import attend_without_mask
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent
from gptcli.train.begin import Options
from gptcli.train.loss import IGNORED, TrainingLoss
from gptcli.train.rows import FILLER, RunRows, inputs_and_labels, label_count
from gptcli.train.run import train
from tests.tiny import make_model
from tests.unit.data.test_packing import LENGTH, Documents, index_of, make_documents, write

CPU = torch.device("cpu")
KERNELS = {"eager": None, "sdpa": None, "without-mask": attend_without_mask, "blocks": attend_in_blocks}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def documents() -> Documents:
    return make_documents(14, 5, longest=LENGTH + 1)


@pytest.fixture(scope="module")
def rows(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedRows]:
    shards = write(tmp_path_factory.mktemp("shards"), [documents])
    return {
        name: PackedRows(shards, index_of(shards, name), seed=7, shuffle=True, batch=4) for name in ("isolated", "none")
    }


def model_with(kind: str, kernel: str, **fields: Any) -> Any:
    change = KERNELS[kernel]
    model = make_model(kind, attn_implementation=kernel if change is None else "sdpa", **fields)
    assert change is None or change(model)
    model.config.use_cache = False  # as the Trainer has it
    return model  # in evaluation mode: no dropout


def alone(model: Any, documents: Documents) -> dict[int, torch.Tensor]:
    """The loss of every supervised token, by its id (no token is there twice), each document by itself."""
    found = {}
    for ids, marks in documents:
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        for place, (token, mark) in enumerate(zip(ids[1:], marks[1:], strict=True)):
            if mark:
                found[token] = torch.nn.functional.cross_entropy(logits[place].float(), torch.tensor(token))
    return found


def gradient(model: Any, objective: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    objective.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packing", ["isolated", "none"])
@pytest.mark.parametrize(
    ("kind", "kernel", "fields"),
    [
        ("llama", "eager", {}),
        ("llama", "sdpa", {}),
        ("llama", "without-mask", {}),
        ("llama", "blocks", {}),
        ("gpt2", "eager", {}),
        ("gpt2", "without-mask", {}),
        ("qwen3", "sdpa", {}),
        ("mistral", "sdpa", {"sliding_window": 4}),
        ("mixtral", "sdpa", {}),
    ],
)
def test_packed_padded_and_single_documents_have_the_same_losses_and_gradient(
    kind: str, kernel: str, fields: dict[str, Any], packing: str, rows: dict[str, PackedRows], documents: Documents
) -> None:
    model = model_with(kind, kernel, **fields)
    inputs = inputs_and_labels(torch.from_numpy(rows[packing].batch(np.arange(rows[packing].rows_per_epoch))), CPU)
    labels = inputs.pop("labels")
    expected = alone(model, documents)
    whole = model(**inputs).logits
    known = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(whole[known], labels[known], reduction="none")
    for token, loss in zip(labels[known].tolist(), losses, strict=True):
        assert abs(float((loss - expected.pop(token)).detach())) < 1e-5
    assert not expected
    wanted = gradient(model, torch.stack(list(alone(model, documents).values())).sum())
    for block in (None, 8):
        training = TrainingLoss(model, block=block, z_loss=0.0)
        found = gradient(model, training(model, inputs, labels)[2])
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_rows_as_one_long_row_are_the_same(rows: dict[str, PackedRows]) -> None:
    model = model_with("llama", "sdpa")
    batch = torch.from_numpy(rows["isolated"].batch(np.arange(4)))
    nats = []
    for flat in (False, True):
        inputs = inputs_and_labels(batch, CPU, flat=flat)
        labels = inputs.pop("labels")
        assert labels.shape == ((1, 4 * LENGTH) if flat else (4, LENGTH))
        nats.append(float(TrainingLoss(model, block=None, z_loss=0.0)(model, inputs, labels)[1]))
    assert nats[0] == pytest.approx(nats[1], rel=1e-6)
    check(model, flat=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "mixtral"])
def test_attention_keeps_documents_apart_in_every_kernel(kind: str) -> None:
    for kernel in KERNELS:
        assert mixes(model_with(kind, kernel)) is None, kernel


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("mamba", {}), ("bloom", {}), ("mpt", {}), ("jamba", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})],
)
def test_a_model_that_mixes_documents_is_refused_by_what_it_does(kind: str, fields: dict[str, Any]) -> None:
    model = make_model(kind, **fields)
    before = model.config.use_cache
    with pytest.raises(RecipeError) as caught:
        check(model)
    assert f"{type(model).__name__} mixes them" in caught.value.what
    assert "data.packing: none" in str(caught.value.remedy)
    assert model.config.use_cache is before and not model.training


def test_a_filler_is_a_batch_like_the_others_without_labels(rows: dict[str, PackedRows]) -> None:
    for packing, width in (("isolated", 3), ("none", 2)):
        plan: Any = type("Plan", (), {"global_batch_size": 4, "total_rows": 8})
        filler = RunRows(rows[packing], plan).__getitems__([FILLER])
        assert filler.shape[:2] == (1, width) and label_count(filler) == 0
        inputs = inputs_and_labels(filler, CPU)
        labels = inputs.pop("labels")
        assert (labels == IGNORED).all() and all((values == 0).all() for values in inputs.values())
        model = model_with("llama", "sdpa")
        _, nats, objective = TrainingLoss(model, block=None, z_loss=0.0)(model, inputs, labels)
        assert float(nats) == 0.0 and float(gradient(model, objective).norm()) == 0.0


# ---- whole runs ----

RECIPE = """\
name: rows
tokenizer: {train: {algorithm: bytes}}
data:
  train: pairs.jsonl
  format: prompt
  prompt: "{q}="
  completion: "{a}"
  validation: 10%
  sequence_length: 24
  packing: PACKING
model: {type: llama, config: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}}
train:
  epochs: 1.5
  global_batch_size: 8
  micro_batch_size: 8
  learning_rate: 3e-3
  precision: fp32
  log_every: 1
  eval_every: 5
  save_every: 5
  sample_every: 0
"""


def project(folder: Path, packing: str) -> Path:
    """A folder with a recipe over questions and answers of many lengths."""
    random = np.random.RandomState(0)
    pairs = []
    for number in range(120):
        letters = "".join("abcdef"[i] for i in random.randint(0, 6, random.randint(1, 9)))
        pairs.append({"q": f"{number} {letters}", "a": letters[::-1][: random.randint(1, 9)]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "r.yaml").write_text(RECIPE.replace("PACKING", packing))
    return folder


def run(folder: Path, name: str, *overrides: str, stop_after: int | None = None) -> Path:
    loaded = load_recipe(str(folder / "r.yaml"), [f"output_dir={folder}/runs", f"name={name}", *overrides])
    train(loaded, Options("finetune", stop_after=stop_after), Silent())
    return folder / "runs" / name


def lines(run_folder: Path, kind: str = "loss") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


@pytest.fixture(scope="module", params=["isolated", "none"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one micro-batch a step, that was never stopped."""
    torch.set_num_threads(1)
    return run(project(tmp_path_factory.mktemp(request.param), request.param), "whole")


def assert_close(one: Path, other: Path) -> None:
    for kind in ("loss", "validation"):
        mine, theirs = lines(one, kind), lines(other, kind)
        assert [line["step"] for line in mine] == [line["step"] for line in theirs] and mine
        for left, right in zip(mine, theirs, strict=True):
            if kind == "loss":
                assert left["tokens"] == right["tokens"]
                assert left["loss"] == pytest.approx(right["loss"], abs=2e-5)
                assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
            else:
                assert left["validation"]["loss"] == pytest.approx(right["validation"]["loss"], abs=2e-5)
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)


def test_eight_rows_at_once_and_one_eight_times_are_the_same_step(whole: Path) -> None:
    # Steps of rows with unlike numbers of labels: their mean is over tokens, not over micro-batches.
    assert_close(run(whole.parent.parent, "ones", "train.micro_batch_size=1"), whole)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole: Path) -> None:
    from gptcli.errors import StoppedError

    folder = whole.parent.parent
    with pytest.raises(StoppedError):
        run(folder, "stopped", "train.neftune_noise_alpha=5", stop_after=7)
    stopped = run(folder, "stopped", "train.neftune_noise_alpha=5")
    noisy = run(folder, "noisy", "train.neftune_noise_alpha=5")
    times = ("seconds", "tokens_per_second", "mfu", "memory")
    assert [{k: v for k, v in line.items() if k not in times} for line in lines(stopped, "step")] == [
        {k: v for k, v in line.items() if k not in times} for line in lines(noisy, "step")
    ]
    weights, others = (load_file(path / "final" / "model.safetensors") for path in (stopped, noisy))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert lines(noisy)[0]["loss"] != lines(whole)[0]["loss"]  # the noise is there


def test_the_logged_loss_is_that_of_completions_and_tokens_are_inputs(whole: Path) -> None:
    from gptcli.data.tokenize import prepare

    folder = whole.parent.parent
    still = run(
        folder, "still", "train.learning_rate=1e-30", "train.weight_decay=0", "train.max_steps=3", "train.epochs=null"
    )
    loaded = load_recipe(str(folder / "r.yaml"), [])
    prepared = prepare(loaded, Silent())
    assert prepared.index is not None and prepared.validation is not None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(still / "final")

    def plain(ks: list[int], of: PackedRows) -> tuple[float, int, int]:
        """Nats, labels and inputs of rows, each document by itself."""
        nats, labels, inputs = 0.0, 0, 0
        stream = of.shards.streams[0]
        numbers = of._order.places(np.array(ks))[1]
        index = of.index.sources[0]
        for number in numbers:
            for piece in range(index.offsets[number], index.offsets[number + 1]):
                begin, end = index.begins[piece], index.begins[piece] + index.lengths[piece]
                ids = torch.from_numpy(stream.read(begin, end).astype(np.int64))
                marks = torch.from_numpy(stream.read_supervised(begin, end))[1:]
                logits = model(input_ids=ids[None, :-1]).logits[0]
                nats += float(torch.nn.functional.cross_entropy(logits[marks], ids[1:][marks], reduction="sum"))
                labels, inputs = labels + int(marks.sum()), inputs + len(ids) - 1
        return nats, labels, inputs

    with torch.no_grad():
        rows = PackedRows.of(prepared.train, prepared.index, loaded.recipe, 8)
        inputs = 0
        for step, line in enumerate(lines(still)):
            nats, labels, more = plain(list(range(step * 8, step * 8 + 8)), rows)
            inputs += more
            assert line["loss"] == pytest.approx(nats / labels, abs=1e-4)
            assert line["tokens"] == inputs
        nats, scored = 0.0, 0
        stream, offsets = prepared.validation.streams[0], prepared.validation.document_offsets(0)
        for begin, end in pairwise(offsets):
            assert end - begin <= 25
            ids = torch.from_numpy(stream.read(begin, end).astype(np.int64))
            marks = torch.from_numpy(stream.read_supervised(begin, end))[1:]
            logits = model(input_ids=ids[None, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits[marks], ids[1:][marks], reduction="sum"))
            scored += int(marks.sum())
    found = lines(still, "validation")[-1]["validation"]
    assert found["tokens"] == scored and found["bits_per_byte"] is None
    assert found["loss"] == pytest.approx(nats / scored, abs=1e-4)


def test_eval_scores_held_out_rows_as_training_does(whole: Path) -> None:
    from gptcli.evaluation.corpus import from_recipe
    from gptcli.evaluation.evaluate import Options as Windows
    from gptcli.evaluation.evaluate import evaluate

    loaded = load_recipe(str(whole / "resolved.yaml"), [])
    found = evaluate(whole / "final", from_recipe(loaded), Windows(), Silent(), loaded).as_dict()
    expected = lines(whole, "validation")[-1]["validation"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert (found["tokens"], found["bits_per_byte"]) == (expected["tokens"], None)
    one = evaluate(whole / "final", from_recipe(loaded, limit=1), Windows(), Silent(), loaded).as_dict()
    assert one["documents"] == 1


def test_train_on_all_learns_prompts_too(whole: Path) -> None:
    folder = whole.parent.parent
    every = run(folder, "all", "finetune.train_on=all", "train.max_steps=1", "train.epochs=null")
    completions = run(folder, "some", "train.max_steps=1", "train.epochs=null")
    tokens = [lines(path, "validation")[-1]["validation"]["tokens"] for path in (every, completions)]
    assert tokens[0] > 1.5 * tokens[1]
    assert lines(every)[0]["loss"] != lines(completions)[0]["loss"]


def test_what_rows_of_documents_do_not_go_with_is_refused(tmp_path: Path) -> None:
    folder = project(tmp_path, "none")
    with pytest.raises(RecipeError, match="compiles for one length"):
        run(folder, "x", "train.compile=true")
    with pytest.raises(RecipeError, match="concat learns every token"):
        run(folder, "x", "data.packing=concat")
    with pytest.raises(RecipeError, match="is not known where a part"):
        run(folder, "x", "train.early_stopping_patience=1", "train.best_metric=validation.bits_per_byte")
    with pytest.raises(RecipeError, match="MambaForCausalLM mixes them"):
        mamba = (
            "model=null",
            "model.type=mamba",
            "model.config={num_hidden_layers: 1, hidden_size: 16, state_size: 4}",
        )
        run(folder, "y", *mamba, "data.packing=isolated")
    assert not (folder / "runs" / "x").exists()
