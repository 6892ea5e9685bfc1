"""The trainer of a recipe of preference data: its reference model, its reward, trl's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import RecipeError
from gptcli.train.arguments import training_arguments
from gptcli.train.pair_encoder import Encoder
from gptcli.train.pairs import PreparedPairs
from gptcli.train.preference_plan import generations, has_reference
from gptcli.train.reward import reward_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.recipe.load import LoadedRecipe
    from gptcli.train.assemble import Assembly
    from gptcli.train.preference import PreferenceTrainer


def preference_trainer(
    assembly: Assembly,
    prepared: PreparedPairs,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
) -> PreferenceTrainer:
    """The trainer of the recipe's method; `record` as for `preference.PreferenceTrainer`."""
    from gptcli.reporting import quiet
    from gptcli.train.preference import build_preference
    from gptcli.train.preference_rows import RunOrder

    loaded, plan = assembly.loaded, assembly.plan
    recipe = loaded.recipe
    assert recipe.data is not None
    method = recipe.finetune.method
    if recipe.finetune.adapter != "none" and assembly.new_tokens:
        raise RecipeError(  # trl multiplies with the head's own weights, which are without the rows of an adapter
            "finetune.adapter: not with preference tuning where the tokenizer has tokens that are new to the model",
            where=loaded.where("finetune.adapter"),
            remedy="Train all of the model (adapter: none), or leave out tokenizer.chat_template.",
        )
    more: dict[str, Any] = {"max_length": recipe.data.sequence_length, "beta": recipe.finetune.beta}
    if method == "grpo":
        more = {"max_completion_length": recipe.generate.max_new_tokens, "num_generations": generations(loaded)}
        more = {name: value for name, value in more.items() if name not in recipe.train.trainer_args}
    arguments = training_arguments(loaded, plan, assembly.run.path, assembly.device.type, more)
    # The beginnings of models that brought no padding token are trained with rows that are padded.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = RunOrder(
        plan,
        len(prepared.train),
        recipe.seed if recipe.data.shuffle else None,
        each=generations(loaded),
        whole=method == "grpo",
    )
    with quiet():
        return build_preference(
            method,
            encoder=Encoder(loaded, tokenizer) if method == "grpo" else None,
            reference=_reference(loaded, model, assembly) if method in ("dpo", "kto") else None,
            reward=reward_of(loaded) if method == "grpo" else None,
            model=model,
            args=arguments,
            order=order,
            train=prepared.train,
            validation=prepared.validation,
            tokenizer=tokenizer,
            record=record,
        )


def _reference(loaded: LoadedRecipe, model: PreTrainedModel, assembly: Assembly) -> PreTrainedModel:
    """The model as it was before training: a second copy of `model.from`."""
    from gptcli.model.load import load_model
    from gptcli.model.resize import resize

    section = loaded.recipe.model
    assert section is not None and section.from_ is not None and has_reference(loaded)
    reference: Any = load_model(
        Path(section.from_),
        dtype="fp32",
        device=assembly.device,
        attention=loaded.recipe.train.attention,
        trust_remote_code=section.trust_remote_code,
        revision=section.revision,
    )
    resize(reference, assembly.config.get_text_config().vocab_size, assembly.new_tokens)
    reference.requires_grad_(False)
    found: PreTrainedModel = reference.eval()
    return found
