"""`--smoke`: a toy of a recipe through every stage, on CPU, in a temporary folder: does this recipe still work?

The same recipe with model, data and steps cut: tokenize, two steps, save, stop, resume, two more, generate, evaluate.
What needs the Hub, or a file that is not here, is replaced by synthetic rows or a tiny random model, with a printed
line; whatever `launch` says, it is one process. Nothing is written outside the temporary folder but what
`$GPTCLI_CACHE` keeps of built-in corpora.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptcli.errors import CheckpointError, StoppedError, UsageError
from gptcli.launch import world_size
from gptcli.recipe.load import LoadedRecipe, load_recipe
from gptcli.reporting import Reporter
from gptcli.runs.folder import RunFolder
from gptcli.train.begin import Options
from gptcli.train.decisions import Hardware
from gptcli.train.modes import lacks
from gptcli.train.pairs import is_preference
from gptcli.train.preference_smoke import BYTES_LENGTH, preference_cuts, save_tiny
from gptcli.train.run import train
from gptcli.train.smoke_data import cut_source, data_cuts, synthetic_question
from gptcli.train.smoke_media import is_small, read_by, save_with_processor, tiny_media

NO_GPU = Hardware("cpu", fast_bf16=False, processes=1, memory_bytes=0)
VOCABULARY = 512
SEQUENCE_LENGTH = 64
# Of rows, which are not cut: in tokens of a small vocabulary.
ROW_LENGTH = 1024
MEDIA_EVALUATED = 8
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
# Fields of model.config that set a size, or go by one; the others (activation, tied embeddings, rope) stay.
_SIZES = re.compile(r"size|num_|(^|_)[nd]_|_dim|layer_types|max_position_embeddings|window|token_id")


def smoke_run(argument: str, overrides: Sequence[str], command: str, reporter: Reporter) -> dict[str, Any]:
    """Take a recipe through every stage; return what each of them gave.

    Raises:
        UsageError: this is one of several processes.
        GptcliError: the stage that does not work, as it would fail in a real run.
    """
    if (processes := world_size()) > 1:
        raise UsageError(
            f"--smoke runs in one process, and {processes} were started",
            remedy="Run it without the launcher: the recipe's launch section is left aside.",
        )
    began = time.monotonic()
    loaded = load_recipe(argument, overrides).used_by(command)
    with tempfile.TemporaryDirectory(prefix="gptcli-smoke-") as name, _on_cpu():
        folder = Path(name)
        cuts = [*overrides, *_cuts(loaded, folder, reporter)]
        toy = load_recipe(argument, cuts).used_by(command)
        if is_preference(loaded):
            tiny = save_tiny(toy, folder / "base")
            cuts += _as_overrides(preference_cuts(loaded, tiny, reporter))
            toy = load_recipe(argument, cuts).used_by(command)
        elif toy.recipe.finetune.adapter != "none":
            cuts += _as_overrides(_base_cuts(toy, folder / "base", reporter))
            toy = load_recipe(argument, cuts).used_by(command)
        reporter.say("smoke: two steps, save, stop")
        try:
            train(toy, Options(command, stop_after=2), reporter)
        except StoppedError:
            reporter.say("smoke: resume, two more steps, final")
        else:
            raise CheckpointError("smoke: training did not stop after two steps")
        result = train(toy, Options(command), reporter)
        run = RunFolder(Path(result["run"]))
        text = _generate(toy, run, reporter)
        evaluation = _evaluate(run, toy, reporter)
        if evaluation is not None:
            evaluation["model"] = None
    seconds = round(time.monotonic() - began, 1)
    reporter.say(f"smoke: {loaded.recipe.name} works ({seconds} s)")
    return {**result, "run": None, "smoke": True, "sample": text, "evaluation": evaluation, "wall_seconds": seconds}


def _base_cuts(toy: LoadedRecipe, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """The keys of a toy that begins with its tiny random model, saved in a folder, for an adapter to belong to."""
    from gptcli.model.build import TokenIds, build_config, build_model

    assert toy.recipe.model is not None and toy.recipe.model.type is not None
    if read_by(toy.recipe.model.type):  # a model that sees or hears has its tokenizer and its processor beside it
        return {"model": {"from": str(save_with_processor(toy, folder, reporter))}, "tokenizer": None}
    config, _ = build_config(toy, TokenIds(VOCABULARY, 0, 0, None))
    model: Any = build_model(toy, config, seed=toy.recipe.seed, attention=None)
    model.save_pretrained(str(folder))
    return {"model": {"from": str(folder)}}


def _generate(toy: LoadedRecipe, run: RunFolder, reporter: Reporter) -> str:
    from gptcli.generation.settings import Settings
    from gptcli.generation.text import complete
    from gptcli.model.load import load_model, load_tokenizer

    reporter.say("smoke: generate")
    prompt = next(iter(toy.recipe.generate.prompts), "the ")
    settings = Settings(max_new_tokens=8, seed=toy.recipe.seed)
    text = complete(load_model(run.final), load_tokenizer(run.final), prompt, settings)[0].text
    return prompt + text


def _evaluate(run: RunFolder, toy: LoadedRecipe, reporter: Reporter) -> dict[str, Any] | None:
    from gptcli.evaluation.corpus import from_recipe
    from gptcli.evaluation.evaluate import Options as EvaluationOptions
    from gptcli.evaluation.evaluate import evaluate
    from gptcli.evaluation.tasks import run_tasks, task_metrics

    assert toy.recipe.data is not None
    if toy.recipe.eval.tasks:
        reporter.say(f"smoke: eval.tasks are not run, they bring their own data: {', '.join(toy.recipe.eval.tasks)}")
    if is_preference(toy) or (not toy.recipe.eval.data and toy.recipe.data.validation == 0):
        return None
    reporter.say("smoke: evaluate")
    tasks = task_metrics(toy)
    done = run_tasks(run.final, from_recipe(toy), toy, reporter) if tasks else None
    if done is not None and "perplexity" not in toy.recipe.eval.metrics:
        return done.as_dict()
    found = evaluate(run.final, from_recipe(toy), EvaluationOptions(), reporter, toy).as_dict()
    return found if done is None else {**found, "metrics": done.metrics}


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Hide GPUs from torch until the end; it is asked only after this."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _cuts(loaded: LoadedRecipe, folder: Path, reporter: Reporter) -> list[str]:
    recipe = loaded.recipe
    rows = recipe.data is not None and recipe.data.format != "text"
    most = ROW_LENGTH if rows else SEQUENCE_LENGTH
    length = most if recipe.data is None else min(most, recipe.data.sequence_length)
    cuts = {
        "output_dir": str(folder / "runs"),
        "name": "smoke",
        "data.sequence_length": length,
        "train.max_steps": 4,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.log_every": 1,
        "train.eval_every": 2,
        "train.save_every": 2,
        "train.sample_every": 2,
        "train.max_time": None,
        "train.precision": "bf16" if recipe.train.precision == "bf16" else "fp32",
        "train.compile": False,
        "train.attention": "auto" if lacks(recipe.train.attention, NO_GPU) else recipe.train.attention,
        "generate.max_new_tokens": 8,
        "tracking.to": [],
        "launch": None,
    }
    if "launch" in loaded.written:
        reporter.say("smoke: one process stands in for launch")
    for key, value in (("precision", recipe.train.precision), ("attention", recipe.train.attention)):
        if lacks(value, NO_GPU) is not None:
            reporter.say(f"smoke: train.{key} {value} needs a GPU; {cuts[f'train.{key}']} stands in for it")
    if recipe.eval.data:
        cuts["eval.data"] = [
            cut_source(loaded, source, folder, f"eval-{i}", reporter, synthetic_question)
            for i, source in enumerate(recipe.eval.data)
        ]
    if recipe.data is not None and recipe.data.media:  # a text is generated for each row, three times
        cuts["eval.limit"] = min(MEDIA_EVALUATED, recipe.eval.limit or MEDIA_EVALUATED)
    cuts |= _finetune_cuts(loaded, reporter)
    cuts |= data_cuts(loaded, folder, reporter)
    if is_preference(loaded):
        assert recipe.model is not None
        cuts["data.sequence_length"] = BYTES_LENGTH
        return _as_overrides({**cuts, "model": {"type": recipe.model.smoke_type, "config": dict(TINY)}})
    return _as_overrides({**cuts, **_model_cuts(loaded, reporter)})


def _as_overrides(cuts: dict[str, Any]) -> list[str]:
    # A mapping would be merged over the recipe's, whose fields are those of a larger model.
    removed = [f"{key}=null" for key, value in cuts.items() if isinstance(value, dict)]
    return [*removed, *(f"{key}={json.dumps(value)}" for key, value in cuts.items())]


def _finetune_cuts(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    finetune, model = loaded.recipe.finetune, loaded.recipe.model
    cuts: dict[str, Any] = {}
    if finetune.adapter == "qlora":
        reporter.say("smoke: finetune.adapter qlora needs a GPU; lora stands in for it")
        cuts["finetune.adapter"] = "lora"
    # The stand-in for a model that sees or hears is one of its own kind, with the same modules.
    freeze = [] if model is not None and read_by(model.type or model.smoke_type) else finetune.freeze
    for name, value in (("adapter_from", finetune.adapter_from), ("freeze", freeze)):
        if value:
            reporter.say(f"smoke: finetune.{name} is left aside, which belongs to another model")
            cuts[f"finetune.{name}"] = None
    return cuts


def _model_cuts(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    cuts: dict[str, Any] = {}
    tokenizer, model = loaded.recipe.tokenizer, loaded.recipe.model
    if tokenizer is not None and tokenizer.train is not None:
        if tokenizer.train.algorithm != "bytes":
            cuts["tokenizer.train.vocab_size"] = min(VOCABULARY, tokenizer.train.vocab_size)
    elif tokenizer is None or not Path(tokenizer.from_ or "").exists():
        reporter.say(f"smoke: a tokenizer of {VOCABULARY} entries is trained in place of the recipe's")
        cuts["tokenizer.train"] = {"algorithm": "bpe", "vocab_size": VOCABULARY}
        if loaded.recipe.data is not None and loaded.recipe.data.format == "chat":
            cuts["tokenizer.chat_template"] = (tokenizer and tokenizer.chat_template) or "chatml"
    if model is None or model.from_ is not None:
        smoke_type = "llama" if model is None else model.smoke_type
        replaced = "the model to evaluate" if model is None else str(model.from_)
        reporter.say(f"smoke: a tiny random {smoke_type} stands in for {replaced}")
        cuts["model"] = tiny_media(smoke_type) if read_by(smoke_type) else {"type": smoke_type, "config": dict(TINY)}
        return cuts
    assert model.type is not None
    media = bool(read_by(model.type))
    if media and is_small(loaded, VOCABULARY):
        return cuts
    cuts["model.preset"] = tiny_media(model.type)["preset"] if media else None
    cuts["model.config"] = {**_kept(model.config or {}), **({} if media else TINY)} or None
    return cuts


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, and of those inside it, that set no size."""
    parts = {key: _kept(value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {key: parts.get(key, value) for key, value in config.items() if not _SIZES.search(key)}
