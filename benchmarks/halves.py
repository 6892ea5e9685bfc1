"""A micro-batch in two halves beside the whole on this CPU: forward and backward passes, medians taken in turns.

    python benchmarks/halves.py

The whole: two threads share each operation; the halves: each thread takes half of the rows (gptcli/train/halves.py).
Models: the GPT-2s a, b and c of train.py, a with fewer rows too, and a llama of 1 M parameters. FLOPs of the matrix
products: what plan.HALVES_FLOPS is compared with.
"""

from __future__ import annotations

import os
import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's
# As gptcli does, before torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import statistics
import time
from functools import partial

import torch
from measuring import print_machine
from train import SHAPES
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from gptcli.model.activation import keep_derivatives
from gptcli.model.attention import attend_in_blocks
from gptcli.model.build import build_model, counts_of
from gptcli.recipe.load import load_recipe
from gptcli.train.halves import Halves, Inputs
from gptcli.train.loss import TrainingLoss
from gptcli.train.plan import BLOCKS_LONGEST, loss_block

SECONDS = 4.0  # for a line of the table
LEAST_ROUNDS = 4  # the first is not counted


def main() -> None:
    print_machine(("gptcli", "torch", "transformers"))
    threads = torch.get_num_threads()
    if threads < 2:
        raise SystemExit("halves need two threads: this process has one")
    print(f"threads: {threads}")
    print("\n| model | rows x length | GFLOPs | precision | whole, ms | halves, ms | whole / halves |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, config, rows, length in cases():
        model = build_model(load_recipe("quickstart", ()), config, seed=1, attention=None).train()
        model.config.use_cache = False
        keep_derivatives(model)
        if length <= BLOCKS_LONGEST:
            attend_in_blocks(model)  # in bf16; fp32 is torch's
        flops = 6 * counts_of(model).matrix * rows * length
        for precision in ("fp32", "bf16"):
            whole, halved = timed(model, rows, length, to_bf16=precision == "bf16")
            print(
                f"| {name} | {rows} x {length} | {flops / 1e9:,.1f} | {precision} | {1e3 * whole:,.1f}"
                f" | {1e3 * halved:,.1f} | {whole / halved:.2f} |",
                flush=True,
            )


def cases() -> list[tuple[str, PreTrainedConfig, int, int]]:
    """Name, configuration, rows and their length."""
    found: list[tuple[str, PreTrainedConfig, int, int]] = []
    for name, shape in SHAPES.items():
        config = GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.width,
            n_head=shape.heads,
            n_positions=shape.length,
            vocab_size=shape.vocabulary,
            bos_token_id=0,
            eos_token_id=0,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        found += [(name, config, rows, shape.length) for rows in ((2, 4, 6, 12) if name == "a" else (shape.batch,))]
    llama = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=344,
        num_attention_heads=4,
        vocab_size=2048,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return [*found, ("llama 4 x 128", llama, 4, 128), ("llama 4 x 128", llama, 16, 128)]


def timed(model: PreTrainedModel, rows: int, length: int, *, to_bf16: bool) -> tuple[float, float]:
    """The median seconds of a pass over the whole micro-batch and over its halves, without the first."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    losses = [TrainingLoss(model, block=loss_block(rows * length, vocabulary, parts), z_loss=0.0) for parts in (1, 2)]
    batch = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": batch[:, :-1], "labels": batch[:, 1:]}

    def run(loss: TrainingLoss, part: Inputs) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=to_bf16):
            objective = loss(model, {"input_ids": part["input_ids"]}, part["labels"])[2]
        (objective / (rows * length)).backward()  # type: ignore[no-untyped-call]

    halves = Halves(list(model.parameters()))
    times: tuple[list[float], list[float]] = [], []
    began = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() - began < SECONDS:
        for found, loss in zip(times, losses, strict=True):
            started = time.perf_counter()
            if found is times[0]:
                run(loss, inputs)
            else:
                halves(inputs, partial(run, loss))
            model.zero_grad(set_to_none=True)
            found.append(time.perf_counter() - started)
    halves.close()
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


if __name__ == "__main__":
    main()
