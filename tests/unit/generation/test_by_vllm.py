"""What is said to vLLM, which is not here: a package of that name takes down what it is told."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gptcli.errors import UsageError
from gptcli.generation.by_vllm import complete_by_vllm, sampling_arguments
from gptcli.generation.pinned import vllm_arguments
from gptcli.generation.row import Completion
from gptcli.generation.serve import Server
from gptcli.generation.settings import Settings
from tests.tiny import save_model, shared_tokenizer


def test_every_setting_reaches_vllm_under_its_name() -> None:
    said = sampling_arguments(
        Settings(max_new_tokens=7, min_new_tokens=2, temperature=0.5, top_p=0.9, top_k=3, stop=("a", "b"), seed=4),
        json_schema='{"type": "null"}',
        regex=None,
    )
    expected = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["a", "b"],
        "seed": 4,
        "n": 1,
        "repetition_penalty": 1.0,
        "structured_outputs": {"json": {"type": "null"}},
    }
    assert {key: said[key] for key in expected} == expected
    greedy = sampling_arguments(Settings(greedy=True, top_k=0, top_p=0.0), json_schema=None, regex="a+")
    assert (greedy["temperature"], greedy["top_k"]) == (0.0, -1)
    assert 0 < greedy["top_p"] < 1e-5
    assert greedy["structured_outputs"] == {"regex": "a+"}


def test_a_setting_that_vllm_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("gptcli.generation.by_vllm", fromlist=["NAMES"]).NAMES, "top_k")
    with pytest.raises(UsageError, match="top_k is not available with --engine vllm"):
        sampling_arguments(Settings(top_k=3), json_schema=None, regex=None)


def test_prompts_go_as_our_ids_and_answers_come_back_as_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            told["model"] = options

        def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> Any:
            told["prompts"] = prompts
            ended = SimpleNamespace(text="one", token_ids=[5, 6, 0], finish_reason="stop", stop_reason=None)
            cut = SimpleNamespace(text="two", token_ids=[5, 6, 7], finish_reason="length", stop_reason=None)
            return [SimpleNamespace(outputs=[ended]), SimpleNamespace(outputs=[cut])]

    package, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.LLM, package.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    parameters.StructuredOutputsParams = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "vllm", package)
    monkeypatch.setitem(__import__("sys").modules, "vllm.sampling_params", parameters)
    folder = save_model(tmp_path / "m")
    done = complete_by_vllm(folder, ["hello", "cat"], Settings(seed=1), "bf16")
    assert done == [[Completion("one", 2, "stop")], [Completion("two", 3, "length")]]
    assert told["model"] == {"model": str(folder), "dtype": "bfloat16", "load_format": "safetensors"}
    encode = shared_tokenizer()
    assert told["prompts"] == [{"prompt_token_ids": encode(text)["input_ids"]} for text in ("hello", "cat")]


def test_its_server_gets_safetensors_alone_a_name_and_an_address(tmp_path: Path) -> None:
    said = vllm_arguments("vllm", tmp_path, Server("talker", "127.0.0.1", 8001, False), "fp32")
    assert said[:3] == ["vllm", "serve", str(tmp_path)]
    pairs = dict(zip(said[3::2], said[4::2], strict=True))
    assert pairs == {
        "--host": "127.0.0.1",
        "--port": "8001",
        "--served-model-name": "talker",
        "--load-format": "safetensors",
        "--dtype": "float32",
    }
