"""Chat templates: by name or from a file, as transformers applies them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.data.chat_template import NAMED, find_template, with_template
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import load_fast, tokenizer_fingerprint, train_bpe
from gptcli.errors import GptcliError, RecipeError
from gptcli.model.load import load_tokenizer
from gptcli.recipe.load import load_recipe

Prepare = Callable[..., Prepared]
DATA = "{train: a.txt, validation: 0, sequence_length: 4}"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there>\n"},
    {"role": "assistant", "content": "Hello, été!"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": " and more"},
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi <there>\n<|im_end|>\n"
    "<|im_start|>assistant\nHello, été!<|im_end|>\n"
    "<|im_start|>user\nMore<|im_end|>\n"
    "<|im_start|>assistant\n and more<|im_end|>\n"
)
LLAMA3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi <there>\n<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello, été!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n and more<|eot_id|>"
)
FILE = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
[A]{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- else %}
[{{ message['role'][0] | upper }}]{{ message['content'] }}
{%- endif %}
{%- if loop.index0 > 99 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[A]{% endif %}"""
OF_FILE = "[S]Be brief.[U]Hi <there>\n[A]Hello, été!<|endoftext|>[U]More[A] and more<|endoftext|>"
EXPECTED = {
    "chatml": (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "templates/mine.jinja": (OF_FILE, "[A]", "<|endoftext|>"),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text to train a tokenizer on, some text. " * 20)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "mine.jinja").write_text(FILE)
    return tmp_path


def auto(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("template", EXPECTED)
@pytest.mark.parametrize("way", ["train", "from"])
def test_transformers_applies_the_template_and_marks_what_the_assistant_says(
    prepared: Prepare, project: Path, template: str, way: str
) -> None:
    if way == "train":
        tokenizer = f"{{train: {{vocab_size: 290}}, chat_template: {template}}}"
    else:
        train_bpe(["some text"], project / "tok", vocab_size=262, pattern="gpt4", special_tokens=["<|im_end|>"])
        path = project / "tok" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ 'its own' }}"}))
        tokenizer = f"{{from: tok, chat_template: {template}}}"
    folder = prepared(DATA, tokenizer=tokenizer).tokenizer
    loaded = auto(folder)
    text, prompt, end = EXPECTED[template]
    assert loaded.apply_chat_template(TURNS, tokenize=False) == text
    assert loaded.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == text + prompt
    assert loaded.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True).endswith(prompt)
    encoded = loaded.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert loaded.decode(ids) == text
    runs = [
        loaded.decode([token for token, inside in zip(ids, runs_of(mask), strict=True) if inside == run])
        for run in range(1, max(runs_of(mask)) + 1)
    ]
    assert runs == [f"Hello, été!{end}", f" and more{end}"]


def runs_of(mask: list[int]) -> list[int]:
    """The number of the run of ones, from 1, that each place is in; 0: in none."""
    found, number = [], 0
    for at, marked in enumerate(mask):
        number += bool(marked and (at == 0 or not mask[at - 1]))
        found.append(number if marked else 0)
    return found


@pytest.mark.parametrize("template", NAMED)
def test_the_tokens_of_a_named_template_are_single_tokens_that_are_never_split(
    prepared: Prepare, project: Path, template: str
) -> None:
    result = prepared(DATA, tokenizer=f"{{train: {{vocab_size: 280}}, chat_template: {template}}}")
    loaded = auto(result.tokenizer)
    fast = load_fast(result.tokenizer)
    names = NAMED[template].special_tokens
    assert fast.get_vocab_size() == result.train.vocab_size == 280
    assert [fast.token_to_id(name) for name in names] == list(range(2, 2 + len(names)))
    assert set(names) <= set(loaded.all_special_tokens)
    for name in names:
        assert fast.encode(f"some{name}text").tokens.count(name) == 1
        assert loaded(f"x{name}{name}")["input_ids"][-2:] == [fast.token_to_id(name)] * 2
        assert loaded.decode(loaded(f"some{name}text")["input_ids"], skip_special_tokens=True) == "sometext"


def test_special_tokens_written_twice_are_one(prepared: Prepare, project: Path) -> None:
    tokenizer = "{train: {vocab_size: 270, special_tokens: ['<|im_end|>', '<a>', '<a>']}, chat_template: chatml}"
    folder = prepared(DATA, tokenizer=tokenizer).tokenizer
    fast = load_fast(folder)
    assert [fast.id_to_token(number) for number in range(6)] == [
        "<|endoftext|>",
        "<|pad|>",
        "<|im_end|>",
        "<a>",
        "<|im_start|>",
        fast.id_to_token(5),
    ]
    assert len(fast.id_to_token(5)) == 1


def test_a_vocabulary_too_small_for_the_tokens_of_the_template_is_code_2(prepared: Prepare, project: Path) -> None:
    tokenizer = "{train: {vocab_size: 260}, chat_template: llama3}"
    with pytest.raises(RecipeError, match="at least 261: 256 bytes and 5 specials") as caught:
        prepared(DATA, tokenizer=tokenizer)
    assert caught.value.exit_code == 2
    assert "recipe.yaml:1" in str(caught.value.where) and "261" in str(caught.value.remedy)
    assert load_fast(prepared(DATA, tokenizer=tokenizer.replace("260", "261")).tokenizer).get_vocab_size() == 261


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{% for message in messages %}\n{{ message }}\n", "line 2"),
        ("a\nb\n{{ message['content' }}", "line 3"),
        ("{% for m in messages %}\n\n{% nothing %}{% endfor %}", "line 3"),
        ("x\n{%\n generation %}{{ messages }}", "line 3"),
        ("x\n{{ messages }}{% endgeneration %}", "line 2"),
        ("{% if true %}{% generation %}\n{% endif %}{% endgeneration %}", "line 2"),
    ],
)
def test_broken_jinja_is_code_2_with_its_line(prepared: Prepare, project: Path, text: str, line: str) -> None:
    (project / "broken.jinja").write_text(text)
    with pytest.raises(RecipeError) as caught:
        prepared(DATA, tokenizer="{train: {algorithm: bytes}, chat_template: broken.jinja}")
    assert caught.value.exit_code == 2
    assert line in str(caught.value) and "broken.jinja" in str(caught.value)
    assert "recipe.yaml:1" in str(caught.value.where)


@pytest.mark.parametrize("name", ["nothing", "nothing.jinja", "templates", "latin.jinja"])
def test_an_unknown_template_is_code_2(prepared: Prepare, project: Path, name: str) -> None:
    (project / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(GptcliError) as caught:
        prepared(DATA, tokenizer=f"{{train: {{algorithm: bytes}}, chat_template: {name}}}")
    assert caught.value.exit_code == 2
    assert name in str(caught.value) and "recipe.yaml:1" in str(caught.value.where)
    assert name == "latin.jinja" or "chatml, llama3" in str(caught.value.remedy)


def test_a_template_is_read_and_never_run(prepared: Prepare, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2

    def run(*args: Any, **options: Any) -> None:
        raise AssertionError("a template was run")

    evil = "{{ ''.__class__.__mro__ }}{% set x = cycler.__init__.__globals__.os.system('false') %}{% for i in 1 %}"
    (project / "evil.jinja").write_text(evil + "{% endfor %}")
    with monkeypatch.context() as patch:
        for name in ("render", "generate", "stream", "make_module", "from_code"):
            patch.setattr(jinja2.Template, name, run)
        patch.setattr(jinja2.Environment, "compile", run)
        folder = prepared(DATA, tokenizer="{train: {algorithm: bytes}, chat_template: evil.jinja}").tokenizer
    assert (folder / "chat_template.jinja").read_text() == evil + "{% endfor %}"
    with pytest.raises(jinja2.exceptions.SecurityError):
        auto(folder).apply_chat_template(TURNS, tokenize=False)


def test_a_new_template_is_a_new_tokenizer_and_the_same_one_is_not(
    prepared: Prepare, project: Path, cache: Path
) -> None:
    def made(template: str | None) -> Prepared:
        chosen = f", chat_template: {template}" if template else ""
        return prepared(DATA, tokenizer=f"{{train: {{algorithm: bytes}}{chosen}}}")

    first = made("templates/mine.jinja")
    shutil.copyfile(project / "templates" / "mine.jinja", project / "copy.jinja")
    again = made("copy.jinja")
    assert again.reused and again.tokenizer == first.tokenizer
    (project / "copy.jinja").write_text(FILE + "\n")
    others = [made("copy.jinja"), made("chatml"), made("llama3"), made(None)]
    prints = {each.tokenizer_fingerprint for each in (first, *others)}
    assert len(prints) == 5 == len({each.fingerprint for each in (first, *others)})
    for each in (first, *others[:3]):
        assert each.tokenizer.name == tokenizer_fingerprint(each.tokenizer) == each.tokenizer_fingerprint


def test_a_template_file_is_beside_the_recipe_or_where_an_override_is_written(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = project / "recipe.yaml"
    recipe.write_text(
        f"tokenizer: {{train: {{algorithm: bytes}}, chat_template: templates/mine.jinja}}\ndata: {DATA}\n"
    )
    here = tmp_path_factory.mktemp("here")
    (here / "other.jinja").write_text("other")
    monkeypatch.chdir(here)
    for overrides, expected in (((), FILE), (("tokenizer.chat_template=other.jinja",), "other")):
        section = load_recipe(str(recipe), overrides).recipe.tokenizer
        assert section is not None and section.chat_template is not None
        assert find_template(section.chat_template).text == expected


def test_the_folder_of_a_template_is_the_tokenizer_and_the_template_alone(tmp_path: Path) -> None:
    special = NAMED["chatml"].special_tokens
    train_bpe(["text"], tmp_path / "tok", vocab_size=260, pattern="gpt4", special_tokens=special)
    before = {path.name: path.read_bytes() for path in (tmp_path / "tok").iterdir()}
    folder = with_template(tmp_path / "tok", NAMED["chatml"])
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == before | {"chat_template.jinja": NAMED["chatml"].text.encode()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "tok").iterdir()} == before


def test_tokens_of_a_template_that_a_tokenizer_lacks_follow_its_own(tmp_path: Path) -> None:
    train_bpe(["text"], tmp_path / "tok", vocab_size=258, pattern="gpt4")
    before = load_fast(tmp_path / "tok").get_vocab(with_added_tokens=True)
    folder = with_template(tmp_path / "tok", NAMED["chatml"])
    after = load_fast(folder).get_vocab(with_added_tokens=True)
    assert after == before | {"<|im_start|>": len(before), "<|im_end|>": len(before) + 1}
    assert load_fast(folder).encode("a<|im_end|>").ids[-1] == len(before) + 1
    by_transformers = load_tokenizer(folder)
    assert by_transformers.encode("<|im_start|>", add_special_tokens=False) == [len(before)]
    assert with_template(folder, NAMED["chatml"]) == folder, "nothing is added twice"
