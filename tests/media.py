"""Tiny models that see or hear, built from nothing with their processors, for tests without a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.data.media.item import MODALITIES, Medium, Modality
from gptcli.data.media.reference import Media, Samples
from gptcli.data.tokenizer import train_bpe
from gptcli.model.build import TokenIds, build_config, build_model
from gptcli.model.load import load_tokenizer
from gptcli.model.processor import build_processor, media_ids, media_tokens
from gptcli.processors import save_processor
from gptcli.recipe.load import LoadedRecipe, load_recipe

absent = [name for name in ("PIL", "soundfile", "soxr") if importlib.util.find_spec(name) is None]
needs_media = pytest.mark.skipif(bool(absent), reason=f"the extra multimodal is not installed: {', '.join(absent)}")
needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="videos need torchvision",
)

TEXT = "text_config: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}"
TOWER = "num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2"
MROPE = "rope_type: default, rope_theta: 10000.0, mrope_section: [2, 3, 3]"
HEARS = f"audio_config: {{{TOWER}, num_mel_bins: 16, max_source_positions: 50}}"
TINY = {
    "llava": f"{{{TEXT}, vision_feature_layer: -1, vision_config: {{{TOWER}, image_size: 28, patch_size: 7}}}}",
    "idefics3": f"{{{TEXT}, vision_config: {{{TOWER}, image_size: 28, patch_size: 7}}}}",
    "mllama": f"{{{TEXT[:-1]}, cross_attention_layers: [1]}}, vision_config: {{num_hidden_layers: 2, hidden_size: 32, "
    "num_global_layers: 1, attention_heads: 2, intermediate_size: 64, vision_output_dim: 64, image_size: 28, "
    "patch_size: 7, max_num_tiles: 4, intermediate_layers_indices: [1]}}",
    "qwen2_vl": f"{{{TEXT[:-1]}, rope_parameters: {{{MROPE}}}}}, "
    "vision_config: {depth: 1, embed_dim: 32, hidden_size: 32, num_heads: 2, patch_size: 4}}",
    "qwen2_audio": f"{{{TEXT}, {HEARS}}}",
    "voxtral": f"{{{TEXT}, {HEARS.replace('50', '100')}}}",  # it joins four positions to a token
}
# A chat template that knows no parts.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
FAMILIES = ["llava", "idefics3", pytest.param("qwen2_vl", marks=needs_torchvision), "qwen2_audio", "voxtral", "mllama"]


def recipe(tmp_path: Path, model: str) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(f"data: {{train: builtin:pydocs, sequence_length: 256}}\nmodel: {model}\n")
    return load_recipe(str(path))


def built(tmp_path: Path, model: str) -> tuple[Any, Any]:
    """A model and its processor, from nothing."""
    from transformers import AutoConfig

    loaded = recipe(tmp_path, model)
    assert loaded.recipe.model is not None and loaded.recipe.model.type is not None
    tokens = media_tokens(AutoConfig.for_model(loaded.recipe.model.type))
    folder = tmp_path / "tokenizer"
    train_bpe(
        ["a shoe, a coat, one two "] * 3, folder, vocab_size=320, pattern="gpt4", special_tokens=[*tokens.values()]
    )
    tokenizer = load_tokenizer(folder)
    config, _ = build_config(loaded, TokenIds(len(tokenizer), 0, 0, 1, media_ids(tokens, tokenizer)))
    made = build_model(loaded, config, seed=1, attention=None)
    return made, build_processor(config, folder, made)


def louder(model: Any) -> None:
    """Random weights whose answers are far from uniform, and depend on what the model sees."""
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 0.4)
            elif weights.numel() == 1:  # a gate of mllama's, which begins closed
                weights.fill_(1.0)
    torch.set_rng_state(state)


def random_built(tmp_path: Path, kind: str, *, template: str | None = None) -> tuple[Any, Any]:
    """A model of a family of `TINY` whose weights are far from uniform, and its processor, with a chat template."""
    model, processor = built(tmp_path, f"{{type: {kind}, config: {TINY[kind]}}}")
    louder(model)
    processor.tokenizer.chat_template = processor.chat_template = template
    return model.eval(), processor


def save_media_model(folder: Path, kind: str) -> Path:
    """Such a model as a folder with its tokenizer and its processor."""
    made, processor = random_built(folder, kind)
    made.save_pretrained(folder / "model")
    save_processor(processor, folder / "model")
    return folder / "model"


def write_media(folder: Path, kind: str, count: int) -> list[str]:
    """Files of the kind of media that a family reads: pictures of 28 x 28, or sounds of up to a second."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        if kind in ("qwen2_audio", "voxtral"):
            import numpy as np
            import soundfile

            names.append(f"{number}.wav")
            noise = np.random.default_rng(number).normal(scale=0.3, size=4000 + 1000 * number)
            soundfile.write(folder / names[-1], noise, 16_000)
        else:
            names.append(f"{number}.png")
            (folder / names[-1]).write_bytes(png(number))
    return names


def png(seed: int, width: int = 28, height: int = 28) -> bytes:
    """A picture of noise."""
    import io

    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    return file.getvalue()


def picture(seed: int, width: int = 28, height: int = 28) -> Medium:
    """The same as a medium of a prompt."""
    return Medium("image", Media(f"picture {seed}", png(seed, width, height)))


def sound(seed: int, samples: int = 8000) -> Medium:
    """A sound of noise as a medium of a prompt."""
    import numpy as np

    noise = np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * np.float32(0.3)
    return Medium("audio", Media(f"sound {seed}", Samples(noise, 16_000)))


def write_rows(folder: Path, modality: Modality, rows: int = 12) -> None:
    """rows.jsonl: chats of no, one and two media, which lie beside it."""
    names = [_medium(folder, modality, number) for number in range(rows)]
    lines = []
    for row in range(rows):
        parts = [{"type": modality, modality: names[(row + each) % len(names)]} for each in range(row % 3)]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": f"which {row}?"}]}
        lines.append({"messages": [asked, {"role": "assistant", "content": f"the answer is {row % 4}"}]})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _medium(folder: Path, modality: Modality, number: int) -> str:
    """A picture or a sound of random numbers, as a file of the folder; its name."""
    import numpy as np

    values = np.random.default_rng(number)
    if modality == "audio":
        import soundfile

        soundfile.write(folder / f"{number}.wav", values.normal(0, 0.1, 8000 + 1000 * (number % 4)), 16000)
        return f"{number}.wav"
    from PIL import Image

    side = 24 + 8 * (number % 4)
    Image.fromarray(values.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return f"{number}.png"


def media_project(folder: Path, kind: str, **sections: str) -> Path:
    """A recipe of two steps on `write_rows`, in a folder; `sections` are YAML instead of or beside its own."""
    from transformers import AutoConfig

    modality = next(each for each in MODALITIES if each in media_tokens(AutoConfig.for_model(kind)))
    write_rows(folder, modality)
    settings = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": f"{{type: {kind}, config: {TINY[kind]}}}",
        "tokenizer": "{train: {vocab_size: 320}, chat_template: chatml}",
        "data": "{train: rows.jsonl, validation: 25%, format: chat, sequence_length: 256, packing: none, workers: 0}",
        "train": "{max_steps: 2, global_batch_size: 4, learning_rate: 1e-3, precision: fp32, "
        "log_every: 1, eval_every: 1, save_every: 1, sample_every: 0}",
        **sections,
    }
    path = folder / "r.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return path


def mistral_folder(folder: Path) -> Path:
    """A voxtral as Mistral publishes it: tekken.json, the feature extractor's settings, and no processor's."""
    import base64

    from transformers import AutoModelForMultimodalLM

    model, processor = random_built(folder, "voxtral")
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{number}>" for number in range(5, 24))]
    special += ["[AUDIO]", "[BEGIN_AUDIO]"]
    size = len(special) + 256
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
    counts = {"num_vocab_tokens": 256, "default_vocab_size": size, "default_num_special_tokens": len(special)}
    tekken = {
        "config": {"pattern": pattern, **counts, "version": "v7"},
        "vocab": [
            {"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)
        ],
        "special_tokens": [{"rank": n, "token_str": text, "is_control": True} for n, text in enumerate(special)],
    }
    config = model.config
    config.text_config.vocab_size, config.audio_token_id = size, special.index("[AUDIO]")
    made = AutoModelForMultimodalLM.from_config(config)
    louder(made)
    made.save_pretrained(folder / "mistral")
    (folder / "mistral" / "tekken.json").write_text(json.dumps(tekken))
    extractor = {**processor.feature_extractor.to_dict(), "processor_class": "VoxtralProcessor"}
    (folder / "mistral" / "preprocessor_config.json").write_text(json.dumps(extractor))
    return folder / "mistral"
