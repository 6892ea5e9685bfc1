from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gptcli.data.sources import (
    Document,
    FileInput,
    Files,
    Tally,
    find_files,
    find_inputs,
    place,
    read_documents,
    reading_of,
    source_name,
)
from gptcli.errors import DataError, MissingError
from gptcli.recipe.schema import Source

TEXTS = ['one, "two"\nthree', "中文 文本", "emoji 🙂\0nul", "x" * 200_000]


def documents(path: object, cut: str = "file", **options: Any) -> list[str]:
    return [document.text for document in read(path, cut, **options)]


def read(path: object, cut: str = "file", **options: Any) -> Iterator[Document]:
    own = {key: options.pop(key) for key in ("tally", "on_bytes") if key in options}
    on_bad_row = options.pop("on_bad_row", "error")
    source = Source.model_validate({"path": str(path), **options})
    reading = reading_of(source, cut, on_bad_row)
    return read_documents(find_inputs(source), reading, limit=source.limit, **own)


def places(path: object, cut: str = "file", **options: Any) -> list[str]:
    source = Source.model_validate({"path": str(path), **options})
    inputs, layout = find_inputs(source), reading_of(source, cut, "error").layout
    return [place(inputs[document.part], document.mark(), layout) for document in read(path, cut, **options)]


def compress(raw: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(raw)
    return zstandard.compress(raw[:7]) + zstandard.compress(raw[7:]) if suffix == ".zst" else raw


def written(suffix: str) -> bytes:
    """TEXTS as a file of one kind."""
    if suffix == ".jsonl":
        return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in TEXTS).encode()
    if suffix == ".csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([["n", "text"], *(["1", text] for text in TEXTS)])
        return buffer.getvalue().encode()
    if suffix == ".tsv":
        return "".join(
            f"{n}\t{text}\n" for n, text in [("n", "text"), *(("1", t.replace("\n", " ")) for t in TEXTS)]
        ).encode()
    if suffix == ".parquet":
        stream = io.BytesIO()
        pq.write_table(pa.table({"n": [1] * len(TEXTS), "text": TEXTS}), stream, row_group_size=2)
        return stream.getvalue()
    return "\n\n".join(TEXTS).encode()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_suffix_is_read_plain_and_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(compress(written(suffix), compression))
    expected = [text.replace("\n", " ") for text in TEXTS] if suffix == ".tsv" else TEXTS
    assert documents(path, "blank-line") == expected


def test_plain_text_is_a_file_its_lines_or_its_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \nthree\n")
    tally = Tally()
    assert documents(path) == ["one\ntwo\n\n \nthree\n"]
    assert documents(path, "line", tally=tally) == ["one", "two", "three"]
    assert documents(path, "blank-line") == ["one\ntwo", "three"]
    assert documents(path, "file", documents="line") == ["one", "two", "three"]
    assert dict(tally.dropped) == {"empty": 2}
    assert [at.rpartition(":")[2] for at in places(path, "blank-line")] == ["1", "5"]


def test_a_bom_is_dropped_from_tables_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\r\nhello,1\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\r\n\r\n')
    assert documents(tmp_path / "a.csv") == documents(tmp_path / "a.jsonl") == ["hello"]


def test_columns_name_the_fields_of_a_file_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('a "quoted\t1\nb\t0\n')
    assert documents(tmp_path / "a.tsv", columns=["sentence", "label"], text="sentence") == ['a "quoted', "b"]


BAD = {
    "a.txt": (b"fine\nbro\xffken\n", 2, "not UTF-8"),
    "a.jsonl": (b'{"text": "fine"}\n{"text": \n{"text": "fine"}\n', 2, "not JSON"),
    "b.jsonl": (b'{"text": "fine"}\n[1]\n{"text": "fine"}\n', 2, "not JSON"),
    "c.jsonl": (b'{"text": "fine"}\n{"txt": "x"}\n{"text": "fine"}\n', 2, "wrong columns"),
    "d.jsonl": (b'{"text": "fine"}\n{"text": 3}\n{"text": "fine"}\n', 2, "not text"),
    "e.jsonl": (b'{"text": "fine"}\n{"text": null}\n{"text": "fine"}\n', 2, "not text"),
    "f.jsonl": (b'{"text": "fine"}\n{"text": "\xff"}\n{"text": "fine"}\n', 2, "not UTF-8"),
    "g.jsonl": (b'{"text": "fine"}\n{"text": "\\ud800"}\n{"text": "fine"}\n', 2, "not UTF-8"),
    "h.jsonl": (b'{"text": "fine"}\n' + b"[" * 100_000 + b'\n{"text": "fine"}\n', 2, "not JSON"),
    "a.csv": (b'text,n\n"fi\nne",1\nx\n"fi\nne",1\n', 4, "wrong columns"),
    "b.csv": (b"text,n\nfine,1\nx\xff,1\nfine,1\n", 3, "not UTF-8"),
    "c.csv": (b'text,n\nfine,1\n"x"y,1\nfine,1\n', 3, "wrong columns"),
    "a.tsv": (b"text\tn\nfine\t1\nx\nfine\t1\n", 3, "wrong columns"),
    "a.txt.gz": (gzip.compress(b"fine\n" * 50_000)[:-60], None, "damaged file"),
    "a.txt.zst": (zstandard.compress(b"fine\n" * 50_000)[:-4], None, "damaged file"),
    "b.txt.gz": (b"no gzip at all", 1, "damaged file"),
    "b.txt.zst": (b"no zstd at all", 1, "damaged file"),
    "a.parquet": (written(".parquet")[:-9], 1, "damaged file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_naming_file_and_row_or_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    raw, number, kind = BAD[name]
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        documents(path, "line")
    place, _, row = str(caught.value.where).rpartition(":")
    assert place == str(path)
    assert number is None or int(row) == number
    assert "on_bad_row: skip" in str(caught.value.remedy)
    tally = Tally()
    left = documents(path, "line", on_bad_row="skip", tally=tally)
    assert dict(tally.dropped) == {kind: 1}
    assert all(text.replace("\n", "") == "fine" for text in left)
    if not name.endswith(("gz", "zst", "parquet", "txt")):
        assert len(left) == 2


def test_a_missing_column_names_those_there_are_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("content,n\nx,1\n")
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match=r"'contents'.*'content'") as caught:
            documents(tmp_path / name, text="contents")
        assert "text: content" in str(caught.value.remedy)


def test_a_parquet_column_of_numbers_is_an_error_and_one_of_categories_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode(), "n": [1, 2, 3]}), path)
    assert documents(path) == ["a", "b", "a"]
    with pytest.raises(DataError, match="int64"):
        documents(path, text="n")


def test_folders_are_read_recursively_in_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.TXT", ".hidden.txt", ".git/x.txt", "a/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a/b.TXT", "a/z.md", "b.txt"]
    assert documents(tmp_path / "**" / "*.md") == ["a/z.md"]
    assert documents(tmp_path / "*") == ["b.txt"]


def test_a_split_is_a_subfolder_or_the_files_named_so(tmp_path: Path) -> None:
    for name in ("train/a.txt", "test/b.txt", "valid-0.txt", "valid-1.txt", "validity.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path, split="train") == ["train/a.txt"]
    assert documents(tmp_path, split="valid") == ["valid-0.txt", "valid-1.txt"]
    with pytest.raises(DataError, match="no split 'dev'"):
        documents(tmp_path, split="dev")


def test_limit_counts_documents_over_all_files_of_a_source(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n\n{name}2\n{name}3\n")
    assert documents(tmp_path, "line", limit=4) == ["a1", "a2", "a3", "b1"]


def test_what_is_not_there_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    cases = {"corpsu.txt": "corpus.txt", "pictures": ".jsonl", "pictures/a.png": ".jsonl", "*.csv": "pattern"}
    for name, remedy in cases.items():
        with pytest.raises(DataError) as caught:
            find_files(str(tmp_path / name), where="r.yaml:3")
        assert caught.value.where == "r.yaml:3"
        assert remedy in str(caught.value.remedy)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a\.txt is a link"):
        documents(tmp_path)


def test_sources_are_named_without_the_folders_of_this_machine() -> None:
    names = {"/data/x/corpus.txt": "corpus.txt", "/data/x/**/*.txt": "**/*.txt", "builtin:pydocs": "builtin:pydocs"}
    assert {path: source_name(Source(path=path)) for path in names} == names


def test_progress_reaches_the_bytes_of_the_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt.gz"):
        (tmp_path / name).write_bytes(compress(b"line\n" * 1000, Path(name).suffix))
    seen: list[int] = []
    for _ in read(tmp_path, "line", on_bytes=seen.append):
        pass
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_hub_set_is_streamed_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.update(path=path, **options)
        return [{"text": "one"}, {"text": " "}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    commit = "0" * 40
    assert documents("hub:owner/name", revision=commit, config="en") == ["one", "two"]
    expected = {"path": "owner/name", "name": "en", "split": "train", "revision": commit, "streaming": True}
    assert asked == expected


def test_a_hub_set_without_a_network_is_missing_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match="owner/name") as caught:
        documents("hub:owner/name")
    assert "path:" in str(caught.value.remedy)


@given(st.lists(st.text(alphabet="ab/é文", min_size=1, max_size=6)), st.slices(8))
def test_files_are_the_files_of_their_names_and_any_slice_of_them(names: list[str], part: slice) -> None:
    files = Files(names)
    assert list(files) == [FileInput(name) for name in names] and len(files) == len(names)
    assert list(files[part]) == list(files)[part] == list(pickle.loads(pickle.dumps(files[part])))
    with pytest.raises(IndexError):
        files[len(names)]


@pytest.mark.parametrize(
    "pattern",
    ["**/*.txt", "*/**/*.txt", "a/**/b/**/*.txt", "**", "a/**", "**/", "**/b/*", "a**/*.txt", "[ab]/**/*.txt"],
)
def test_a_glob_matches_the_files_that_pythons_own_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in (
        "x.txt",
        "a/x.txt",
        "a/b/x.txt",
        "a/b/c/b/y.txt",
        "b/a.txt",
        "a/.h/x.txt",
        ".h/b/x.txt",
        "a/[b]/*.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for begin in ("", f"{tmp_path}/"):
        expected = sorted({name for name in glob.glob(begin + pattern, recursive=True) if Path(name).is_file()})
        if expected:
            assert find_files(begin + pattern) == expected
        else:
            with pytest.raises(DataError, match="no file matches"):
                find_files(begin + pattern)


def test_a_folder_that_several_links_lead_to_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "real" / "x.txt").write_text("in it")
    (tmp_path / "elsewhere" / "y.txt").write_text("out of it")
    for name in ("a", "b"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
        (tmp_path / "data" / "real" / name).symlink_to("..")
    assert documents(tmp_path / "data" / "**" / "*.txt") == ["out of it", "in it"]
