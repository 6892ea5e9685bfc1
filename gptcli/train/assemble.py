"""What is known before the first step: data, configuration, device, plan. Nothing is written and nothing trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.media.reader import open_reader
from gptcli.data.packed import PackedRows, Rows, padding, training_rows
from gptcli.data.report import mixing_text
from gptcli.data.tokenize import Prepared, prepare
from gptcli.device import best_device, c_compiler, capability, device_name, total_memory
from gptcli.errors import RecipeError
from gptcli.files import fingerprint
from gptcli.launch import world_size
from gptcli.model.adapt import freeze, put_adapter
from gptcli.model.media import media_model, media_token_ids, tower_values
from gptcli.model.towers import check_features, frozen_tower
from gptcli.recipe.load import LoadedRecipe, resolved
from gptcli.reporting import Reporter
from gptcli.runs.folder import RunFolder
from gptcli.train.arguments import check_trl, workers_of
from gptcli.train.choices import SHORT_FLOPS, choose_bf16
from gptcli.train.decisions import Hardware
from gptcli.train.modes import BLOCKS, check_modes
from gptcli.train.pairs import PreparedPairs, is_preference, prepare_pairs
from gptcli.train.plan import Plan, make_plan, without_compiler
from gptcli.train.preference_plan import NAMES, plan_preference, preference_fingerprints
from gptcli.train.shortage import explained, out_of_memory
from gptcli.train.strategy import check_finetune, check_quantized, check_strategy
from gptcli.train.vocabulary import vocabulary_of
from gptcli.train.zero_settings import check_zero

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from gptcli.evaluation.tasks import Task
    from gptcli.model.build import Counts

# Rows whose media are counted, for the estimate of memory.
MEDIA_ROWS = 64


@dataclass(frozen=True)
class Assembly:
    """What is known before the first step.

    Attributes:
        uncompiled: the plan for a compiler that fails; None without compiling.
        new_tokens: ids that `model.from` was not trained on.
        task: what evaluations measure beside the loss; None where that is nothing.
    """

    loaded: LoadedRecipe
    prepared: Prepared | PreparedPairs
    rows: Rows | None
    config: PreTrainedConfig
    counts: Counts
    plan: Plan
    uncompiled: Plan | None
    device: torch.device
    run: RunFolder
    fingerprints: dict[str, str]
    new_tokens: tuple[int, ...] = ()
    task: Task | None = None

    @property
    def has_media(self) -> bool:
        """Whether rows hold images or sounds."""
        return self.rows is not None and self.rows.shards.has_media


def assemble(
    loaded: LoadedRecipe,
    run: RunFolder,
    reporter: Reporter,
    *,
    decided: Mapping[str, str] | None = None,
    verify: bool | None = None,
    hardware: Hardware | None = None,
) -> Assembly:
    """Data, configuration, device and plan of a recipe.

    Args:
        loaded: the recipe.
        run: its run's folder.
        reporter: where to say what is done.
        decided: see `make_plan`.
        verify: see `prepare`.
        hardware: what to plan for; None: this machine. Only on this machine is anything timed.
    """
    import torch

    from gptcli.model.build import count_parameters
    from gptcli.model.kernels import usable_attention

    prepared: Prepared | PreparedPairs
    rows: Rows | None = None
    media = False
    if is_preference(loaded):
        check_trl(loaded)
        prepared = prepare_pairs(loaded, reporter)
    else:
        prepared = prepare(loaded, reporter, verify=verify, media=media_model(loaded))
        media = prepared.train.has_media
        check_features(loaded, media=media)
        _check_metric(loaded, prepared)
        rows = training_rows(prepared.train, prepared.index, loaded.recipe, _batch(loaded))
    config, new_tokens = model_config(loaded, prepared, reporter)
    device = torch.device("cpu") if hardware is not None and hardware.kind == "cpu" else best_device()
    hardware, usable = hardware or look_at(device), usable_attention(config)
    check_quantized(loaded, hardware)
    counts = count_parameters(config, partial(set_trained, loaded=loaded, new_tokens=new_tokens))
    if loaded.recipe.finetune.adapter == "qlora":
        counts = replace(counts, quantized=counts.frozen_hidden)
    if media:
        counts = replace(counts, towers=_towers(loaded, config, rows))

    def planned(recipe: LoadedRecipe, hardware: Hardware) -> Plan:
        if isinstance(prepared, PreparedPairs):
            return plan_preference(recipe, prepared, counts, hardware=hardware, decided=decided, usable=usable)
        assert rows is not None
        about: dict[str, Any] = {"rows_per_epoch": rows.rows_per_epoch}
        if isinstance(rows, PackedRows):
            about |= {"tokens_per_epoch": rows.index.tokens, "padding": partial(padding, rows)}
        if media and open_reader(prepared.tokenizer).crossed:
            about["alone"] = "images are attended to beside the text, where those of other rows would be mixed in"
        return make_plan(recipe, counts, hardware, decided=decided, usable=usable, **about)

    plan = planned(loaded, hardware=hardware)
    if hardware.here and loaded.recipe.train.precision == "auto" and "train.precision" not in (decided or {}):
        batch = {"rows": plan.micro_batch_size, "length": plan.sequence_length}
        what = "out of memory while the model was timed in fp32 and bf16"
        with explained(partial(out_of_memory, what, loaded, config, counts, plan, device)):
            short = plan.total_flops < SHORT_FLOPS
            fast, reason = choose_bf16(loaded, config, device, **batch, halves=plan.halves, short=short)
        hardware = replace(hardware, fast_bf16=fast, bf16_reason=reason)
        plan = planned(loaded, hardware=hardware)
    check_modes(loaded, plan, hardware, usable)
    check_strategy(loaded, plan)
    check_zero(loaded, plan, here=hardware.here)
    check_finetune(loaded, plan, media=media)
    uncompiled = without_compiler(planned(_not_compiling(loaded), hardware=hardware)) if plan.compile else None
    fingerprints = {
        "recipe": fingerprint(loaded.written),
        "data": prepared.fingerprint,
        "tokenizer": prepared.tokenizer_fingerprint,
    }
    if isinstance(prepared, Prepared):
        # The key of the cache: the sources' content and how they are made into tokens. As long as it is the same,
        # another `data` means that the prepared files were replaced.
        fingerprints["prepared"] = prepared.train.folder.parent.name
    else:
        fingerprints |= preference_fingerprints(loaded)
    return Assembly(loaded, prepared, rows, config, counts, plan, uncompiled, device, run, fingerprints, new_tokens)


def _towers(loaded: LoadedRecipe, config: PreTrainedConfig, rows: Rows | None) -> float:
    """What towers work on for a row (see `Counts`), by the media of its first rows; 0 where they are not trained."""
    import numpy as np

    assert isinstance(rows, PackedRows)
    if loaded.recipe.finetune.adapter != "none" or loaded.recipe.finetune.freeze:
        return 0.0
    looked_at = min(MEDIA_ROWS, rows.rows_per_epoch)
    count = sum(map(len, rows.media(np.arange(looked_at, dtype=np.int64))))
    return tower_values(config) * count / looked_at


def look_at(device: torch.device) -> Hardware:
    """The machine as a plan needs to know it; whether bf16 is fast is left open."""
    import importlib.util

    import torch
    from accelerate.utils import is_torchao_available
    from transformers.utils.import_utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
        is_liger_kernel_available,
    )

    present = {
        "triton": importlib.util.find_spec("triton") is not None,
        "torchao": is_torchao_available(),
        "liger_kernel": is_liger_kernel_available(),
        "flash_attn": is_flash_attn_2_available(),
        "flash_attn_interface": is_flash_attn_3_available(),
    }
    return Hardware(
        device.type,
        fast_bf16=False,
        processes=world_size(),
        memory_bytes=total_memory(device),
        threads=torch.get_num_threads(),
        capability=capability(device),
        rocm=torch.version.hip is not None,
        compiler=c_compiler(device.type) is not None,
        packages=frozenset(name for name, there in present.items() if there),
    )


def set_trained(model: PreTrainedModel, *, loaded: LoadedRecipe, new_tokens: Sequence[int]) -> None:
    """Put the recipe's adapter on a model, or freeze modules of it: what takes gradients is what will be trained."""
    finetune = loaded.recipe.finetune
    if finetune.adapter != "none":
        put_adapter(model, loaded, new_tokens)
    elif finetune.freeze:
        freeze(model, loaded)
    if loaded.recipe.data is not None and loaded.recipe.data.cache_features:
        frozen_tower(model, loaded)


def model_config(
    loaded: LoadedRecipe, prepared: Prepared | PreparedPairs, reporter: Reporter
) -> tuple[PreTrainedConfig, tuple[int, ...]]:
    """The configuration of the recipe's model, and the ids of tokens that are new to it.

    Names in the recipe are checked against what is installed.
    """
    from gptcli.model.build import TokenIds, build_config
    from gptcli.model.kinds import is_multimodal
    from gptcli.train.arguments import check_names

    check_names(loaded)
    assert loaded.recipe.model is not None
    if loaded.recipe.model.from_ is not None or isinstance(prepared, PreparedPairs):
        return _config_of(loaded, prepared, reporter)
    special = prepared.train.specials
    ids = TokenIds(prepared.train.vocab_size, special.bos, special.eos, special.pad)
    if is_multimodal(loaded.recipe.model.type or ""):
        ids = media_token_ids(loaded, prepared.tokenizer)
    config, notes = build_config(loaded, ids)
    for note in notes:
        reporter.say(f"model: {note}")
    return config, ()


def describe(assembly: Assembly) -> list[str]:
    """What will happen, in a few lines: model, data, batch, steps, mixing, device, each decision with its reason."""
    plan, loaded = assembly.plan, assembly.loaded
    assert loaded.recipe.model is not None
    kind = loaded.recipe.model.type or str(assembly.config.model_type)
    epochs = "" if plan.epochs is None else f" ({plan.epochs:.2f} epochs of {plan.rows_per_epoch:,} rows)"
    batch, tokens = f"{plan.global_batch_size} rows x {plan.sequence_length}", f"{plan.total_tokens:,} tokens"
    if is_preference(loaded):
        what = NAMES[loaded.recipe.finetune.method]
        batch, tokens = f"{plan.global_batch_size} {what} of at most {plan.sequence_length:,} tokens", f"about {tokens}"
    parts = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} at once"
    if plan.world_size > 1:
        parts = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} on each of {plan.processes} processes"
        each = plan.tensor_parallel * plan.context_parallel
        parts += f" x {each}" if each > 1 else ""
        parts += f", {plan.strategy}"
    lines = [
        f"model: {kind}, {plan.parameters / 1e6:.2f} M parameters",
        *_adapter_lines(assembly),
        f"train: {plan.steps:,} steps of {batch} ({parts}), {tokens}{epochs}{padding_text(plan)}",
        *_mixing_lines(assembly),
        f"device: {device_name(assembly.device)}, {plan.precision}",
    ]
    lines += [f"auto: {d.key} = {d.value} ({d.reason})" for d in plan.decisions]
    return lines


def trained_text(plan: Plan) -> str:
    """How many of the parameters are trained."""
    return f"{plan.trained_parameters:,} parameters ({plan.trained_parameters / plan.parameters:.2%})"


def _adapter_lines(assembly: Assembly) -> list[str]:
    finetune, plan = assembly.loaded.recipe.finetune, assembly.plan
    # Without either, what is not trained are constants: the positions of a tower.
    if plan.trained_parameters == plan.parameters or (finetune.adapter == "none" and not finetune.freeze):
        return []
    what = f"freeze {', '.join(finetune.freeze)}"
    if finetune.adapter_from is not None:
        what = f"{finetune.adapter}, going on with {finetune.adapter_from}"
    elif finetune.adapter != "none":
        what = f"{finetune.adapter}, r {finetune.lora.r}, alpha {finetune.lora.alpha:g}"
    return [f"trained: {trained_text(plan)}, {what}"]


def decided_recipe(assembly: Assembly, plan: Plan) -> dict[str, Any]:
    """The whole recipe with every default and every `auto` decided; running it gives the same run."""
    loaded = assembly.loaded
    recipe = resolved(loaded)
    train_section = recipe["train"]
    train_section["micro_batch_size"] = plan.micro_batch_size
    train_section["precision"] = plan.precision
    train_section["compile"] = plan.compile
    # Our own kernel has no name in a recipe; `auto` finds it again.
    train_section["attention"] = "auto" if plan.attention == BLOCKS else plan.attention
    recipe["launch"]["processes"] = plan.world_size // loaded.recipe.launch.nodes
    recipe["launch"]["strategy"] = plan.strategy
    if recipe["data"].get("workers") == "auto":
        recipe["data"]["workers"] = workers_of(loaded.recipe, recipe["launch"]["processes"], media=assembly.has_media)
    return recipe


def _mixing_lines(assembly: Assembly) -> list[str]:
    """What each of several sources gives to the planned run, and how often it is gone through."""
    if isinstance(assembly.prepared, PreparedPairs) or assembly.rows is None:
        return []
    streams = assembly.prepared.train.streams
    if len(streams) == 1:
        return []
    mixed = assembly.rows.proportions
    pairs = zip(streams, mixed.shares, mixed.epochs(assembly.plan.total_rows), strict=True)
    return [f"mixing: {stream.name}: {mixing_text(share, epochs)}" for stream, share, epochs in pairs]


def _check_metric(loaded: LoadedRecipe, prepared: Prepared) -> None:
    train, held_out = loaded.recipe.train, prepared.validation
    if train.best_metric != "validation.bits_per_byte" or train.early_stopping_patience is None or held_out is None:
        return
    if held_out.has_supervision and prepared.index is not None:
        raise RecipeError(
            f"train.best_metric: {train.best_metric} is not known where a part of each text is learnt",
            where=loaded.where("train.best_metric"),
            remedy="Set train.best_metric: validation.loss.",
        )


def _batch(loaded: LoadedRecipe) -> int:
    """Rows of a step; what is too little for one is refused by the plan."""
    return max(1, loaded.recipe.train.rows_of_step(_length(loaded)))


def padding_text(plan: Plan) -> str:
    """What to say of the padding of a plan's rows."""
    return f", {100 * plan.padding:.2g}% padding" if plan.padding else ""


def _config_of(
    loaded: LoadedRecipe, prepared: Prepared | PreparedPairs, reporter: Reporter
) -> tuple[PreTrainedConfig, tuple[int, ...]]:
    """The configuration of `model.from` with the tokenizer's tokens, and which are new; the row length is checked."""
    from gptcli.model.load import load_config

    model = loaded.recipe.model
    assert model is not None and model.from_ is not None
    config = load_config(Path(model.from_), trust_remote_code=model.trust_remote_code, revision=model.revision)
    text = config.get_text_config()
    vocabulary, limit = vocabulary_of(loaded, prepared, config), getattr(text, "max_position_embeddings", None)
    if vocabulary.new:
        before, text.vocab_size = text.vocab_size, vocabulary.size
        grown = f"; embeddings {before:,} -> {vocabulary.size:,} rows" if before < vocabulary.size else ""
        reporter.say(f"model: {vocabulary}{grown}")
    if isinstance(limit, int) and _length(loaded) > limit:
        raise RecipeError(
            f"data.sequence_length: {_length(loaded):,} is longer than the model's context of {limit:,}",
            where=loaded.where("data.sequence_length"),
            remedy=f"Set data.sequence_length to {limit} or less.",
        )
    return config, tuple(vocabulary.new)


def _not_compiling(loaded: LoadedRecipe) -> LoadedRecipe:
    section = loaded.recipe.train.model_copy(update={"compile": False})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"train": section}))


def _length(loaded: LoadedRecipe) -> int:
    assert loaded.recipe.data is not None
    return loaded.recipe.data.sequence_length
