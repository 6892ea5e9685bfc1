from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import GptcliError, RecipeError, UsageError
from gptcli.recipe.load import LoadedRecipe, dump_yaml, load_recipe, resolved
from gptcli.recipe.schema import Source, Tail

BASE = """\
tokenizer: {train: {algorithm: bpe, vocab_size: 2K}}
data:
  train: corpus.txt
  validation: 0.5%
model: {type: llama, preset: 10m}
train:
  max_tokens: 20M
  warmup: 3%
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")
    return tmp_path


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def error_of(argument: str, *overrides: str) -> GptcliError:
    with pytest.raises(GptcliError) as caught:
        load_recipe(argument, overrides)
    assert caught.value.exit_code == 2
    assert len(caught.value.lines()) <= 8
    return caught.value


def lines_of(argument: str, *overrides: str) -> str:
    return "\n".join(error_of(argument, *overrides).lines())


def sources(value: object) -> list[Source]:
    assert isinstance(value, list)
    return value


def data_paths(loaded: LoadedRecipe) -> list[Any]:
    assert loaded.recipe.data is not None
    return [source.path for source in loaded.recipe.data.train]


# What is read


def test_units_defaults_and_the_name_are_filled_in(here: Path) -> None:
    loaded = load_recipe("base.yaml")
    recipe = loaded.recipe
    assert recipe.name == "base"
    assert recipe.output_dir == str(here / "runs")
    assert recipe.train.max_tokens == 20_000_000
    assert recipe.train.warmup == pytest.approx(0.03)
    assert recipe.train.global_batch_size == 64
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.train is not None
    assert recipe.tokenizer.train.vocab_size == 2000
    assert recipe.data is not None
    assert recipe.data.validation == pytest.approx(0.005)
    assert recipe.data.packing == "concat"


def test_written_holds_what_was_written_and_nothing_else(here: Path) -> None:
    assert load_recipe("base.yaml", ["train.learning_rate=1e-3"]).written == {
        "tokenizer": {"train": {"algorithm": "bpe", "vocab_size": 2000}},
        "data": {"train": [{"path": str(here / "corpus.txt")}], "validation": 0.005},
        "model": {"type": "llama", "preset": "10m"},
        "train": {"max_tokens": 20_000_000, "warmup": 0.03, "learning_rate": 1e-3},
    }


def test_where_names_the_line_the_override_or_the_file() -> None:
    loaded = load_recipe("base.yaml", ["train.learning_rate=1e-3"])
    assert loaded.where("train.max_tokens") == "base.yaml:7"
    assert loaded.where("data.train.path") == "base.yaml:3"
    assert loaded.where("train.learning_rate") == "override train.learning_rate=1e-3"
    assert loaded.where("train.betas") == "base.yaml"


def test_a_numeric_name_is_kept_as_written() -> None:
    assert load_recipe("base.yaml", ["name=007"]).recipe.name == "007"


def test_bytes_have_258_entries() -> None:
    tokenizer = load_recipe("base.yaml", ["tokenizer.train={algorithm: bytes}"]).recipe.tokenizer
    assert tokenizer is not None
    assert tokenizer.train is not None
    assert tokenizer.train.vocab_size == 258


def test_packing_follows_the_format() -> None:
    data = load_recipe("base.yaml", ["data.format=chat"]).recipe.data
    assert data is not None
    assert data.packing == "isolated"


def test_the_floor_of_the_schedule_is_a_default_with_any_scheduler() -> None:
    loaded = load_recipe("base.yaml", ["train.lr_scheduler=constant"])
    assert load_recipe(write("again.yaml", dump_yaml(resolved(loaded)))).recipe == loaded.recipe


# Layers


def test_extends_merges_mappings_over_several_levels() -> None:
    write("middle.yaml", "extends: base.yaml\ntrain: {warmup: 10, learning_rate: 1e-3}\n")
    loaded = load_recipe(write("near.yaml", "extends: middle.yaml\ntrain: {learning_rate: 2e-3}\n"))
    assert loaded.recipe.train.max_tokens == 20_000_000
    assert loaded.recipe.train.warmup == 10
    assert loaded.recipe.train.learning_rate == 2e-3
    assert loaded.recipe.name == "near"
    assert loaded.where("train.warmup") == "middle.yaml:2"


def test_extends_takes_a_builtin_name() -> None:
    assert load_recipe(write("mine.yaml", "extends: quickstart\nseed: 7\n")).recipe.model is not None


def test_lists_are_replaced() -> None:
    write("far.yaml", BASE + "generate: {prompts: [a, b]}\n")
    assert load_recipe(write("near.yaml", "extends: far.yaml\ngenerate: {prompts: [c]}\n")).recipe.generate.prompts == [
        "c"
    ]


@pytest.mark.parametrize("near", ["train: {warmup: null}", "train: {warmup: }"])
def test_null_removes_a_key(near: str) -> None:
    loaded = load_recipe(write("near.yaml", f"extends: base.yaml\n{near}\n"))
    assert loaded.recipe.train.warmup == pytest.approx(0.02)
    assert "warmup" not in loaded.written["train"]


def test_null_removes_a_section() -> None:
    assert load_recipe("base.yaml", ["model=null"]).recipe.model is None


@pytest.mark.parametrize(
    ("override", "section", "gone", "kept"),
    [
        ("train.epochs=2", "train", "max_tokens", "epochs"),
        ("train.max_steps=2", "train", "max_tokens", "max_steps"),
        ("train={epochs: 2}", "train", "max_tokens", "epochs"),
        ("train.global_batch_tokens=64K", "train", "global_batch_size", "global_batch_tokens"),
        ("tokenizer.from=openai-community/gpt2", "tokenizer", "train", "from"),
        ("model.from=openai-community/gpt2", "model", "type", "from"),
        ("model.from=openai-community/gpt2", "model", "preset", "from"),
    ],
)
def test_a_nearer_choice_removes_the_farther_one(override: str, section: str, gone: str, kept: str) -> None:
    for loaded in (
        load_recipe("base.yaml", [override]),
        load_recipe(write("near.yaml", f"extends: base.yaml\n{dump_yaml(nested(override))}")),
    ):
        assert gone not in loaded.written[section]
        assert kept in loaded.written[section]


def nested(override: str) -> dict[str, Any]:
    from gptcli.recipe.layers import nested as nest
    from gptcli.recipe.layers import override_layer
    from gptcli.recipe.tree import plain

    ((keys, value),) = override_layer([override], Path())
    result: dict[str, Any] = plain(nest(keys, value))
    return result


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epochs=2", "train.max_steps=3"], "train.max_steps and train.epochs exclude each other"),
        (["train={epochs: 2}", "train.max_steps=3"], "exclude each other"),
        (["tokenizer.from=a/b", "tokenizer.train.vocab_size=300"], "exclude each other"),
        (["model.from=a/b", "model.type=gpt2"], "exclude each other"),
        (["train.global_batch_size=2", "train.global_batch_tokens=3"], "exclude each other"),
    ],
)
def test_two_of_a_group_in_one_layer_is_an_error(overrides: list[str], words: str) -> None:
    assert words in lines_of("base.yaml", *overrides)


def test_two_of_a_group_in_one_file_names_both_lines() -> None:
    text = lines_of(write("two.yaml", "train:\n  max_tokens: 1M\n  epochs: 2\n"))
    assert text.startswith("two.yaml:3: train.max_tokens and train.epochs exclude each other")
    assert "two.yaml:2" in text


def test_the_later_of_two_equal_overrides_wins() -> None:
    assert load_recipe("base.yaml", ["seed=1", "seed=2"]).recipe.seed == 2


# Sources


def test_data_train_sets_a_sole_path(here: Path) -> None:
    assert data_paths(load_recipe("base.yaml", ["data.train=other.txt"])) == [str(here / "other.txt")]


def test_data_train_path_addresses_a_sole_source(here: Path) -> None:
    text = "data:\n  train: [{path: a.jsonl, text: body}]\n"
    loaded = load_recipe(write("one.yaml", text), ["data.train.path=b.jsonl"])
    assert loaded.recipe.data is not None
    (source,) = loaded.recipe.data.train
    assert (source.path, source.text) == (str(here / "b.jsonl"), "body")


def test_an_item_is_addressed_by_its_number(here: Path) -> None:
    text = "data:\n  train: [a.txt, {path: b.jsonl, text: body}]\n"
    loaded = load_recipe(write("two.yaml", text), ["data.train.0.path=c.txt", "data.train.1.limit=1K"])
    assert data_paths(loaded) == [str(here / "c.txt"), str(here / "b.jsonl")]
    assert loaded.recipe.data is not None
    assert (loaded.recipe.data.train[1].text, loaded.recipe.data.train[1].limit) == ("body", 1000)


def test_a_sole_source_is_item_zero(here: Path) -> None:
    assert data_paths(load_recipe("base.yaml", ["data.train.0.path=c.txt"])) == [str(here / "c.txt")]


def test_a_sole_source_can_be_set_where_there_is_none(here: Path) -> None:
    assert data_paths(load_recipe(write("none.yaml", "seed: 1\n"), ["data.train.path=c.txt"])) == [str(here / "c.txt")]


@pytest.mark.parametrize("override", ["data.train.path=x", "data.train.2.path=x"])
def test_an_unclear_item_is_an_error_that_lists_them(override: str) -> None:
    write("two.yaml", "data:\n  train: [a.txt, b.txt]\n")
    assert "data.train.0 to data.train.1" in lines_of("two.yaml", override)


def test_an_item_of_any_list_can_be_set() -> None:
    write("far.yaml", "generate: {prompts: [a, b]}\n")
    assert load_recipe("far.yaml", ["generate.prompts.1=c"]).recipe.generate.prompts == ["a", "c"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.validation=0", 0.0),
        ("data.validation=2%", 0.02),
        ("data.validation={tail: 10%}", Tail(tail=0.1)),
        ("data.validation.tail=10%", Tail(tail=0.1)),
    ],
)
def test_validation_is_a_share_or_a_tail(override: str, expected: object) -> None:
    data = load_recipe("base.yaml", [override]).recipe.data
    assert data is not None
    assert data.validation == expected


@pytest.mark.parametrize(
    "override", ["data.validation=held.txt", "data.validation.path=held.txt", "data.validation=[held.txt]"]
)
def test_validation_may_be_a_source(here: Path, override: str) -> None:
    data = load_recipe("base.yaml", [override]).recipe.data
    assert data is not None
    assert [source.path for source in sources(data.validation)] == [str(here / "held.txt")]


def test_weights_of_the_sources_of_train() -> None:
    data = load_recipe("base.yaml", ["data.train=[{path: a, weight: 7}, {path: b, weight: 0.5}]"]).recipe.data
    assert data is not None
    assert data.weights == [7.0, 0.5]
    data = load_recipe("base.yaml", ["data.train=[a, b]"]).recipe.data
    assert data is not None
    assert data.weights is None


def test_a_tail_over_a_source_replaces_it() -> None:
    write("far.yaml", "data: {train: a.txt, validation: {path: b.txt}}\n")
    data = load_recipe("far.yaml", ["data.validation.tail=10%"]).recipe.data
    assert data is not None
    assert data.validation == Tail(tail=0.1)


# Paths


def test_a_path_is_relative_to_the_file_it_stands_in(here: Path) -> None:
    write("deep/far.yaml", "data: {train: a.txt}\n")
    loaded = load_recipe(
        write("near/near.yaml", "extends: ../deep/far.yaml\ndata: {validation: b.txt}\noutput_dir: out\n")
    )
    assert data_paths(loaded) == [str(here / "deep/a.txt")]
    assert loaded.recipe.data is not None
    assert sources(loaded.recipe.data.validation)[0].path == str(here / "near/b.txt")
    assert loaded.recipe.output_dir == str(here / "out")


def test_a_path_in_an_override_is_relative_to_the_current_folder(here: Path) -> None:
    write("near/near.yaml", "data: {train: a.txt}\n")
    assert data_paths(load_recipe("near/near.yaml", ["data.train=*.txt"])) == [str(here / "*.txt")]


@pytest.mark.parametrize("path", ["builtin:pydocs", "hub:owner/name"])
def test_builtin_and_hub_sources_are_no_paths(path: str) -> None:
    assert data_paths(load_recipe("base.yaml", [f"data.train={path}"])) == [path]


def test_brackets_in_the_recipes_folder_are_no_glob(here: Path) -> None:
    import glob

    write("odd [x]/a.txt", "text")
    loaded = load_recipe(write("odd [x]/r.yaml", "data: {train: '*.txt'}\n"))
    assert glob.glob(data_paths(loaded)[0]) == [str(here / "odd [x]/a.txt")]


@pytest.mark.parametrize("section", ["model", "tokenizer"])
def test_from_is_a_path_if_it_exists_beside_the_recipe_or_here(here: Path, section: str) -> None:
    for folder in ("sub/beside", "runs/base/final"):
        Path(folder).mkdir(parents=True)
    write("sub/r.yaml", "seed: 1\n")

    def value(text: str) -> str | None:
        recipe = load_recipe(write("sub/r.yaml", f"{section}: {{from: {text}}}\n")).recipe
        found = recipe.model if section == "model" else recipe.tokenizer
        assert found is not None
        return found.from_

    assert value("beside") == str(here / "sub/beside")
    assert value("runs/base/final") == str(here / "runs/base/final")
    assert value("./nowhere") == str(here / "sub/nowhere")
    assert value("openai-community/gpt2") == "openai-community/gpt2"


# resolved


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.epochs=2", "data.validation={tail: 10%}", "train.max_time=1h", "train.global_batch_tokens=64K"],
        [
            "model.from=a/b",
            "data.train=[a.txt, {path: b.csv, columns: [x, y], text: y}]",
            "generate.prompts=['${HOME}']",
        ],
        ["tokenizer.train={algorithm: bytes}", "train.trainer_args={tf32: true}", "finetune.reward={regex: x}"],
        [
            "data.train.map={label: {0: no, 1: yes}}",
            "data.format=prompt",
            "data.prompt='{text} {{'",
            "data.completion='{label}'",
            "train.warmup=100",
            "name=1e3",
        ],
    ],
)
def test_resolved_loads_again_to_the_same_recipe(overrides: list[str], here: Path) -> None:
    loaded = load_recipe("base.yaml", overrides)
    (here / "elsewhere").mkdir()
    text = dump_yaml(resolved(loaded))
    again = load_recipe(write("elsewhere/resolved.yaml", text))
    assert again.recipe == loaded.recipe
    assert dump_yaml(resolved(again)) == text


# What is wrong


def test_an_unknown_key_names_the_line_and_the_nearest_key() -> None:
    text = lines_of(write("r.yaml", "train:\n  lerning_rate: 1\n"))
    assert text == "r.yaml:2: unknown key train.lerning_rate\ndid you mean learning_rate?"


def test_a_key_in_the_wrong_section_names_the_right_one() -> None:
    assert "learning_rate belongs under train:" in lines_of(write("r.yaml", "learning_rate: 1\n"))
    assert "seed belongs at the top level" in lines_of(write("s.yaml", "train: {seed: 1}\n"))


def test_an_unknown_key_is_found_even_if_null_would_remove_it() -> None:
    assert "unknown key train.lerning_rate" in lines_of("base.yaml", "train.lerning_rate=null")


def test_an_unknown_key_inside_a_list_names_its_line() -> None:
    text = lines_of(write("r.yaml", "data:\n  train:\n    - path: a\n    - path: b\n      txt: c\n"))
    assert text.startswith("r.yaml:5: unknown key data.train.txt")


def test_a_wrong_override_is_named() -> None:
    assert lines_of("base.yaml", "train.lerning_rate=1").startswith("override train.lerning_rate=1: unknown key")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {learning_rate: '3e-3'}", 'train.learning_rate: expected a number, got "3e-3"'),
        ("train: {compile: maybe}", 'train.compile: expected auto, true or false, got "maybe"'),
        ("train: {max_tokens: many}", 'train.max_tokens: expected a whole number such as 64, 20M or 64Ki, got "many"'),
        ("train: {betas: [0.9]}", "train.betas: expected 2 items, got 1"),
        ("train: {optimizer: 3}", "train.optimizer: expected a text, got 3"),
        ("train: 3", "train: expected keys and values, got 3"),
        ("train: {precision: bf17}", "did you mean bf16?"),
        ("train: {learning_rate: .nan}", "finite number"),
        ("train: {learning_rate: 0}", "expected more than 0"),
        ("train: {log_every: true}", "got true"),
        ("train: {min_lr_ratio: 0.1, lr_scheduler: constant}", "min_lr_ratio works with"),
        ("train: {trainer_args: {optim: sgd}}", "trainer_args.optim is set by train.optimizer"),
        ("seed: -1", "seed: expected at least 0, got -1"),
        ("seed: 1.5", "seed: expected a whole number, got 1.5"),
        ("data: {train: a.txt, shuffle: no}", 'data.shuffle: expected true or false, got "no"'),
        ("data: {validation: 1%}", "data.train is missing"),
        ("data: {train: []}", "expected a source or a list of sources"),
        ("data: {train: 3}", "data.train"),
        ("data: {train: {text: x}}", "needs one of path, tokens"),
        ("data: {train: {path: a, tokens: b}}", "exclude each other"),
        ("data: {train: a.txt, validation: 1}", "a validation share must be below 100%"),
        ("data: {train: a.txt, validation: 100%}", "a validation share must be below 100%"),
        ("data: {train: a.txt, validation: {tail: 2}}", "expected a share below 100%"),
        ("data: {train: a.txt, validation: ./a.txt}", "is in both train and validation"),
        ("data: {train: [{path: a, weight: 1}, b]}", "some sources of train have a weight"),
        ("data: {train: {path: a, weight: 0}}", "data.train.weight: expected more than 0, got 0"),
        ("data: {train: {path: a, weight: .inf}}", "data.train.weight: expected a finite number"),
        ("data: {train: {path: a, weight: .nan}}", "data.train.weight: expected a finite number"),
        ("data: {train: a, validation: {path: b, weight: 1}}", "weight belongs to data.train\nremove it"),
        ("data: {train: a, validation: [b, {path: c, weight: 1}]}", "data.validation.1: weight belongs to data.train"),
        ("eval: {data: {path: b, weight: 1}}", "eval.data: weight belongs to data.train"),
        ("tokenizer: {}", "needs one of from, train"),
        ("tokenizer: {train: {vocab_size: 100}}", "at least 258"),
        ("tokenizer: {train: {algorithm: bytes, vocab_size: 300}}", "always has vocab_size 258"),
        ("model: {type: llama}", "type needs a size"),
        ("model: {preset: 10m}", "needs one of from, type"),
        ("model: {from: a/b, preset: 10m}", "preset and config belong to model.type"),
        ("model: {type: llama, preset: 11m}", "did you mean"),
        ("name: a/b", "cannot be a folder's name"),
        ("name: ..", "cannot be a folder's name"),
        ("- a", "is a list, not keys and values"),
        ("just words", "is a single value"),
        ("extends: [a, b]", "expected one file"),
        ("extends: nowhere.yaml", "extends: no recipe nowhere.yaml"),
    ],
)
def test_a_wrong_value_names_the_key_what_was_given_and_what_is_expected(text: str, words: str) -> None:
    found = lines_of(write("r.yaml", text + "\n"))
    assert words in found
    assert found.startswith("r.yaml")


def test_many_problems_are_at_most_eight_lines() -> None:
    text = lines_of(write("r.yaml", "\n".join(f"wrong{i}: 1" for i in range(50))))
    assert len(text.splitlines()) == 8
    assert text.endswith("and 44 more") or "more" in text.splitlines()[-1]


def test_problems_of_a_section_name_the_line_of_the_key_they_are_about() -> None:
    text = lines_of(write("r.yaml", "train:\n  max_steps: 1\n  lr_scheduler: constant\n  min_lr_ratio: 0.1\n"))
    assert text.startswith("r.yaml:4: ")


def test_extends_in_a_circle_is_an_error() -> None:
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    assert "circle" in lines_of("a.yaml")
    assert "circle" in lines_of(write("self.yaml", "extends: self.yaml\n"))


def test_extends_without_end_is_an_error() -> None:
    for index in range(30):
        write(f"r{index}.yaml", f"extends: r{index + 1}.yaml\n")
    assert "deeper than" in lines_of("r0.yaml")


@pytest.mark.parametrize("override", ["foo", "=1", "a..b=1", "extends=x"])
def test_what_is_no_override_is_a_usage_error(override: str) -> None:
    assert isinstance(error_of("base.yaml", override), UsageError)


def test_a_broken_value_of_an_override_is_named() -> None:
    assert lines_of("base.yaml", "train.betas=[0.9").startswith("override train.betas=[0.9: is not valid YAML")


def test_a_mistyped_builtin_name_gets_the_nearest_one() -> None:
    error = error_of("quickstrt")
    assert isinstance(error, UsageError)
    assert "did you mean quickstart?" in "\n".join(error.lines())
    assert "gptcli recipes list" in "\n".join(error.lines())


def test_a_folder_is_no_recipe(here: Path) -> None:
    (here / "folder").mkdir()
    assert "folder is a folder" in lines_of("folder")


@pytest.mark.parametrize("argument", ["", "nowhere.yaml", "x" * 5000, "a\0b", "/dev/null"])
def test_an_argument_that_is_no_recipe_is_a_usage_error(argument: str) -> None:
    assert isinstance(error_of(argument), UsageError)


def test_a_file_without_permission_is_an_error(here: Path) -> None:
    path = here / "locked.yaml"
    path.write_text("seed: 1\n", encoding="utf-8")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert "cannot be read" in lines_of("locked.yaml")


# require


def test_require_names_the_missing_section_with_an_example() -> None:
    loaded = load_recipe(write("r.yaml", "seed: 1\n"))
    with pytest.raises(RecipeError) as caught:
        loaded.require("pretrain", "data", "model")
    text = "\n".join(caught.value.lines())
    assert text.startswith("r.yaml: pretrain needs data")
    assert "builtin:pydocs" in text


def test_require_of_a_length_is_met_by_any_of_the_group() -> None:
    load_recipe("base.yaml", ["train.epochs=2"]).require("pretrain", "train.max_tokens", "data", "model")
    with pytest.raises(RecipeError, match=r"train.max_tokens or train.max_steps or train.epochs"):
        load_recipe("base.yaml", ["train.max_tokens=null"]).require("pretrain", "train.max_tokens")


def test_a_negative_share_is_no_path() -> None:
    assert "expected a share" in lines_of("base.yaml", "data.validation=-5%")


def test_two_kinds_of_a_sole_source_in_one_layer_is_an_error() -> None:
    assert "exclude each other" in lines_of("base.yaml", "data.train.path=a", "data.train.tokens=b")


def test_a_mapping_over_a_sole_path_adds_to_it(here: Path) -> None:
    loaded = load_recipe(write("near.yaml", "extends: base.yaml\ndata: {train: {text: body}}\n"))
    assert loaded.recipe.data is not None
    (source,) = loaded.recipe.data.train
    assert (source.path, source.text) == (str(here / "corpus.txt"), "body")
