from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptcli.evaluation.corpus import from_files
from gptcli.evaluation.evaluate import Evaluation, Keeping, Options, evaluate
from gptcli.reporting import Silent
from tests.conftest import shared_data
from tests.tiny import save_model

WINDOW = 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.evaluation.evaluate.best_device", lambda: CPU)


def score(folder: Path, file: Path, **options: int) -> Evaluation:
    corpus = from_files([str(file)], documents="blank-line")
    return evaluate(folder, corpus, Options(WINDOW, precision="fp32", **options), Silent())


def plain_loss(folder: Path, texts: list[str], stride: int) -> tuple[float, int]:
    """transformers' own tokenizer, model and loss, a window at a time: what it has seen is masked by -100."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        scored = 1
        for begin in range(0, ids.shape[1] - 1, stride):
            end = min(begin + WINDOW + 1, ids.shape[1])
            piece = ids[:, begin:end]
            labels = piece.clone()
            labels[:, : scored - begin] = -100
            with torch.no_grad():
                mean = model(input_ids=piece, labels=labels).loss.double()
            total += float(mean) * (end - scored)
            count += end - scored
            scored = end
            if end == ids.shape[1]:
                break
    return total, count


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("stride", [WINDOW, 24])
def test_wikitext_gives_the_perplexity_of_a_plain_loop_of_transformers(kind: str, stride: int, tmp_path: Path) -> None:
    text = shared_data("wikitext-2/test.txt").read_text(encoding="utf-8")[:12_000]
    documents = [part for part in text.split("\n \n") if part.strip()]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in documents))
    folder = save_model(tmp_path / kind, kind, max_position_embeddings=WINDOW + 1)
    result = score(folder, tmp_path / "text.jsonl", stride=stride).result
    total, count = plain_loss(folder, documents, stride)
    assert (result.documents, result.tokens) == (len(documents), count) and count > 5_000
    assert result.loss == pytest.approx(total / count, rel=1e-5)


def test_a_document_longer_than_any_window_is_scored_whole(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("all in one line " * 2_000)
    folder = save_model(tmp_path / "model")
    found = score(folder, tmp_path / "long.txt")
    assert (found.result.documents, found.result.bytes) == (1, 32_000) and found.result.tokens > 10 * WINDOW
    assert found.scores.loss_interval is None


def test_a_document_without_a_token_adds_its_bytes_and_no_loss(tmp_path: Path) -> None:
    from tokenizers import normalizers

    from tests.tiny import byte_tokenizer, make_model, wrapped

    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Replace("x", "")
    make_model().save_pretrained(tmp_path / "model")
    wrapped(tokenizer).save_pretrained(str(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("hello\n\nxxxx\n\nworld")
    found = score(tmp_path / "model", tmp_path / "text.txt")
    assert found.scores.tokens.tolist()[1] == 0 and found.scores.nats[1] == 0
    assert (found.result.documents, found.result.bytes) == (3, 14)


def test_scores_are_kept_by_the_content_of_the_model_and_asked_for_by_reuse_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("hello\n\nworld")
    corpus = from_files([str(tmp_path / "text.txt")], documents="blank-line")
    contents = ["one"]

    def evaluated(*, reuse: bool) -> Evaluation:
        return evaluate(folder, corpus, Options(), Silent(), keeping=Keeping(lambda _: contents[0], reuse))

    first = evaluated(reuse=True)
    loads: list[Path] = []
    monkeypatch.setattr("gptcli.evaluation.evaluate.load_model", lambda folder, **_: loads.append(folder))
    assert evaluated(reuse=True).as_dict() == first.as_dict() and not loads
    contents[0] = "other"
    for reuse in (True, False):
        with pytest.raises(AttributeError):
            evaluated(reuse=reuse)
    assert len(loads) == 2
