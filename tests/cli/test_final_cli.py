"""`final/` is a plain Hugging Face folder: it loads without gptcli, and a plain loop gives the loss of `eval`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli, shared_data

PLAIN_LOOP = """
import json, sys
sys.modules["gptcli"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text_file, window = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
text = open(text_file, encoding="utf-8").read()
ids = torch.tensor([tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False)["input_ids"])
nats, tokens = 0.0, 0
with torch.no_grad():
    for begin in range(0, len(ids) - 1, window):
        part = ids[begin : begin + window + 1]
        logits = model(part[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
        tokens += len(part) - 1
print(json.dumps({"loss": nats / tokens, "tokens": tokens}))
"""


def plain_loop(final: Path, text: Path, window: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_LOOP, str(final), str(text), str(window)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout)
    return result


def test_a_plain_loop_without_gptcli_gives_the_loss_of_eval(project: Path, run_cli: Cli) -> None:
    assert run_cli("pretrain", "tiny.yaml", "--quiet", cwd=project).code == 0
    (project / "held.txt").write_text("The model keeps 12 rows.\n\nÜber 世界 and 🎉, a text that it never saw." * 5)
    done = run_cli("eval", "tiny", "--data", "held.txt", "--json", cwd=project)
    assert done.code == 0, done.err
    plain = plain_loop(project / "runs" / "tiny" / "final", project / "held.txt", 32)
    assert done.json()["tokens"] == plain["tokens"]
    assert done.json()["loss"] == pytest.approx(plain["loss"], abs=1e-4)


@pytest.mark.slow_fault
def test_shakespeare_by_bytes_from_the_shipped_recipe(tmp_path: Path, run_cli: Cli) -> None:
    text = shared_data("tinyshakespeare/input.txt")
    done = run_cli(
        "pretrain", "shakespeare-bytes", f"data.train.path={text}", "train.max_steps=20", "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    # The last tenth of the text, byte by byte: every one is scored once.
    characters = text.read_text(encoding="utf-8")
    held = characters[int(len(characters) * 0.9) :]
    evaluated = run_cli("eval", "--json", cwd=tmp_path)
    assert evaluated.json()["tokens"] == evaluated.json()["bytes"] == len(held.encode())
    assert evaluated.json()["loss"] == pytest.approx(done.json()["validation"]["loss"], abs=1e-6)
    assert done.json()["validation"]["loss"] < 4.0
