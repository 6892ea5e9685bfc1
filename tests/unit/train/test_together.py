"""How the processes of a divided model share out what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gptcli.train import together

NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.{layer}.{part}" for layer in range(6) for part in ("attn.q.weight", "mlp.up.weight", "norm.weight")
]


@given(st.lists(st.integers(1, 10**6), min_size=len(NAMES), max_size=len(NAMES)), st.integers(1, 9))
def test_each_layer_has_one_owner_and_none_has_far_more_than_the_others(sizes: list[int], count: int) -> None:
    of_names, writers = dict(zip(NAMES, sizes, strict=True)), list(range(3, 3 + count))
    owner = together.owners(of_names, writers)
    assert owner.keys() == of_names.keys() and set(owner.values()) <= set(writers)
    for layer in range(6):
        assert len({owner[name] for name in NAMES if f"layers.{layer}." in name}) == 1
    held = [sum(size for name, size in of_names.items() if owner[name] == writer) for writer in writers]
    largest = max(sum(of_names[name] for name in NAMES if f"layers.{layer}." in name) for layer in range(6))
    largest = max(largest, *(of_names[name] for name in NAMES[:3]))
    assert max(held) - min(held) <= largest  # the next one goes to who has least
    assert owner == together.owners(of_names, writers)


def test_parts_become_files_that_transformers_numbers_and_an_index(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        part = tmp_path / f".part-{number:05d}"
        part.mkdir()
        save_file({name: torch.ones(2)}, part / "model.safetensors")
        torch.save({name: 1}, part / "optimizer.pt")
    (tmp_path / ".part-00000" / "config.json").write_text("{}")
    names = together._join(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "optimizer-00001-of-00002.pt",
        "optimizer-00002-of-00002.pt",
    ]
    assert names[str(tmp_path / ".part-00001" / "optimizer.pt")] == "optimizer-00002-of-00002.pt"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


def test_one_part_keeps_the_names_of_one_process(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f".part-{number:05d}").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / ".part-00001" / "model.safetensors")
    together._join(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_folder_that_cannot_be_opened_or_filled_is_told(tmp_path: Path) -> None:
    from contextlib import contextmanager

    left: list[str] = []

    @contextmanager
    def opened() -> object:  # type: ignore[misc]
        try:
            yield tmp_path
        except OSError as error:
            left.append(str(error.strerror))
            raise

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        together.write_together(opened(), lambda writers: fail, lambda folder: None)  # type: ignore[arg-type]
    assert left == ["No space left on device"]
