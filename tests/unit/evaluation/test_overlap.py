from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.data.tokenize import prepare
from gptcli.errors import DataError
from gptcli.evaluation import corpus
from gptcli.evaluation.grams import BATCH_BYTES, distinct, grams, normalized
from gptcli.evaluation.overlap import Overlap, check_overlap
from gptcli.recipe.load import load_recipe
from gptcli.reporting import Silent

RECIPE = """\
tokenizer: {train: {algorithm: bytes}}
data: {train: {path: train.jsonl}, validation: 0, sequence_length: 32}
"""


def plain_grams(text: str) -> list[tuple[str, ...]]:
    """GPT-3's definition, word by word."""
    kept = "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS" and c != "\0")
    words = kept.split()
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def check(folder: Path, trained: list[str], asked: list[str], recipe: str = RECIPE, **limits: Any) -> Overlap:
    write(folder / "train.jsonl", trained)
    (folder / "r.yaml").write_text(recipe)
    data = corpus.from_files([write(folder / "asked.jsonl", asked)], **limits)
    return check_overlap(data, load_recipe(str(folder / "r.yaml")), Silent())


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice("abcdefghijklmnop") * rng.randint(1, 3) + str(rng.randint(0, 99)) for _ in range(count))


def test_planted_overlaps_are_found_and_counted_exactly(tmp_path: Path) -> None:
    secret = words(1, 20)
    trained = [words(2, 500), f"{words(3, 40)} {secret} {words(4, 40)}", words(5, 13)]
    asked = [
        f"{words(6, 30)}, {secret.upper().replace(' ', ' - ')}! {words(7, 30)}",  # 8 of 68 runs, otherwise written
        words(5, 13),  # the whole of it
        words(8, 50),
        " ".join(secret.split()[:12]),  # too short to say
        f"{' '.join(secret.split()[:12])} {words(9, 12)}",  # 12 words alike are not 13
    ]
    found = check(tmp_path, trained, asked)
    assert (found.documents, found.short, found.overlapping, found.share) == (5, 1, 2, 0.5)
    assert (found.grams, found.overlapping_grams) == (68 + 1 + 38 + 12, 8 + 1)
    assert found.training_documents == 3
    assert found.training_bytes == sum(len(text) for text in trained)
    whole, part = found.worst
    assert (whole.where.rpartition(":")[2], whole.grams, whole.overlapping) == ("2", 1, 1)
    assert (part.where.rpartition(":")[2], part.grams, part.overlapping) == ("1", 68, 8)
    assert part.example == " ".join(secret.split()[:13])
    assert json.loads(json.dumps(found.as_dict()))["share"] == 0.5


def test_the_counts_are_those_of_a_plain_loop_over_words_in_any_script(tmp_path: Path) -> None:
    rng = random.Random(0)
    written = "The|cat|«Straße»|ΟΔΟΣ|don't|don’t|\u2003|—|日本|x\0y|a\x1cb|İ|$5|é|ok."
    parts = written.split("|")
    stream = [rng.choice(parts) for _ in range(120)]
    texts = []
    for _ in range(300):
        begin = rng.randrange(100)
        piece = stream[begin : begin + rng.randint(1, 60)]
        texts.append(" ".join(rng.choice(parts) if rng.random() < 0.03 else part for part in piece))
    trained, asked = texts[:150], texts[150:]
    found = check(tmp_path, trained, asked)
    known = {gram for text in trained for gram in plain_grams(text)}
    expected = [(len(runs := plain_grams(text)), sum(run in known for run in runs)) for text in asked]
    expected = [counts for counts, text in zip(expected, asked, strict=True) if not text.isspace()]
    assert found.grams == sum(count for count, _ in expected)
    assert found.overlapping_grams == sum(hits for _, hits in expected) > 0
    assert found.short == sum(count == 0 for count, _ in expected)
    assert found.overlapping == sum(hits > 0 for _, hits in expected)
    best = max(hits / count for count, hits in expected if count)
    assert found.worst[0].overlapping / found.worst[0].grams == best


def test_a_document_longer_than_a_batch_has_every_run_once() -> None:
    text = words(1, BATCH_BYTES // 2)
    assert len(text) > 2 * BATCH_BYTES
    batches = list(grams(["a b", text, "c d", words(2, 20)]))
    assert len(batches) > 3
    owners = np.concatenate([first + owners for first, _, owners in batches])
    assert np.bincount(owners).tolist() == [0, BATCH_BYTES // 2 - 12, 0, 8]
    assert len(distinct(iter(batches))) == len(set(plain_grams(text))) + 8


def test_a_word_longer_than_a_batch_is_no_endless_loop() -> None:
    assert sum(len(found) for _, found, _ in grams([f"a {'x' * 3 * BATCH_BYTES} " * 3])) < 100


def test_what_is_held_out_of_training_is_not_in_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [words(number, 30) for number in range(100)])
    (tmp_path / "r.yaml").write_text(RECIPE.replace("validation: 0", "validation: 20%"))
    loaded = load_recipe(str(tmp_path / "r.yaml"))
    apart = check_overlap(corpus.from_recipe(loaded), loaded, Silent())
    assert apart.overlapping == 0 and apart.documents + apart.training_documents == 100 and apart.documents > 5
    same = check_overlap(corpus.from_files([str(tmp_path / "train.jsonl")]), loaded, Silent())
    assert same.overlapping == apart.training_documents


def test_tokens_made_before_are_decoded(tmp_path: Path) -> None:
    trained, asked = [words(1, 30), words(2, 30)], [words(2, 30), words(3, 30)]
    text = check(tmp_path, trained, asked)
    prepared = prepare(load_recipe(str(tmp_path / "r.yaml")), Silent())
    recipe = (
        f"tokenizer: {{from: {prepared.tokenizer}}}\n"
        f"data: {{train: {{tokens: {prepared.train.folder}}}, validation: 0, sequence_length: 32}}\n"
    )
    (tmp_path / "tokens.yaml").write_text(recipe)
    data = corpus.from_files([str(tmp_path / "asked.jsonl")])
    tokens = check_overlap(data, load_recipe(str(tmp_path / "tokens.yaml")), Silent())
    assert tokens.overlapping == text.overlapping == 1
    assert {**tokens.as_dict(), "recipe": ""} == {**text.as_dict(), "recipe": ""}


def test_limits_hold_and_nothing_to_judge_has_no_share(tmp_path: Path) -> None:
    assert check(tmp_path, [words(1, 30)], [words(1, 30), words(1, 30)], limit=1).documents == 1
    short = check(tmp_path, [words(1, 30)], ["three short words"])
    assert (short.share, short.short, short.worst) == (None, 1, ())
    with pytest.raises(DataError, match="no text"):
        check(tmp_path, [words(1, 30)], [])


def test_words_are_lowercased_without_punctuation() -> None:
    assert normalized("Don't  STOP--now, a_b (50%)!").split() == b"dont stopnow ab 50".split()
    assert normalized("Ça—va « bien »?").split() == "çava bien".encode().split()
