"""Chat templates: by name or from a file, checked, and kept beside the tokenizer that they are for.

The assistant's turns stand in `{% generation %}` marks, by which transformers tells what a model should say. Sources:
chatml: github.com/openai/openai-python, chatml.md; llama3: github.com/meta-llama/llama3, llama/tokenizer.py.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gptcli.data.tokenizer import kept_tokenizer, load_fast
from gptcli.errors import RecipeError
from gptcli.files import read_json, write_json

FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of `messages`, and the tokens that it marks turns with (only those of a name are known)."""

    text: str
    special_tokens: tuple[str, ...] = ()


def _turns(begin: str, end: str, behind: str) -> str:
    return (
        "{% for message in messages %}"
        f"{{{{ {begin} }}}}"
        "{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{{{{ message['content'] + {end} }}}}{{% endgeneration %}}"
        "{% else %}"
        f"{{{{ message['content'] + {end} }}}}"
        f"{{% endif %}}{{{{ {behind} }}}}"
        "{% endfor %}"
    )


NAMED = {
    "chatml": ChatTemplate(
        _turns("'<|im_start|>' + message['role'] + '\\n'", "'<|im_end|>'", "'\\n'")
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatTemplate(
        _turns("'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'", "'<|eot_id|>'", "''")
        + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
}


def find_template(name: str, *, where: str | None = None) -> ChatTemplate:
    """The template of a name or of a file. Raises `RecipeError` for one that is not there or no Jinja."""
    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if not path.is_file():
        remedy = f"Give a file, or one of: {', '.join(NAMED)}."
        raise RecipeError(f"there is no chat template {name}", where=where, remedy=remedy)
    try:
        text = path.read_text(encoding="utf-8")
        _check(text)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the chat template {name} cannot be used: {error}", where=where) from None
    return ChatTemplate(text)


def template_file(tokenizer: Path) -> Path:
    """The file in which a tokenizer's folder has its template."""
    return tokenizer / (FILE if (tokenizer / FILE).is_file() else "tokenizer_config.json")


def with_template(tokenizer: Path, template: ChatTemplate) -> Path:
    """A folder (in the cache, named by content) of the same tokenizer with this template.

    Tokens of the template that it lacks are added, with the next ids.
    """
    with tempfile.TemporaryDirectory(prefix="gptcli-tokenizer-") as name:
        work = Path(name)
        for path in tokenizer.iterdir():
            shutil.copyfile(path, work / path.name)
        (work / FILE).write_text(template.text, encoding="utf-8")
        config = read_json(work / "tokenizer_config.json")
        changed = config.pop("chat_template", None) is not None
        if added := absent_tokens(work, template):
            _add(work, added)
            config["additional_special_tokens"] = [*(config.get("additional_special_tokens") or []), *added]
        if changed or added:
            write_json(work / "tokenizer_config.json", config)
        return kept_tokenizer(work)


def absent_tokens(tokenizer: Path, template: ChatTemplate) -> list[str]:
    """The tokens by which a template marks turns that a folder's tokenizer has not."""
    vocabulary = load_fast(tokenizer).get_vocab(with_added_tokens=True)
    return [token for token in template.special_tokens if token not in vocabulary]


def _add(folder: Path, texts: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    tokenizer.save(str(folder / "tokenizer.json"))


def _check(text: str) -> None:
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The marks, which are transformers' own and no tag that Jinja knows."""

        tags = {"generation"}  # noqa: RUF012  (declared by jinja2 as it is here)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", Generation])
    try:
        environment.parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None
