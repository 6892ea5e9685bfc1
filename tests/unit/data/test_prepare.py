from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.data import tokenizer_training
from gptcli.data.report import report_lines
from gptcli.data.shards import Shards
from gptcli.data.tokenize import Prepared
from gptcli.data.tokenizer import load_fast
from gptcli.errors import DataError, RecipeError

Prepare = Callable[..., Prepared]
BPE = "{train: {algorithm: bpe, vocab_size: 280, pattern: gpt4}}"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 lines in two files, every tenth written in both."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "ab":
        lines = [f"line {n}" + ("" if n % 10 == 0 else f" of {name}") + " and more text" for n in range(200)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        os.utime(folder / f"{name}.txt", (1_600_000_000, 1_600_000_000))
    return folder


def decoded(shards: Shards) -> list[str]:
    return [bytes(ids.astype(np.uint8)).decode() for ids, _ in shards.evaluation_documents()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_on_one_side_and_duplicates_on_the_same(prepared: Prepare, corpus: Path) -> None:
    result = prepared("{train: corpus, documents: line, validation: 20%, sequence_length: 16}")
    assert result.validation is not None
    train, validation = decoded(result.train), decoded(result.validation)
    lines = [line for name in "ab" for line in (corpus / f"{name}.txt").read_text().splitlines() if line]
    assert sorted(train + validation) == sorted(lines)
    assert not set(train) & set(validation)
    assert 20 < len(validation) < 160
    both = result.report["train"]["documents"] + result.report["validation"]["documents"]
    assert (both, result.report["dropped"]) == (400, {"empty": 2})


def test_a_second_run_reads_nothing_and_gives_the_same_bytes(
    prepared: Prepare, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "{train: corpus, documents: line, validation: 10%, sequence_length: 16}"
    first = prepared(data, tokenizer=BPE)
    before = files(cache / "data") | files(cache / "tokenizers")
    again = prepared(data, tokenizer=BPE)
    assert (first.reused, again.reused) == (False, True)
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint)
    monkeypatch.setattr(tokenizer_training, "train_bpe", None)
    prepared(data, tokenizer=BPE)
    monkeypatch.undo()
    monkeypatch.setenv("GPTCLI_CACHE", str(cache))
    for name in ("data", "tokenizers"):
        shutil.rmtree(cache / name)
    anew = prepared(data, tokenizer=BPE)
    assert not anew.reused
    assert files(cache / "data") | files(cache / "tokenizers") == before
    assert {path.name for path in (cache / "data").iterdir()} == {first.train.folder.parent.name}


def test_the_key_is_content_and_not_paths_and_a_changed_file_is_a_new_key(prepared: Prepare, corpus: Path) -> None:
    data = "{train: %s, documents: line, validation: 10%%, sequence_length: 16}"
    first = prepared(data % "corpus")
    shutil.copytree(corpus, corpus.parent / "moved")
    moved = prepared(data % "moved")
    assert moved.reused and moved.fingerprint == first.fingerprint
    assert prepared((data % "corpus").replace("16", "8")).reused
    with (corpus / "b.txt").open("a") as file:
        file.write("one more line\n")
    changed = prepared(data % "corpus")
    assert not changed.reused and changed.fingerprint != first.fingerprint
    assert not prepared((data % "moved").replace("10%", "11%")).reused


def test_the_tokenizer_is_trained_on_training_documents_only(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("abcdefgh " * 900 + "XYZW " * 100)
    seen: list[str] = []
    train_bpe = tokenizer_training.train_bpe

    def spy(texts: Any, folder: Path, **options: Any) -> int:
        seen.extend(texts)
        return train_bpe(seen, folder, **options)

    monkeypatch.setattr(tokenizer_training, "train_bpe", spy)
    result = prepared("{train: one.txt, validation: {tail: 10%}, sequence_length: 8}", tokenizer=BPE)
    text = (tmp_path / "one.txt").read_text()
    assert "".join(seen) == text[: int(len(text) * 0.9)]
    assert result.validation is not None
    tokenizer = load_fast(result.tokenizer)
    ids, size = next(result.validation.evaluation_documents())
    assert tokenizer.decode(ids.tolist()) == text[int(len(text) * 0.9) :]
    assert size == len(text) - int(len(text) * 0.9)


def test_a_text_too_small_for_the_vocabulary_is_said(prepared: Prepare, corpus: Path, lines: Any) -> None:
    result = prepared("{train: corpus, validation: 0, sequence_length: 16}", tokenizer=BPE.replace("280", "8000"))
    size = result.report["tokenizer"]["vocab_size"]
    assert size == result.train.vocab_size < 8000
    assert any(f"{size:,} entries, not 8,000" in line for line in lines.said)
    assert result.validation is None and result.report["validation"] is None


def test_shards_are_those_of_the_recipe_and_each_source_begins_its_own(prepared: Prepare, corpus: Path) -> None:
    data = (
        "{train: [{path: corpus/a.txt, limit: 50, documents: line}, corpus/b.txt], validation: 0, sequence_length: 64}"
    )
    result = prepared(data, "tokenize.shard_tokens=1000")
    sources = result.train.manifest["sources"]
    assert [source["name"] for source in sources] == ["a.txt", "b.txt"]
    assert [source["documents"] for source in sources] == [50, 1]
    assert all(shard["tokens"] <= 1000 for source in sources for shard in source["shards"])
    report = result.report
    assert report["rows"] == sum((source["tokens"] - 1) // 64 for source in sources)
    assert report["unused_tail_tokens"] == sum((source["tokens"] - 1) % 64 for source in sources)
    assert json.loads(json.dumps(report)) == report
    assert any("rows of 64 tokens" in line for line in report_lines(report))


def test_validation_may_be_sources_of_its_own(prepared: Prepare, corpus: Path) -> None:
    result = prepared("{train: corpus/a.txt, validation: {path: corpus/b.txt, documents: line}, sequence_length: 16}")
    assert result.validation is not None
    assert (result.train.documents, result.validation.documents) == (1, 200)


def test_the_report_counts_exactly(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nab\n\n  \nabc\0\n<|endoftext|>x\n" + "y" * 70_000 + "\n")
    report = prepared("{train: a.txt, documents: line, validation: 0, sequence_length: 4}").report
    assert report["train"]["document_tokens"] == {"min": 2, "p10": 2, "p50": 3, "p90": 5, "p99": 5, "max": 70_001}
    assert report["dropped"] == {"empty": 2}
    assert (report["train"]["with_nul"], report["train"]["specials_in_text"]) == (1, 1)
    assert report["train"]["bytes"] == 1 + 2 + 4 + 14 + 70_000


def test_bad_rows_are_skipped_and_counted_only_when_the_recipe_says_so(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine text"}\n{"text": 1}\n')
    with pytest.raises(DataError) as caught:
        prepared("{train: a.jsonl, validation: 0, sequence_length: 4}")
    assert str(caught.value.where).endswith("a.jsonl:2")
    result = prepared("{train: a.jsonl, validation: 0, sequence_length: 4, on_bad_row: skip}")
    assert result.report["dropped"] == {"not text": 1}
    assert not list((result.train.folder.parent.parent).glob(".*"))


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        ("{train: corpsu, sequence_length: 4}", "no file", "corpus"),
        ("{train: empty.txt, sequence_length: 4}", "no documents", "text"),
        ("{train: corpus/a.txt, sequence_length: 4}", "leaves none for validation", "tail: 10%"),
        ("{train: corpus/a.txt, validation: 99.999%, sequence_length: 4}", "leaves none for training", "tail: 10%"),
        ("{train: corpus/a.txt, validation: empty.txt, sequence_length: 4}", "validation has no documents", "text"),
        ("{train: short.txt, validation: 0, sequence_length: 100}", "11 tokens", "data.sequence_length: 8"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["{train: {algorithm: bytes}}", BPE])
def test_bad_data_is_an_error_with_place_and_remedy(
    prepared: Prepare, corpus: Path, data: str, what: str, remedy: str, tokenizer: str
) -> None:
    (corpus.parent / "empty.txt").write_text(" \n")
    (corpus.parent / "short.txt").write_text("a b c d ef")
    if tokenizer == BPE:
        what = what.replace("11 tokens", "tokens, which is less")
    with pytest.raises(DataError, match=what) as caught:
        prepared(data, tokenizer=tokenizer)
    assert remedy in str(caught.value.remedy) or "short" in data
    assert "recipe.yaml" in str(caught.value.where)
    assert len(caught.value.lines()) <= 8


def test_a_file_in_both_train_and_validation_is_refused(prepared: Prepare, corpus: Path) -> None:
    with pytest.raises(RecipeError, match=r"a\.txt is in both"):
        prepared("{train: corpus, validation: corpus/a.txt, sequence_length: 4}")


def test_damaged_prepared_data_is_named_and_not_used(prepared: Prepare, corpus: Path) -> None:
    data = "{train: corpus, validation: 0, sequence_length: 16}"
    folder = prepared(data).train.folder
    path = folder / "source-000-shard-00000.tokens.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError) as caught:
        prepared(data)
    assert caught.value.where == str(path)
    assert f"rm -r {folder.parent}" in str(caught.value.remedy)


def test_nothing_is_left_behind_when_the_job_fails(prepared: Prepare, corpus: Path, cache: Path) -> None:
    (corpus / "c.txt").write_bytes(b"\xff")
    with pytest.raises(DataError):
        prepared("{train: corpus, validation: 0, sequence_length: 16}")
    assert list((cache / "data").iterdir()) == []


def test_sources_of_the_same_name_are_told_apart_by_their_folders(prepared: Prepare, tmp_path: Path) -> None:
    assert names_of(prepared, tmp_path, "[a/train.txt, b/train.txt, other.txt]") == [
        "a/train.txt",
        "b/train.txt",
        "other.txt",
    ]


def names_of(prepared: Prepare, folder: Path, sources: str) -> list[str]:
    for name in ("a/train.txt", "b/train.txt", "a/x/train.txt", "b/x/train.txt", "other.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}")
    result = prepared(f"{{train: {sources}, validation: 0, sequence_length: 4}}")
    names = [source["name"] for source in result.report["train"]["sources"]]
    assert names == [source["name"] for source in result.train.manifest["sources"]]
    assert all(any(name in line for line in report_lines(result.report)) for name in names)
    return names


@pytest.mark.parametrize(
    "sources", ["[a/train.txt, b/train.txt]", "[a/x/train.txt, b/x/train.txt, other.txt]", "['a/*.txt', 'b/*.txt']"]
)
def test_no_two_sources_have_the_same_name(prepared: Prepare, tmp_path: Path, sources: str) -> None:
    names = names_of(prepared, tmp_path, sources)
    assert len(set(names)) == len(names)
    assert not any(str(tmp_path) in name for name in names)


def test_a_path_written_twice_is_read_twice(prepared: Prepare, tmp_path: Path) -> None:
    names = names_of(prepared, tmp_path, "[other.txt, other.txt]")
    assert len(names) == 2 and all(name.endswith("other.txt") for name in names)
    assert not any(str(tmp_path.parent) in name for name in names)


def test_verify_finds_a_source_that_changed_without_its_stat_and_a_flipped_byte_of_a_shard(
    prepared: Prepare, corpus: Path, cache: Path
) -> None:
    data = "{train: corpus, documents: line, validation: 0, sequence_length: 16}"
    first = prepared(data)
    path = corpus / "a.txt"
    path.write_text(path.read_text().replace("line 7 ", "LINE 7 "))
    os.utime(path, (1_600_000_000, 1_600_000_000))
    assert prepared(data).fingerprint == first.fingerprint
    command = [sys.executable, "-m", "gptcli", "tokenize", str(corpus.parent / "recipe.yaml"), "--verify", "--json"]
    environment = {**os.environ, "GPTCLI_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["reused"] and found["fingerprint"] != first.fingerprint
    again = prepared(data)
    assert again.reused and again.fingerprint == found["fingerprint"]
    assert any(text.startswith("LINE 7 ") for text in decoded(again.train))
    shard = again.train.folder / "source-000-shard-00000.tokens.npy"
    stat = shard.stat()
    raw = bytearray(shard.read_bytes())
    raw[1_000] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert str(shard) in done.stderr and "rm -r" in done.stderr and "Traceback" not in done.stderr
