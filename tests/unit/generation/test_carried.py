from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from gptcli.data.chat_template import NAMED, with_template
from gptcli.data.tokenizer import save_bytes_tokenizer
from gptcli.generation.carried import carry
from tests.tiny import make_model


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Bytes with ChatML's tokens."""
    folder = tmp_path / "bytes"
    folder.mkdir()
    save_bytes_tokenizer(folder)
    return AutoTokenizer.from_pretrained(with_template(folder, NAMED["chatml"]))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"temperature": 0.7, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5}),
        ({"temperature": 0, "max_new_tokens": 9}, {"do_sample": False, "max_new_tokens": 9}),
        ({"num_beams": 4}, {"do_sample": False, "num_beams": 4}),
    ],
)
def test_what_a_recipe_writes_and_the_end_of_a_turn_are_saved_with_the_model(
    tmp_path: Path, tokenizer: Any, written: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = make_model()
    carry(model, tokenizer, written)
    model.save_pretrained(tmp_path / "final")
    read = GenerationConfig.from_pretrained(tmp_path / "final")
    assert {name: getattr(read, name) for name in expected} == expected
    ends = read.eos_token_id if isinstance(read.eos_token_id, list) else [read.eos_token_id]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends


def test_a_template_that_takes_parts_alone_names_its_end_where_the_model_reads_media(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = make_model()
    carry(model, tokenizer, None, {"image": "<image>"})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


def test_without_a_section_only_the_ends_change(tmp_path: Path, tokenizer: Any) -> None:
    model = make_model()
    before = model.generation_config.to_dict()
    carry(model, tokenizer, None)
    after = model.generation_config.to_dict()
    assert {name for name in after if after[name] != before.get(name)} == {"eos_token_id"}
