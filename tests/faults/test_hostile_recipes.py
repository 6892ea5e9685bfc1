"""Fault 30: whatever a recipe holds or is, it ends with code 2, in a few lines, before anything heavy is imported.

Nothing is timed: each command may use ten seconds of processor time and 300 MB beyond what its imports take, so that
a bomb of any kind cannot pass, and what it imported is looked at when it ends.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_RECIPE, Cli
from tests.warm import MB, Ended, Warm

LIMITS: dict[str, Any] = {"memory": 300 * MB, "seconds": 10}


def bomb() -> str:
    """Nine to the twelfth items by aliases of aliases."""
    names = "abcdefghijkl"
    lines = [f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]" for p, c in itertools.pairwise(names)]
    return "\n".join(["a: &a [x,x,x,x,x,x,x,x,x]", *lines])


# (the recipe, where the error stands ("" for the file as a whole), what it says)
TEXTS: dict[str, tuple[str | bytes, str, str]] = {
    "bomb of aliases": (bomb(), ":4", "5000 values"),
    "bomb of merges": ("a: &a {x: 1}\nb: &b {<<: *a}\n", ":2", "<<"),
    "10 MB": (b"seed: 1\n" * 1_250_000, "", "larger than 256 KiB"),
    "10 MB in one line": (b"seed: " + b"1" * 10_000_000, "", "larger than 256 KiB"),
    "duplicate key": ("seed: 1\ntrain: {max_steps: 1}\nseed: 2\n", ":3", "twice, first at r.yaml:1"),
    "duplicate inner key": ("train:\n  max_steps: 1\n  max_steps: 2\n", ":3", "twice, first at r.yaml:2"),
    "deep lists": ("data: " + "[" * 10_000, ":1", "deeper than 32 levels"),
    "deep mappings": ("data: " + "{a: " * 10_000, ":1", "deeper than 32 levels"),
    "deep blocks": ("".join(f"{' ' * level}a:\n" for level in range(500)), ":34", "deeper than 32 levels"),
    "deep dashes": ("- " * 10_000, ":1", "deeper than 32 levels"),
    "tab": ("data:\n\ttrain: x\n", ":2", "a tab"),
    "NUL": ("seed: 1\nname: a\0b\n", ":2", "not valid YAML"),
    "control character": ("seed: 1\n\nname: a\x1bb\n", ":3", "not valid YAML"),
    "python tag": ("name: !!python/object/apply:os.system [touch ran]\n", ":1", "is not read"),
    "python tag at the top": ("!!python/object/apply:os.system\nargs: [touch ran]\n", ":1", "is not read"),
    "own tag": ("name: !include /etc/passwd\n", ":1", "is not read"),
    "latin-1": (b"seed: 1\nname: \xe9\n", ":2", "not UTF-8"),
    "utf-16": ("seed: 1\n".encode("utf-16"), ":1", "not UTF-8"),
    "binary": (bytes(range(256)) * 16, ":2", "not UTF-8"),
    "half a pair": ('seed: 1\nname: "\\ud800"\n', ":2", "half of a surrogate pair"),
    "half a pair in a key": ('seed: 1\n"\\ud800": 1\n', ":2", "half of a surrogate pair"),
    "variable that is not set": ("seed: 1\nname: ${NO_SUCH_VARIABLE}\n", ":2", "NO_SUCH_VARIABLE is not set"),
    "two documents": ("seed: 1\n---\nseed: 2\n", ":2", "second document"),
    "empty": ("", "", "is empty"),
    "a list": ("- 1\n- 2\n", "", "is a list"),
    "a word": ("quickstart", "", "is a single value"),
    "4,000 unknown keys": ("".join(f"lerning_rate{n}: 1\n" for n in range(4_000)), ":1", "unknown key lerning_rate0"),
    "4,000 wrong sources": ("data:\n  train:\n" + "".join(f"  - {{n{n}: 1}}\n" for n in range(2_000)), ":3", "unknown"),
    "4,000 wrong items": ("generate: {prompts: [" + "1," * 4_000 + "]}\n", ":1", "expected a text"),
    "a long key": (f"? {'x' * 200_000}\n: 1\n", ":1", "unknown key xxx"),
    "a long value": (f"seed: {'x' * 200_000}\n", ":1", "expected a whole number"),
    "a number of 10,000 digits": (f"seed: {'9' * 10_000}\n", ":1", "a number of 10000 digits"),
    "lines in a key": ('"' + "a\\n" * 100 + '": 1\n', ":1", "unknown key a␊a␊"),
    "a name of a thousand letters": (f"name: {'x' * 1000}\n", ":1", "cannot be a folder's name"),
    "a name with ESC": ('seed: 1\nname: "a\\e[31mb"\n', ":2", "cannot be a folder's name"),
    "a name out of the folder": ("name: ../../escape\n", ":1", "cannot be a folder's name"),
    "an absolute name": ("name: /tmp/escape\n", ":1", "cannot be a folder's name"),
    "a vocabulary of 10^12": ("tokenizer: {train: {vocab_size: 1000000000000}}\n", ":1", "at most 2e+06"),
}


def assert_refused(done: Ended, said: str, where: str = "r.yaml") -> None:
    assert done.code == 2, (done.code, done.err)
    assert said in done.err
    assert where in done.err.splitlines()[0]
    assert "Traceback" not in done.err and done.out == ""
    assert 1 <= len(done.err.splitlines()) <= 8
    assert max(map(len, done.err.splitlines())) <= 2_100
    assert done.imported == frozenset()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "ok.yaml").write_text(TINY_RECIPE)
    return tmp_path


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_recipe_is_code_2_with_its_place(here: Path, cold: Warm, name: str) -> None:
    text, line, said = TEXTS[name]
    (here / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    assert_refused(cold("pretrain", "r.yaml", cwd=here, **LIMITS), said, f"r.yaml{line}")
    (here / "top.yaml").write_text("extends: r.yaml\n")
    assert_refused(cold("tokenize", "top.yaml", cwd=here, **LIMITS), said, "")
    assert not (here / "ran").exists() and not (here / "runs").exists()


# Every type of value where another one belongs. Of a section that is no mapping, the keys in it are not there.
TYPES = {
    "name": ("[a]", "{a: b}", "true"),
    "seed": ("x", "1.5", "[1]", "{a: 1}", "true", "-1", ".nan", ".inf", "99999999999999999999", '"1"'),
    "output_dir": ("[a]", "{a: b}", '""'),
    "extends": ("[a]", "{a: b}", "1"),
    "tokenizer": ("x", "[1]", "3", "true"),
    "tokenizer.from": ("[a]", "{a: b}"),
    "tokenizer.train": ("x", "[1]"),
    "tokenizer.train.algorithm": ("wordpiece", "[bpe]", "1"),
    "tokenizer.train.vocab_size": ("x", "-1", "0", "[1]", "1e400"),
    "tokenizer.train.special_tokens": ("{a: b}", "[[a]]"),
    "data": ("x", "[1]"),
    "data.train": ("1", "true", "[1]", "[[a]]", "{path: [a]}"),
    "data.validation": ("-1", "2", ".nan", "101%", "{tail: x}", "true"),
    "data.sequence_length": ("x", "0", "-1", "1.5", "[1]"),
    "data.documents": ("page", "[line]"),
    "data.shuffle": ("maybe", "1", "[true]"),
    "data.on_bad_row": ("ignore", "[skip]"),
    "model": ("x", "[1]"),
    "model.type": ("[llama]", "1", "{a: b}"),
    "model.preset": ("huge", "1"),
    "model.config": ("x", "[1]"),
    "model.trust_remote_code": ("maybe", '"true"', "1", "[true]"),
    "train": ("x", "[1]"),
    "train.max_steps": ("x", "0", "-1", "1.5", "[1]", ".inf"),
    "train.learning_rate": ("x", "-1", ".nan", ".inf", "[1]", "1e400"),
    "train.betas": ("0.9", "[0.9]", "[a, b]", "[0.9, 2]", "{a: b}"),
    "train.warmup": ("x", "-1", "[1]", "101%"),
    "train.precision": ("fp4", "[fp32]"),
    "train.save_every": ("x", "-1", "[1]"),
    "train.trainer_args": ("x", "[1]"),
    "train.max_time": ("x", "-1", "[1]"),
    "launch.processes": ("x", "-1", "[1]"),
    "tracking.to": ("1", "{a: b}", "[nowhere]"),
    "generate.prompts": ("1", "[1]", "{a: b}"),
    "generate.temperature": ("x", "-1", ".nan"),
    "eval.limit": ("x", "-1", "[1]"),
}


@pytest.mark.parametrize("key", TYPES)
def test_a_value_of_another_type_is_code_2_and_names_the_key(here: Path, cold: Warm, key: str) -> None:
    for value in TYPES[key]:
        text = value
        for part in reversed(key.split(".")):
            text = f"{{{part}: {text}}}"
        (here / "r.yaml").write_text(f"# line 1\n{text}\n")
        done = cold("recipes", "validate", "r.yaml", cwd=here, **LIMITS)
        assert_refused(done, key.split(".")[-1], "r.yaml")


FILES = {
    "a folder": lambda here: (here / "r.yaml").mkdir(),
    "a pipe that nobody writes to": lambda here: os.mkfifo(here / "r.yaml"),
    "a link to what never ends": lambda here: (here / "r.yaml").symlink_to("/dev/zero"),
    "a link to itself": lambda here: (here / "r.yaml").symlink_to("r.yaml"),
    "a link to nothing": lambda here: (here / "r.yaml").symlink_to("nowhere.yaml"),
    "nothing": lambda here: None,
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_is_code_2_and_not_waited_for(here: Path, cold: Warm, kind: str) -> None:
    FILES[kind](here)
    assert_refused(cold("pretrain", "r.yaml", cwd=here, **LIMITS), "r.yaml")
    (here / "top.yaml").write_text("seed: 1\nextends: r.yaml\n")
    assert_refused(cold("pretrain", "top.yaml", cwd=here, **LIMITS), "r.yaml", "top.yaml:2")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "/dev/full"])
def test_devices_are_no_recipes(here: Path, cold: Warm, path: str) -> None:
    assert_refused(cold("pretrain", path, cwd=here, **LIMITS), path, path)


def test_extends_in_circles_is_code_2(here: Path, cold: Warm) -> None:
    (here / "a.yaml").write_text("extends: b.yaml\n")
    (here / "b.yaml").write_text("seed: 1\nextends: a.yaml\n")
    assert_refused(cold("pretrain", "a.yaml", cwd=here, **LIMITS), "goes round in a circle", "b.yaml:2")
    (here / "own.yaml").write_text("extends: link.yaml\n")
    (here / "link.yaml").symlink_to("own.yaml")
    assert_refused(cold("pretrain", "own.yaml", cwd=here, **LIMITS), "goes round in a circle", "link.yaml:1")
    for number in range(40):
        (here / f"n{number}.yaml").write_text(f"extends: n{number + 1}.yaml\n")
    assert_refused(cold("pretrain", "n0.yaml", cwd=here, **LIMITS), "deeper than 16 files", "n15.yaml:1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a=b=c", "unknown key a"),
        ("=", "is not KEY=VALUE"),
        ("=x", "is not KEY=VALUE"),
        ("..=x", "is not KEY=VALUE"),
        (".".join(["train"] * 20_000) + "=1", "unknown key train.train"),
        ("data.train.99999999999999999999.path=x", "unknown key"),
        ("seed=" + "9" * 100_000, "a number of 100000 digits"),
        ("seed=" + "[" * 50_000, "deeper than 32 levels"),
        ("data.train=" + "{a: " * 20_000, "deeper than 32 levels"),
        ("seed=!!python/object/apply:os.system", "expected a whole number"),
        ("seed=[!!python/object/apply:os.system [touch ran]]", "is not read"),
        ("seed={a: &a [x], b: [*a", "not valid YAML"),
        ("extends=/dev/zero", "read from the recipe's file only"),
        ("name=../../x", "cannot be a folder's name"),
        ("name=\udcff", "half of a surrogate pair"),
        ("name=a\x1b[31mb", "cannot be a folder's name"),
        ("model={type: llama, type: gpt2}", "twice"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_hostile_override_is_code_2(here: Path, cold: Warm, override: str, said: str) -> None:
    done = cold("pretrain", "ok.yaml", override, cwd=here, **LIMITS)
    assert_refused(done, said, "")
    assert not (here / "ran").exists()


def test_a_thousand_overrides_are_code_2(here: Path, cold: Warm) -> None:
    done = cold("pretrain", "ok.yaml", *(f"lerning_rate{n}=1" for n in range(4_000)), cwd=here, **LIMITS)
    assert_refused(done, "and 3994 more", "")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            "num_hidden_layers: 1000000000, hidden_size: 32, num_attention_heads: 2",
            "num_hidden_layers is 1,000,000,000",
        ),
        ("num_hidden_layers: 2, hidden_size: 1000000000, num_attention_heads: 2", "hidden_size is 1,000,000,000"),
        ("num_hidden_layers: -1, hidden_size: 32, num_attention_heads: 2", "num_hidden_layers is -1"),
        ("num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 1000000000", "num_attention_heads is"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "pretrain"])
def test_a_model_of_absurd_size_is_code_2(here: Path, warm: Warm, command: str, config: str, said: str) -> None:
    """By the model's own fields, which only transformers knows, so that it is imported."""
    (here / "text.txt").write_text("The cat sat on the mat. " * 200)
    done = warm(command, "ok.yaml", f"model.config={{{config}}}", "--quiet", cwd=here, **LIMITS)
    assert done.code == 2, done.err
    assert said in done.err and "Traceback" not in done.err and len(done.err.splitlines()) <= 8


@pytest.mark.parametrize("name", ["bomb of aliases", "10 MB", "deep lists", "python tag", "4,000 unknown keys"])
def test_the_real_command_refuses_one_of_each_kind(here: Path, run_cli: Cli, name: str) -> None:
    """`python -m gptcli`, without a fork."""
    text, line, said = TEXTS[name]
    (here / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    done = run_cli("pretrain", "r.yaml", cwd=here)
    assert done.code == 2 and said in done.err and f"r.yaml{line}" in done.err
    assert "Traceback" not in done.err and len(done.err.splitlines()) <= 8
