"""Rows decoded together against transformers' own generate, one prompt at a time."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptcli.generation.decode import Budget, decodable, pads_well
from gptcli.generation.settings import Settings
from gptcli.generation.text import complete, complete_batch
from tests.tiny import make_model, shared_tokenizer

# What keeps keys and values: positions learned, rotated, in windows, and as slopes; then what keeps something else.
KEPT: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 9},
    "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "bloom": {},
    "opt": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
OTHERS: dict[str, dict[str, Any]] = {"mamba": {}, "lfm2": {"layer_types": ["conv", "full_attention"]}}
GREEDY = Settings(max_new_tokens=12, greedy=True)


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 300) for _ in range(draw.choice((1, 2, 5, 11, 30)))] for _ in range(count)]


def by_transformers(model: Any, prompt: list[int], most: int, **how: Any) -> list[int]:
    """The new tokens of transformers' own generate for one prompt."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        made = model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=1,
            **how,
        )
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


def decoded(ids: list[int]) -> str:
    return str(shared_tokenizer().decode(ids, skip_special_tokens=True))


def texts(model: Any, prompts: list[list[int]], settings: Settings, **how: Any) -> list[list[str]]:
    done = complete_batch(model, shared_tokenizer(), prompts, settings, **how)
    return [[completion.text for completion in each] for each in done]


@pytest.mark.parametrize("kind", [*KEPT, *OTHERS])
def test_greedy_equals_transformers_generate_alone_and_in_batches_of_any_size(kind: str) -> None:
    model = make_model(kind, **(KEPT | OTHERS)[kind])
    assert decodable(model) == (kind in KEPT)
    prompts = some_prompts(8)
    expected = [decoded(by_transformers(model, prompt, 12)) for prompt in prompts]
    assert len(set(expected)) > 5
    for budget in (Budget(), Budget(rows=3), Budget(rows=4, tokens=90)):
        assert texts(model, prompts, GREEDY, budget=budget) == [[text] for text in expected]
    assert [complete(model, shared_tokenizer(), prompt, GREEDY)[0].text for prompt in prompts] == expected


@pytest.mark.parametrize("kind", [*KEPT])
def test_padding_is_tried_and_harmless(kind: str) -> None:
    assert pads_well(make_model(kind, **KEPT[kind]), vocabulary=300)


def test_a_model_that_padding_changes_is_told_and_its_rows_are_decoded_apart() -> None:
    model = make_model()
    forward = model.forward

    def counts_columns(input_ids: Any, past_key_values: Any = None, use_cache: Any = None, **more: Any) -> Any:
        where = past_key_values.get_seq_length() + torch.arange(input_ids.shape[1]).unsqueeze(0)
        more.pop("position_ids", None)
        return forward(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, position_ids=where, **more
        )

    prompts = some_prompts(6)
    expected = texts(model, prompts, GREEDY)
    model.forward = counts_columns
    model.config.rope_parameters = None
    # A shift of all positions changes nothing for rotations, so the keys' own places are spoiled too.
    model.model.embed_tokens.register_forward_hook(
        lambda module, given, out: out + torch.linspace(0, 1, out.shape[1])[None, :, None]
    )
    assert not pads_well(model, vocabulary=300)
    alone = [texts(model, [prompt], GREEDY)[0] for prompt in prompts]
    assert texts(model, prompts, GREEDY) == alone
    assert alone != expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mamba"])
def test_what_is_drawn_depends_on_neither_batch_nor_company_nor_order(kind: str) -> None:
    model, prompts = make_model(kind, **(KEPT | OTHERS)[kind]), some_prompts(6)
    drawn = replace(GREEDY, greedy=False, seed=4, num_return_sequences=3, temperature=1.3)
    every = texts(model, prompts, drawn)
    assert len({text for each in every for text in each}) > 12
    assert texts(model, prompts[::-1], drawn, budget=Budget(rows=4))[::-1] == every
    assert [texts(model, [prompt], drawn)[0] for prompt in prompts] == every
    first = texts(model, prompts, replace(drawn, num_return_sequences=1))
    assert first == [each[:1] for each in every]  # a sequence is the same however many others there are
    assert texts(model, prompts, replace(drawn, seed=5)) != every


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_penalties_equal_transformers_for_every_row_of_a_batch(kind: str) -> None:
    model, tokenizer, prompts = make_model(kind), shared_tokenizer(), some_prompts(6)
    bad = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("he", " he", "ma", " ma")]
    for ours, theirs in (
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        (
            {"bad_words": ("he", "ma")},
            {"bad_words_ids": bad},
        ),
        ({"min_new_tokens": 12}, {"min_new_tokens": 12}),
    ):
        expected = [[decoded(by_transformers(model, prompt, 12, **theirs))] for prompt in prompts]
        assert texts(model, prompts, replace(GREEDY, **ours)) == expected, ours


def test_beams_equal_transformers() -> None:
    model, tokenizer = make_model(), shared_tokenizer()
    for prompt in some_prompts(2):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                inputs=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
                num_beams=4,
                num_return_sequences=3,
                eos_token_id=0,
                pad_token_id=1,
            )
        expected = [tokenizer.decode(row[len(prompt) :], skip_special_tokens=True) for row in made]
        settings = replace(GREEDY, max_new_tokens=12, num_beams=4, num_return_sequences=3)
        assert texts(model, [prompt], settings) == [expected]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_draft_and_prompt_lookup_change_no_text(greedy: bool) -> None:
    model, draft, tokenizer = make_model(), make_model("gpt2"), shared_tokenizer()
    settings = Settings(max_new_tokens=12, greedy=greedy, seed=3, num_return_sequences=1 if greedy else 2)
    for prompt in (*some_prompts(2), [40, 41, 42, 43] * 5):
        expected = complete(model, tokenizer, prompt, settings)
        assert complete(model, tokenizer, prompt, settings, draft=draft) == expected
        assert complete(model, tokenizer, prompt, settings, draft=4) == expected


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_logprobs_are_the_models_own(kind: str) -> None:
    model, tokenizer = make_model(kind), shared_tokenizer()
    settings = Settings(max_new_tokens=8, seed=1, temperature=0.5, top_k=3, logprobs=2, num_return_sequences=2)
    prompt = some_prompts(1)[0]
    for completion in complete(model, tokenizer, prompt, settings):
        assert completion.logprobs is not None and len(completion.logprobs) == completion.tokens
        ids = [token.id for token in completion.logprobs]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 :]
        for place, token in enumerate(completion.logprobs):
            assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-4)
            best = expected[place].topk(2)
            assert [other.id for other in token.top] == best.indices.tolist()
            assert [other.logprob for other in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_batch_holds_no_more_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(), []
    forward = model.forward

    def watched(input_ids: Any, **more: Any) -> Any:
        seen.append((input_ids.shape[0], more["past_key_values"].get_seq_length() + input_ids.shape[1]))
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr("gptcli.generation.decode.signature", lambda function: __import__("inspect").signature(forward))
    prompts = sorted(some_prompts(30), key=len, reverse=True)
    texts(model, prompts, replace(GREEDY, greedy=False), budget=Budget(rows=6, tokens=200))
    assert max(rows for rows, _ in seen) == 6
    assert max(rows * columns for rows, columns in seen) <= 200
