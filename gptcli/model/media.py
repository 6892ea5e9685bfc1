"""What data needs to know of a recipe's model that reads images or sounds, before there is a model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CheckpointError, first_line
from gptcli.processors import fit, save_processor, takes_media
from gptcli.recipe.load import LoadedRecipe
from gptcli.reporting import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from gptcli.model.build import TokenIds


def media_model(loaded: LoadedRecipe) -> tuple[tuple[str, ...], Callable[[Path, Path], None] | None] | None:
    """The tokens of images and sounds, and what writes a processor; None: the recipe's model reads text alone.

    What writes is given the folder of a tokenizer that has the tokens, and the folder to write into; None where the
    model is there already, with its tokenizer and a processor that needs nothing.

    Raises:
        RecipeError: the model is an encoder-decoder, or a field of its configuration is wrong.
        MissingError: there is no such model, or a package is not installed that the processor needs.
    """
    model = loaded.recipe.model
    if model is None or loaded.recipe.data is None:
        return None
    if model.from_ is not None:
        from gptcli.model.kinds import is_multimodal
        from gptcli.model.load import load_config

        config = load_config(Path(model.from_), trust_remote_code=model.trust_remote_code, revision=model.revision)
        return ((), _fitting(config)) if is_multimodal(config.model_type) else None
    from gptcli.model.kinds import is_multimodal

    assert model.type is not None
    if not is_multimodal(model.type):
        return None
    tokens = _media_tokens(loaded)

    def write(tokenizer: Path, into: Path) -> None:
        from gptcli.model.build import build_config, build_model
        from gptcli.model.load import load_tokenizer
        from gptcli.model.processor import build_processor

        config, _ = build_config(loaded, _token_ids(load_tokenizer(tokenizer), tokens))
        processor = build_processor(config, tokenizer, build_model(loaded, config, seed=0, attention=None))
        _write_alone(processor, into)

    return tuple(tokens.values()), write


def _fitting(config: PreTrainedConfig) -> Callable[[Path, Path], None] | None:
    """What fits the processor of a model that is there to it; None: it needs none (see `processors.fit`)."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        if takes_media(PROCESSOR_MAPPING.get(type(config), object)):
            return None
    except ImportError:  # of a class that needs a package; told where a processor is loaded
        return None

    def write(tokenizer: Path, into: Path) -> None:
        from transformers import AutoProcessor

        with quiet():
            try:
                processor: Any = AutoProcessor.from_pretrained(str(tokenizer), local_files_only=True)  # type: ignore[no-untyped-call]
                fit(processor, config)
            except Exception as error:  # whatever a class raises for files that are not its own
                raise CheckpointError(f"the processor cannot be used: {first_line(error)[:300]}") from error
            _write_alone(processor, into)

    return write


def _write_alone(processor: Any, into: Path) -> None:
    """Write a processor beside a tokenizer that is there.

    Of the tokenizer transformers would write another class, and of a chat there may be a template of its own.
    """
    with tempfile.TemporaryDirectory(prefix="gptcli-processor-") as name:
        save_processor(processor, Path(name))
        for path in Path(name).glob("*processor_config.json"):
            shutil.copyfile(path, into / path.name)


def tower_values(config: PreTrainedConfig) -> float:
    """Places x layers x width that the towers of a model work on for one image or sound (the largest, of several).

    By the sizes that configurations share: sides of a picture and of its patches, or positions of a sound.
    """
    from gptcli.model.kinds import parts_of
    from gptcli.model.processor import side_of

    text = config.get_text_config(decoder=True)
    found = [0.0]
    for part in parts_of(config).values():
        layers, width = (getattr(part, name, None) for name in ("num_hidden_layers", "hidden_size"))
        if part is text or not isinstance(layers, int) or not isinstance(width, int):
            continue
        side, patch = (side_of(getattr(part, name, None)) for name in ("image_size", "patch_size"))
        sound = getattr(part, "max_source_positions", None)
        places = (side // patch) ** 2 if side and patch else sound if isinstance(sound, int) else 0
        found.append(float(places * layers * width))
    return max(found)


def media_token_ids(loaded: LoadedRecipe, tokenizer: Path) -> TokenIds:
    """The ids that the configuration of `model.type` needs of a tokenizer's folder."""
    from gptcli.model.load import load_tokenizer

    return _token_ids(load_tokenizer(tokenizer), _media_tokens(loaded))


def _media_tokens(loaded: LoadedRecipe) -> dict[str, str]:
    """The tokens of images and sounds of `model.type`, which are known before there is a tokenizer."""
    from gptcli.model.build import TokenIds, build_config
    from gptcli.model.processor import media_tokens

    config, _ = build_config(loaded, TokenIds(1024, 0, 0, 0))
    return media_tokens(config)


def _token_ids(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, str]) -> TokenIds:
    """The ids that a configuration needs of a tokenizer with the `tokens` of images and sounds."""
    from gptcli.model.build import TokenIds
    from gptcli.model.processor import media_ids

    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return TokenIds(len(tokenizer), *ends, media_ids(tokens, tokenizer))
