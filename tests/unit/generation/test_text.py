from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcli.errors import UsageError
from gptcli.generation.settings import Settings, settings
from gptcli.generation.text import complete, encode_prompt
from gptcli.recipe.schema import Generate
from tests.tiny import byte_tokenizer, make_model, shared_tokenizer, wrapped

KINDS = ("llama", "gpt2", "qwen3")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return shared_tokenizer()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_a_plain_loop(kind: str, tokenizer: Any) -> None:
    model = make_model(kind)
    ids = tokenizer("hello", add_special_tokens=False)["input_ids"]
    expected = list(ids)
    for _ in range(12):
        with torch.no_grad():
            best = int(model(torch.tensor([expected])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        expected.append(best)
    done = complete(model, tokenizer, "hello", Settings(max_new_tokens=12, greedy=True))[0]
    assert done.text == tokenizer.decode(expected[len(ids) :])
    assert done.tokens == len(expected) - len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_streamed_is_the_completion_and_depends_on_the_seed_alone(kind: str, tokenizer: Any) -> None:
    model = make_model(kind)
    pieces: list[str] = []
    first = complete(model, tokenizer, "世界", Settings(max_new_tokens=30, seed=1), on_text=pieces.append)
    torch.rand(7)
    again = complete(model, tokenizer, "世界", Settings(max_new_tokens=30, seed=1))
    other = complete(model, tokenizer, "世界", Settings(max_new_tokens=30, seed=2))
    assert "".join(pieces) == first[0].text
    assert first == again != other
    assert len(pieces) > 3


def test_random_state_and_modes_are_left_as_they_were(tokenizer: Any) -> None:
    model = make_model().train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for seed in (5, 6):
        complete(model, tokenizer, "hello", Settings(max_new_tokens=5, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_several_sequences_differ_and_are_not_streamed(tokenizer: Any) -> None:
    pieces: list[str] = []
    done = complete(
        make_model(),
        tokenizer,
        "你好",
        Settings(max_new_tokens=20, seed=3, num_return_sequences=5),
        on_text=pieces.append,
    )
    assert len({completion.text for completion in done}) == 5
    assert not pieces


def test_length_and_stop_are_told_apart(tokenizer: Any) -> None:
    model = make_model()
    long = complete(model, tokenizer, "hello", Settings(max_new_tokens=7, greedy=True))[0]
    assert (long.finish_reason, long.tokens) == ("length", 7)
    mark = next(character for character in long.text if character != "\ufffd")
    short = complete(model, tokenizer, "hello", Settings(max_new_tokens=7, greedy=True, stop=(mark,)))[0]
    assert short.finish_reason == "stop"
    assert short.text == long.text.partition(mark)[0]


def test_the_end_of_text_ends_and_is_not_counted(tokenizer: Any) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token alike: greedy takes the first, END
    done = complete(model, tokenizer, "hello", Settings(max_new_tokens=5, greedy=True))[0]
    assert (done.text, done.tokens, done.finish_reason) == ("", 0, "stop")
    kept = complete(model, tokenizer, "hello", Settings(max_new_tokens=5, min_new_tokens=3, greedy=True))[0]
    assert (kept.tokens, kept.finish_reason) == (3, "stop")


def test_an_empty_prompt_starts_from_the_end_of_text(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "") == [0]
    assert complete(make_model(), tokenizer, "", Settings(max_new_tokens=4, seed=1))[0].tokens <= 4


def test_bos_is_put_in_front_only_where_the_tokenizer_does() -> None:
    without, with_bos = wrapped(byte_tokenizer()), wrapped(byte_tokenizer(bos=True))
    plain = encode_prompt(without, "hello")
    assert plain[0] != 0
    assert encode_prompt(with_bos, "hello") == [0, *plain]
    assert encode_prompt(with_bos, "") == [0]


def test_a_prompt_longer_than_the_context_names_both_numbers(tokenizer: Any) -> None:
    prompt = "\x01" * 64
    with pytest.raises(UsageError, match=r"64 tokens.*context of 64") as caught:
        complete(make_model(context=64), tokenizer, prompt, Settings())
    assert "63" in (caught.value.remedy or "")
    assert complete(make_model(context=64), tokenizer, prompt[1:], Settings(seed=1))[0].tokens <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_cut_to_the_context_with_a_warning(kind: str, tokenizer: Any) -> None:
    warnings: list[str] = []
    chosen = Settings(max_new_tokens=500, min_new_tokens=400, seed=1)
    done = complete(make_model(kind), tokenizer, "\x01" * 60, chosen, on_warning=warnings.append)
    assert done[0].tokens == 4
    assert len(warnings) == 1 and "at most 4 new tokens" in warnings[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": 200},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"num_return_sequences": 0},
        {"stop": ("",)},
        {"seed": -1},
        {"greedy": True, "num_return_sequences": 2},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**changes).check()


def test_a_prompt_that_is_not_unicode_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError):
        encode_prompt(tokenizer, "\udc80")


def test_the_defaults_are_the_recipe_schemas() -> None:
    assert settings(dict(Generate()), {}, seed=1) == Settings(seed=1)
    chosen = settings(dict(Generate(temperature=0.5, stop=["x"])), {"top_k": 3, "temperature": None}, seed=1)
    assert (chosen.temperature, chosen.top_k, chosen.stop) == (0.5, 3, ("x",))
    assert settings({}, {}).seed != settings({}, {}).seed
