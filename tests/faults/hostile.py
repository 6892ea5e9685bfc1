"""Hostile model folders: what an attacker may put into one, each as a function that changes a good folder.

`ran` is a file that appears when code of the folder runs.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Attack = Callable[[Path, Path], None]

CODE = """\
open({ran!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "stranger"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass

def generate(*args, **kwargs):
    raise SystemExit(0)
"""


class Pickled:
    """An object whose unpickling creates a file."""

    def __init__(self, ran: Path) -> None:
        self._ran = str(ran)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self._ran, "w")


def change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Set fields of a JSON file of a folder."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_code(folder: Path, ran: Path) -> None:
    """Put a module into a folder."""
    (folder / "stranger.py").write_text(CODE.format(ran=str(ran)))


def model_code(folder: Path, ran: Path) -> None:
    """A model of an unknown type whose classes are in the folder."""
    with_code(folder, ran)
    classes = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    change(folder, model_type="stranger", architectures=["Model"], auto_map=classes)


def model_code_elsewhere(folder: Path, ran: Path) -> None:
    """The same, named as transformers names another repository, which may be any path."""
    model_code(folder, ran)
    change(folder, auto_map={"AutoConfig": f"{folder}--stranger.Config"})


def known_model_code(folder: Path, ran: Path) -> None:
    """A known type that names classes of its own."""
    model_code(folder, ran)
    change(folder, model_type="llama")


def tokenizer_code(folder: Path, ran: Path) -> None:
    with_code(folder, ran)
    name = "stranger.Tokenizer"
    change(folder, "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": [name, name]})


def slow_tokenizer_code(folder: Path, ran: Path) -> None:
    """A tokenizer of the older kind, which transformers converts by the class that the folder names."""
    tokenizer_code(folder, ran)
    name = f"{folder}--stranger.Tokenizer"
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [name, name]})
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


def unknown_tokenizer(folder: Path, ran: Path) -> None:
    """A class that transformers does not have, beside a good tokenizer.json."""
    del ran
    change(folder, "tokenizer_config.json", tokenizer_class="os.system")


def pickle_only(folder: Path, ran: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Pickled(ran), folder / "pytorch_model.bin")


def pickles_beside(folder: Path, ran: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        torch.save(Pickled(ran), folder / name)


def named_pickle(folder: Path, ran: Path) -> None:
    """config.json may name the file of the weights."""
    torch.save(Pickled(ran), folder / "pytorch_model.bin")
    change(folder, transformers_weights="pytorch_model.bin")


def indexed(folder: Path, name: str) -> None:
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def indexed_pickle(folder: Path, ran: Path) -> None:
    """An index of safetensors that names a pickle."""
    indexed(folder, "weights.bin")
    (folder / "model.safetensors").unlink()
    torch.save(Pickled(ran), folder / "weights.bin")


def indexed_tensors(folder: Path, ran: Path) -> None:
    """The same with a pickle of nothing but the right tensors, which `weights_only` would read."""
    del ran
    indexed(folder, "weights.bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "weights.bin")
    (folder / "model.safetensors").unlink()


def other_index(folder: Path, ran: Path) -> None:
    """An index under a name that config.json gives, beside good weights."""
    indexed_tensors(folder, ran)
    (folder / "model.safetensors.index.json").rename(folder / "a.safetensors.index.json")
    (folder / "model.safetensors").write_bytes(b"")
    change(folder, transformers_weights="a.safetensors.index.json")


def index_outside(folder: Path, ran: Path) -> None:
    del ran
    indexed(folder, "../outside.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")


def pickled_tokenizer(folder: Path, ran: Path) -> None:
    torch.save(Pickled(ran), folder / "tokenizer.json")


def kernel(folder: Path, ran: Path) -> None:
    """An attention whose compiled code transformers fetches from the Hub."""
    del ran
    change(folder, attn_implementation="stranger/kernel")


def custom_generation(folder: Path, ran: Path) -> None:
    (folder / "custom_generate").mkdir()
    with_code(folder, ran)
    (folder / "stranger.py").rename(folder / "custom_generate" / "generate.py")
    ways = {"dola_layers": "high", "penalty_alpha": 0.6, "num_beams": 1_000_000, "custom_generate": str(folder)}
    change(folder, "generation_config.json", **ways, eos_token_id=["x", -5, 10**30])


def beside_an_adapter(folder: Path, ran: Path) -> None:
    torch.save(Pickled(ran), folder / "adapter_model.bin")
    other = str(folder.parent / "other")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": other}))


def adapter_of_another(folder: Path, ran: Path) -> None:
    """Only an adapter, which names a hostile folder as its base."""
    beside_an_adapter(folder, ran)
    other = folder.parent / "other"
    folder.joinpath("config.json").rename(folder / "was.json")
    other.mkdir()
    other.joinpath("config.json").write_text((folder / "was.json").read_text())
    model_code(other, ran)


def weights(header: object, body: bytes = b"\0" * 16, length: int | None = None) -> Attack:
    """Weights with this header, and a length of it that may be wrong."""

    def attack(folder: Path, ran: Path) -> None:
        del ran
        raw = json.dumps(header).encode()
        stated = struct.pack("<Q", len(raw) if length is None else length)
        (folder / "model.safetensors").write_bytes(stated + raw + body)

    return attack


def tensor(begin: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def sized(**fields: Any) -> Attack:
    """A configuration of these sizes."""
    return lambda folder, ran: change(folder, **fields)


def written(name: str, text: str) -> Attack:
    """A file of the folder with this text."""

    def attack(folder: Path, ran: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)

    return attack


def fifo(*names: str) -> Attack:
    """Files that would keep a reader waiting."""

    def attack(folder: Path, ran: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)

    return attack


def linked(name: str, target: str) -> Attack:
    """A link in place of a file; `{outside}` is the folder around, where the file goes."""

    def attack(folder: Path, ran: Path) -> None:
        goal = Path(target.format(outside=folder.parent))
        if (folder / name).exists():
            (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(goal)

    return attack
