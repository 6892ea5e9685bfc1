"""Completions by vLLM's offline engine, where it is installed; written against its documented interface.

It has kernels, a scheduler and random numbers of its own: a seed gives other texts than without it, and the same
ones only on the same vLLM. What it does not have under another name is refused, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gptcli.errors import UsageError
from gptcli.generation.row import Completion
from gptcli.generation.settings import Settings
from gptcli.generation.text import encode_prompt
from gptcli.model.load import load_tokenizer

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
# Our names of what both have, and vLLM's.
NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "num_return_sequences": "n",
    "stop": "stop",
    "bad_words": "bad_words",
    "seed": "seed",
}
DECIDED_HERE = ("temperature", "greedy")


def complete_by_vllm(
    folder: Path,
    prompts: Sequence[str],
    settings: Settings,
    precision: str,
    *,
    json_schema: str | None = None,
    regex: str | None = None,
) -> list[list[Completion]]:
    """The completions of each prompt, in order; vLLM batches them.

    Raises:
        UsageError: a setting that vLLM does not have.
    """
    arguments = sampling_arguments(settings, json_schema=json_schema, regex=regex)
    tokenizer = load_tokenizer(folder)
    ids = [{"prompt_token_ids": encode_prompt(tokenizer, prompt)} for prompt in prompts]
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in arguments:
        arguments["structured_outputs"] = StructuredOutputsParams(**arguments["structured_outputs"])
    model = LLM(model=str(folder), dtype=DTYPES[precision], load_format="safetensors")
    answers = model.generate(ids, SamplingParams(**arguments), use_tqdm=False)
    return [[_completion(output) for output in answer.outputs] for answer in answers]


def sampling_arguments(settings: Settings, *, json_schema: str | None, regex: str | None) -> dict[str, Any]:
    """The settings as the arguments of vLLM's SamplingParams; raises `UsageError` for one that it does not have."""
    arguments: dict[str, Any] = {"temperature": settings.temperature if settings.samples else 0.0}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in NAMES:
            arguments[NAMES[field.name]] = list(value) if isinstance(value, tuple) else value
        elif field.name not in DECIDED_HERE and value != field.default:
            raise UsageError(f"{field.name} is not available with --engine vllm", remedy="Leave one of them out.")
    arguments["top_k"] = arguments["top_k"] or -1  # all tokens
    arguments["top_p"] = max(arguments["top_p"], 1e-6)  # it takes no 0, which is the likeliest token alone
    if json_schema is not None:
        arguments["structured_outputs"] = {"json": json.loads(json_schema)}
    elif regex is not None:
        arguments["structured_outputs"] = {"regex": regex}
    return arguments


def _completion(output: Any) -> Completion:
    """A completion whose tokens are counted without the closing EOS, for which vLLM names no reason to stop."""
    is_closed = output.finish_reason == "stop" and output.stop_reason is None
    return Completion(
        output.text, len(output.token_ids) - is_closed, "stop" if output.finish_reason == "stop" else "length"
    )
