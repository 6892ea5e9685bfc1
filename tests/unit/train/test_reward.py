"""Rewards of grpo: the reference, a pattern, a function of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.errors import RecipeError
from gptcli.recipe.load import load_recipe
from gptcli.train.reward import Reward, reward_of

RECIPE = "data: {train: rows.jsonl, format: preference}\nfinetune: {method: grpo}\n"


def reward(folder: Path, given: str) -> Reward:
    (folder / "r.yaml").write_text(RECIPE)
    return reward_of(load_recipe(str(folder / "r.yaml"), [f"finetune.reward={given}"]))


def test_a_pattern_is_searched_in_texts_and_in_the_last_message(tmp_path: Path) -> None:
    pattern = reward(tmp_path, "{regex: '[0-9]+'}")
    said = [{"role": "assistant", "content": "it is 5"}]
    assert pattern(prompts=["", "", ""], completions=["a 1", "none", said]) == [1.0, 0.0, 1.0]


def test_the_reference_is_compared_as_eval_does(tmp_path: Path) -> None:
    match = reward(tmp_path, "exact_match")
    assert match(prompts=["", ""], completions=[" The 72.", "7"], reference=["72", ["8", "7"]]) == [1.0, 1.0]


def test_a_function_of_a_file_is_called_with_the_columns(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def near(prompts, completions, n, **others):\n    return [n_ - len(c) for n_, c in zip(n, completions)]\n"
        "def short(completions, **others):\n    return [1.0]\n"
        "def broken(completions, **others):\n    raise KeyError('x')\n"
        "def nothing(completions, **others):\n    return [None for _ in completions]\n"
    )
    mine = tmp_path / "mine.py"
    assert reward(tmp_path, f"{mine}:near")(prompts=["", ""], completions=["ab", "abc"], n=[2, 2]) == [0.0, -1.0]
    for name, what in (
        ("short", "gave 1 values for 2"),
        ("broken", "failed: KeyError"),
        ("nothing", "failed: TypeError"),
    ):
        with pytest.raises(RecipeError, match=what):
            reward(tmp_path, f"{mine}:{name}")(prompts=["", ""], completions=["a", "b"], n=[1, 1])


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("{regex: '('}", "is no pattern"),
        ("absent.py:f", "there is no file"),
        ("r.py:absent", "has no function 'absent'"),
        ("bad.py:f", "cannot be imported: ZeroDivisionError"),
        ("other", "is no reward"),
    ],
)
def test_what_is_no_reward_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, what: str) -> None:
    (tmp_path / "r.py").write_text("")
    (tmp_path / "bad.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=what):
        reward(tmp_path, given)
