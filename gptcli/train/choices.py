"""What `auto` stands for where no rule is known: timed on this machine, once, and kept.

A timing is stored under `$GPTCLI_CACHE` by all that it depends on, so that the choice is the same the next time. The
random state is not touched.
"""

from __future__ import annotations

import copy
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

from gptcli.device import cpu_name, has_fast_bf16
from gptcli.files import cache_root, fingerprint, read_json, write_json
from gptcli.train.modes import BLOCKS_LONGEST
from gptcli.train.plan import loss_block

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from gptcli.recipe.load import LoadedRecipe

# What is faster by less is not worth another arithmetic.
MARGIN = 1.2
# Work of one timed pass, where the micro-batch is more; the time that all of them may take; and the part of it for
# a run of less than `SHORT_FLOPS`, some ten seconds, whose choice is not kept for longer ones.
PASS_FLOPS = 5e10
SECONDS = 2.0
SHORT_FLOPS = 2e12
SHORT_SHARE = 0.15
LEAST_ROUNDS = 3  # the first is slow: memory, kernels
LEAST_TOKENS = 128
FORMAT = 4


def choose_bf16(
    loaded: LoadedRecipe,
    config: PreTrainedConfig,
    device: torch.device,
    *,
    rows: int,
    length: int,
    halves: bool = False,
    short: bool = False,
) -> tuple[bool, str]:
    """Whether to train in bf16 here, and why: on a CPU that has it, by timing the model itself in both.

    Products alone do not tell: a small model's are 1.4 times as fast in bf16 where its step, with the conversions
    between them, is slower.

    Args:
        loaded: the recipe.
        config: the model's configuration.
        device: where it trains.
        rows: of a micro-batch.
        length: tokens of a row.
        halves: whether it trains on the halves of a micro-batch at once.
        short: whether the run is, so that the timing is.
    """
    if not has_fast_bf16(device):
        return False, "this CPU has neither AVX512-BF16 nor AMX" if device.type == "cpu" else "no fast bf16 here"
    if device.type == "cuda":
        return True, "this GPU multiplies bf16 fast"
    full, half = timed_passes(loaded, config, rows, length, halves, short)
    ratio = full / half if half else 0.0
    verdict = "" if ratio >= MARGIN else f", less than {MARGIN}"
    return ratio >= MARGIN, f"this model is {ratio:.2f} times as fast in bf16 as in fp32 here{verdict}"


def timed_passes(
    loaded: LoadedRecipe, config: PreTrainedConfig, rows: int, length: int, halves: bool = False, short: bool = False
) -> tuple[float, float]:
    """Seconds of a forward and backward pass of the model in fp32 and in bf16 on the CPU: stored, else measured.

    The whole model with random weights, as it is trained, of the micro-batch as much as `PASS_FLOPS` allow.
    """
    import torch
    import transformers

    versions = torch.__version__, transformers.__version__
    shape = config.to_dict() | {"vocab_size": config.get_text_config().vocab_size}
    key = [FORMAT, "passes", cpu_name(), torch.get_num_threads(), versions, shape, rows, length, halves, short]
    path = cache_root() / "choices" / f"{fingerprint(key)}.json"
    try:
        stored = read_json(path)
        return float(stored["fp32"]), float(stored["bf16"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or no file of ours: measured anew
    from gptcli.model.activation import keep_derivatives
    from gptcli.model.attention import attend_in_blocks
    from gptcli.model.build import build_model

    with torch.random.fork_rng(devices=[]):
        model = build_model(loaded, copy.deepcopy(config), seed=0, attention=None).train()
        keep_derivatives(model)
        if length <= BLOCKS_LONGEST:
            attend_in_blocks(model)
        tokens = max(LEAST_TOKENS, int(PASS_FLOPS / (6 * model.num_parameters())))
        length = min(length, tokens)
        rows = max(1, min(rows, tokens // length))
        full, half = _pass_seconds(
            model, rows + rows % 2 if halves else rows, length, halves, SECONDS * SHORT_SHARE if short else SECONDS
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fp32": full, "bf16": half})
    return full, half


def _pass_seconds(model: PreTrainedModel, rows: int, length: int, halves: bool, seconds: float) -> tuple[float, float]:
    """The median time of a pass over [rows, length] tokens in fp32, and under autocast to bf16, taken in turns."""
    import torch

    from gptcli.train.halves import Halves, Inputs
    from gptcli.train.loss import TrainingLoss

    model.config.use_cache = False
    vocabulary = int(model.config.get_text_config().vocab_size)
    loss = TrainingLoss(model, block=loss_block(rows * length, vocabulary, 2 if halves else 1), z_loss=0.0)
    ids = (torch.arange(rows * length) % vocabulary).view(rows, length)

    def step(inputs: Inputs, to_bf16: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=to_bf16):
            objective = loss(model, inputs, inputs["input_ids"])[2]
        objective.backward()  # type: ignore[no-untyped-call]

    both = Halves(list(model.parameters())) if halves else None
    times: tuple[list[float], list[float]] = [], []
    started = time.perf_counter()
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        for index, found in enumerate(times):
            begin = time.perf_counter()
            run = partial(step, to_bf16=index == 1)
            if both is None:
                run({"input_ids": ids})
            else:
                both({"input_ids": ids}, run)
            model.zero_grad(set_to_none=True)
            found.append(time.perf_counter() - begin)
    if both is not None:
        both.close()
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])
