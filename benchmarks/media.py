"""An epoch of pictures with a frozen tower: without and with kept features, and how long steps wait for decoding.

    python benchmarks/media.py DATA [--rounds 1] [--layers 6] [--hidden 384]

DATA is a file of rows with the columns image and label (Fashion-MNIST, for example). The model is a llava of random
weights: a tower of 112 x 112 pixels in patches of 14, frozen, and a small language model that is trained.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import print_machine

from gptcli.recipe.load import load_recipe
from gptcli.reporting import Progress, Silent
from gptcli.train.ahead import AheadTrainer
from gptcli.train.begin import Options
from gptcli.train.run import train

RECIPE = """\
name: base
model: {model}
tokenizer: {tokenizer}
data:
  train: {data}
  validation: 0
  format: prompt
  allow_outside: true
  images: [image]
  prompt: "{{image}}\\nThis is a"
  completion: " {{label}}"
  sequence_length: 128
  packing: none
  workers: 1
finetune: {{adapter: none, freeze: [vision_tower]}}
train: {{epochs: 1, global_batch_size: 32, micro_batch_size: 16, learning_rate: 1e-3, precision: fp32, log_every: 1,
  eval_every: 0, save_every: 0, sample_every: 0}}
"""
MODEL = (
    "{{type: llava, config: {{vision_feature_layer: -1, text_config: {{num_hidden_layers: 2, hidden_size: 64, "
    "num_attention_heads: 2}}, vision_config: {{num_hidden_layers: {layers}, hidden_size: {hidden}, "
    "num_attention_heads: 6, image_size: 112, patch_size: 14}}}}}}"
)


class Timing(Silent):
    """Knows how long features were made."""

    seconds = 0.0

    @contextmanager
    def progress(self, name: str, total: float, unit: str) -> Iterator[Progress]:
        """A task whose seconds are kept."""
        began = time.perf_counter()
        with super().progress(name, total, unit) as shown:
            yield shown
        if name == "features":
            self.seconds = time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    options = parser.parse_args()
    data = options.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GPTCLI_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        recipe = Path("r.yaml")
        model = MODEL.format(layers=options.layers, hidden=options.hidden)
        recipe.write_text(RECIPE.format(model=model, tokenizer="{train: {vocab_size: 320}}", data=data))
        train(load_recipe(str(recipe), ["train={epochs: null, max_steps: 1}"]), Options("pretrain"), Silent())
        base = "{from: runs/base/final}"
        recipe.write_text(RECIPE.format(model=base, tokenizer="null", data=data))
        print_machine(("torch", "transformers", "pillow"))
        print(f"tower: {tower_parameters() / 1e6:.1f} M parameters")
        timing = Timing()
        first = epoch(recipe, "first", timing, "data.cache_features=true")
        print(f"features made: {timing.seconds:.2f} s, then an epoch of {first[0]:.2f} s")
        ways = {"one worker": (), "no worker": ("data.workers=0",), "features": ("data.cache_features=true",)}
        figures: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.rounds):
            for way, overrides in ways.items():
                figures.setdefault(way, []).append(epoch(recipe, f"{way} {number}", Silent(), *overrides))
        medians = {way: statistics.median(seconds for seconds, _ in found) for way, found in figures.items()}
        for way, found in figures.items():
            spread = f"{min(found)[0]:.2f} to {max(found)[0]:.2f}"
            waited = statistics.median(part / seconds for seconds, part in found)
            print(f"{way}: {medians[way]:.2f} s an epoch ({spread}), waiting for batches {waited:.1%}")
        print(f"features over one worker: {medians['one worker'] / medians['features']:.2f} times as fast")


def epoch(recipe: Path, name: str, reporter: Any, *overrides: str) -> tuple[float, float]:
    """The seconds of an epoch's steps but the first, and those of them in which nothing was done but waiting."""
    waits: list[float] = []
    ends: list[float] = []
    own = AheadTrainer.get_batch_samples

    def timed(self: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        ends.append(began)
        found = own(self, *arguments)
        waits.append(time.perf_counter() - began)
        return found

    AheadTrainer.get_batch_samples = timed  # type: ignore[method-assign]
    try:
        train(load_recipe(str(recipe), [f"name={name}", *overrides]), Options("finetune"), reporter)
    finally:
        AheadTrainer.get_batch_samples = own  # type: ignore[method-assign]
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines)
    # The worker's start is in the first wait, and there is nothing after the last.
    return ends[-1] - ends[1], sum(waits[1:-1])


def tower_parameters() -> int:
    from transformers import AutoModelForMultimodalLM

    model: Any = AutoModelForMultimodalLM.from_pretrained("runs/base/final")
    return sum(parameter.numel() for parameter in model.model.vision_tower.parameters())


if __name__ == "__main__":
    main()
