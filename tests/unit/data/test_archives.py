from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from gptcli.data.readers import (
    BadRow,
    Row,
    split_suffix,
)
from gptcli.errors import DataError
from tests.unit.data.example_files import (
    ARCHIVE_SUFFIXES,
    COMPRESS,
    LINE,
    LONG,
    archive,
    bad,
    put,
    read,
    tarred,
    written,
    zipped,
)


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_readable_members_of_an_archive_are_read_and_others_left_out(tmp_path: Path, suffix: str) -> None:
    members = {
        "b.txt": b"b",
        "a/deep/z.txt": b"z" * 300_000,
        "./c.jsonl.gz": gzip.compress(b'{"text": "c"}\n\n{"text": "d"}'),
        "empty.txt": b"",
        **dict.fromkeys((".hidden.txt", ".git/x.txt", "__MACOSX/._b.txt", "image.png", "in.zip", "state.json"), b"no"),
    }
    rows = read(archive(tmp_path, suffix, members), LINE)
    order = ["b.txt", "a/deep/z.txt", "c.jsonl.gz", "c.jsonl.gz"]
    if suffix == ".zip":  # sorted by the names as the archive holds them
        order = ["c.jsonl.gz", "c.jsonl.gz", "a/deep/z.txt", "b.txt"]
    found = [(row.member, row.text, row.number) for row in rows if isinstance(row, Row)]
    content = {"b.txt": [("b", 1)], "a/deep/z.txt": [("z" * 300_000, 1)], "c.jsonl.gz": [("c", 1), ("d", 3)]}
    assert found == [(name, *row) for name in dict.fromkeys(order) for row in content[name]]
    assert len(rows) == len(found)


def test_links_and_paths_out_of_an_archive_are_harmless(tmp_path: Path) -> None:
    buffer = io.BytesIO(tarred({"../../out.txt": b"text"}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert read(put(tmp_path / "a.tar", buffer.getvalue())) == [Row(1, "text", None, "../../out.txt")]
    link = zipfile.ZipInfo("link.txt")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("../../out.txt", "text")
    assert read(tmp_path / "a.zip") == [Row(1, "text", None, "../../out.txt")]


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
def test_an_archive_without_a_readable_member_is_an_error_that_names_the_suffixes(tmp_path: Path, suffix: str) -> None:
    for members in ({"image.png": b"", "in.tar": b""}, {}):
        with pytest.raises(DataError, match="no file that can be read") as caught:
            read(archive(tmp_path, suffix, members))
        assert ".jsonl" in str(caught.value.remedy)


def test_a_missing_column_of_a_member_names_archive_and_member(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'content'") as caught:
        read(zipped(tmp_path / "a.zip", {"x/a.csv": b"content,n\nx,1\n"}))
    assert caught.value.where == f"{tmp_path / 'a.zip'}!x/a.csv:1"


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.zst"])
def test_every_truncation_of_an_archive_is_one_damage_and_no_crash(tmp_path: Path, suffix: str) -> None:
    members = {"a.txt": LONG[:3000], "b.png": LONG[:3000], "c.jsonl": b'{"text": "c"}\n'}
    raw = archive(tmp_path, suffix, members).read_bytes()
    end = len(raw) - (1024 * 18 if suffix == ".tar" else 0)  # a tar ends in blocks of zeros, whose number is free
    for cut in {*range(0, end, max(1, end // 100)), *range(0, end, 512)}:
        rows = read(put(tmp_path / f"cut{suffix}", raw[:cut]), LINE)
        assert len(bad(rows)) == 1, cut
        assert isinstance(rows[-1], BadRow)
        assert rows[-1].kind == "damaged file"
        assert suffix in rows[-1].reason


def test_a_damaged_or_encrypted_member_of_a_zip_costs_that_member(tmp_path: Path) -> None:
    members = {"a.txt": b"first", "b.txt": LONG, "c.txt.gz": gzip.compress(LONG)[:-20], "d.txt": b"last"}
    path = zipped(tmp_path / "a.zip", members)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("b.txt")
        raw[info.header_offset + 200 : info.header_offset + 210] = b"0123456789"
        begin = archive.getinfo("d.txt")
    path.write_bytes(raw)
    rows = read(path)
    assert [(row.member, row.kind) for row in rows if isinstance(row, BadRow)] == [
        ("b.txt", "damaged file"),
        ("c.txt.gz", "damaged file"),
    ]
    assert [row.text for row in rows if isinstance(row, Row) and row.member in ("a.txt", "d.txt")] == ["first", "last"]
    directory = raw.rindex(b"PK\x01\x02")
    raw[begin.header_offset + 6] |= 1
    raw[directory + 8] |= 1
    encrypted = read(put(path, bytes(raw)))[-1]
    assert isinstance(encrypted, BadRow)
    assert (encrypted.member, encrypted.kind) == ("d.txt", "damaged file")
    assert "encrypted" in encrypted.reason


def test_a_damaged_member_of_a_tar_costs_that_member(tmp_path: Path) -> None:
    raw = tarred({"a.txt.gz": gzip.compress(LONG)[:-50], "b.txt": b"last"})
    rows = read(put(tmp_path / "a.tar", raw), LINE)
    assert [row.member for row in rows if isinstance(row, BadRow)] == ["a.txt.gz"]
    assert rows[-1] == Row(1, "last", None, "b.txt")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".zip", ".tar.xz", ".arrow"])
def test_the_position_grows_to_the_size_of_the_file(tmp_path: Path, suffix: str) -> None:
    if suffix in (".zip", ".tar.xz"):
        path = archive(tmp_path, suffix, {"a.txt": LONG, "b.txt": LONG})
    else:
        compression = split_suffix(f"a{suffix}")[1]
        raw = written(suffix, [LONG.decode()]) if suffix == ".arrow" else LONG
        path = put(tmp_path / f"a{suffix}", COMPRESS[compression](raw))
    seen: list[int] = []
    read(path, LINE, on_position=seen.append)
    assert seen == sorted(seen)
    assert path.stat().st_size * 0.9 - 200 <= seen[-1] <= path.stat().st_size
