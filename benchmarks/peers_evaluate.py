"""One way to measure the loss of texts, for `evaluate.py`: its own process, so that its memory is its own.

    python benchmarks/peers_evaluate.py WAY FOLDER [FILE]

WAY is one of ours, bare (batched forward passes of windows of like length, the loss by `cross_entropy`), lm_eval-N (its
rolling log-likelihood in batches of N); evaluate (the whole of `gptcli eval` on FILE by lines). FOLDER holds the model
and texts.json. Prints JSON: seconds, tokens, nats.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import json
import time
from pathlib import Path
from typing import Any

import torch

WINDOW, BATCH = 512, 2048


def main() -> None:
    way, name, *more = sys.argv[1:]
    folder = Path(name)
    if way == "evaluate":
        found = whole(folder, more[0])
    else:
        from gptcli.model.load import load_model

        texts = json.loads((folder / "texts.json").read_text())
        model = load_model(folder, dtype="fp32", device=torch.device("cpu"))
        function = {"ours": ours, "bare": bare}.get(way) or lm_eval
        work = function(folder, model, int(way.partition("-")[2] or 0))
        work(texts[:1])
        start = time.perf_counter()
        nats, tokens = work(texts)
        found = (time.perf_counter() - start, tokens, nats)
    print(json.dumps(dict(zip(("seconds", "tokens", "nats"), found, strict=True))))


def ours(folder: Path, model: Any, _: int) -> Any:
    from gptcli.data.encode import document_tokens, make_encoder
    from gptcli.evaluation.loss import document_loss

    encoder = make_encoder(folder)

    def work(texts: list[str]) -> tuple[float, int]:
        result = document_loss(model, document_tokens(texts, encoder), prefix_id=0, sequence_length=WINDOW)
        return result.nats, result.tokens

    return work


def bare(folder: Path, model: Any, _: int) -> Any:
    from torch.nn.functional import cross_entropy
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def work(texts: list[str]) -> tuple[float, int]:
        windows = []
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            all_ids = [0, *ids]
            windows += [all_ids[begin : begin + WINDOW + 1] for begin in range(0, len(ids), WINDOW)]
        windows.sort(key=len, reverse=True)
        nats, tokens, done = 0.0, 0, 0
        while done < len(windows):
            width = len(windows[done]) - 1
            batch = windows[done : done + max(1, BATCH // width)]
            done += len(batch)
            inputs = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in batch])
            labels = torch.tensor([row[1:] + [-100] * (width + 1 - len(row)) for row in batch])
            logits = model(input_ids=inputs, use_cache=False).logits
            nats += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            tokens += int((labels >= 0).sum())
        return nats, tokens

    return work


def lm_eval(folder: Path, model: Any, rows: int) -> Any:
    from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=WINDOW)

    def work(texts: list[str]) -> tuple[float, int]:
        asked = [
            Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
            for number, text in enumerate(texts)
        ]
        nats = -sum(wrapped.loglikelihood_rolling(asked, disable_tqdm=True))
        return nats, sum(len(wrapped.tok_encode(text)) for text in texts)

    return work


def whole(folder: Path, file: str) -> tuple[float, int, float]:
    from gptcli.evaluation.corpus import from_files
    from gptcli.evaluation.evaluate import Keeping, Options, evaluate
    from gptcli.reporting import Silent

    start = time.perf_counter()
    corpus = from_files([file], documents="line")
    keeping = Keeping(lambda model: model.name)
    result = evaluate(folder, corpus, Options(sequence_length=WINDOW), Silent(), keeping=keeping).result
    return time.perf_counter() - start, result.tokens, result.nats


if __name__ == "__main__":
    main()
