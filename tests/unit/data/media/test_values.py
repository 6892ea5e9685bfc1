from __future__ import annotations

import base64
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.fetch import fetched
from gptcli.data.media.reference import Media, Reach, Samples, content_hash, media_of, opened, videos_of


@pytest.fixture
def reach(tmp_path: Path) -> Reach:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc")
    (folder / "sub" / "b.bin").write_bytes(b"abcd")
    (tmp_path / "secret").write_bytes(b"secret")
    return Reach.of(folder / "rows.jsonl")


def read(media: Media) -> bytes:
    with opened(media) as file:
        return file.read()


def fault(value: Any, reach: Reach) -> MediaFault:
    """The fault of making a value media, or of opening them."""
    with pytest.raises(MediaFault) as caught:
        for media in media_of(value, reach):
            read(media)
    return caught.value


def test_a_path_bytes_a_data_url_and_a_value_of_datasets_are_the_same_bytes(reach: Reach) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"abc").decode()
    path = str(reach.folder / "a.bin")
    values: list[Any] = ["a.bin", "./sub/../a.bin", path, Path("a.bin"), b"abc", bytearray(b"abc"), url]
    values += [{"bytes": b"abc", "path": "any"}, {"bytes": None, "path": "a.bin"}, {"path": "a.bin"}]
    media = [one for value in values for one in media_of(value, reach)]
    assert [read(one) for one in media] == [b"abc"] * len(values)
    assert len({content_hash(one) for one in media}) == 1
    assert content_hash(media[0]) != content_hash(media_of("sub/b.bin", reach)[0])
    for one in media:
        again = pickle.loads(pickle.dumps(one))
        assert (again.name, read(again)) == (one.name, b"abc")


def test_a_row_may_hold_several_or_none(reach: Reach) -> None:
    assert [read(one) for one in media_of(["sub/b.bin", b"x", {"bytes": b"y"}], reach)] == [b"abcd", b"x", b"y"]
    assert media_of(None, reach) == media_of([], reach) == []


def test_videos_are_files_or_lists_of_frames(reach: Reach) -> None:
    def shape(value: Any) -> list[Any]:
        return [
            one.name if isinstance(one, Media) else [frame.name for frame in one] for one in videos_of(value, reach)
        ]

    assert shape("v.mp4") == shape(["v.mp4"]) == ["v.mp4"]
    assert shape(["v.mp4", "w.WEBM"]) == ["v.mp4", "w.WEBM"]
    assert shape(["1.png", "2.png"]) == [["1.png", "2.png"]]
    assert shape([["1.png"], ["2.png", "3.png"], "v.mp4"]) == [["1.png"], ["2.png", "3.png"], "v.mp4"]
    assert shape(None) == shape([]) == []


def test_a_path_does_not_lead_out_of_the_folder_of_the_data_file(reach: Reach, tmp_path: Path) -> None:
    (reach.folder / "link").symlink_to(tmp_path / "secret")
    (reach.folder / "up").symlink_to(tmp_path)
    (reach.folder / "inside").symlink_to("sub/b.bin")
    (tmp_path / "data2").mkdir()
    outside = ["../secret", "../../etc/passwd", "/etc/passwd", str(tmp_path / "secret"), "link", "up/secret"]
    for value in [*outside, "sub/../../secret", "../data2/x", "..", {"path": "../secret"}, ["a.bin", "link"]]:
        found = fault(value, reach)
        assert found.kind == "outside the folder" and found.reason.startswith("lies outside the folder"), value
    assert read(media_of("inside", reach)[0]) == b"abcd"
    free = Reach.of(reach.folder / "rows.jsonl", allow_outside=True)
    assert read(media_of("../secret", free)[0]) == read(media_of("link", free)[0]) == b"secret"


def test_a_folder_that_is_reached_by_a_link_is_the_folder_it_leads_to(reach: Reach, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(reach.folder)
    there = Reach.of(tmp_path / "link" / "rows.jsonl")
    assert read(media_of("a.bin", there)[0]) == b"abc"
    assert fault("../secret", there).kind == "outside the folder"


def test_what_is_no_file_to_read_says_why(reach: Reach) -> None:
    (reach.folder / "empty").write_bytes(b"")
    os.mkfifo(reach.folder / "pipe")
    (reach.folder / "loop").symlink_to("loop")
    expected = {
        "missing.png": "does not exist",
        "a.bin/x": "does not exist",
        "empty": "is empty",
        "pipe": "is no regular file",
        "sub": "is a folder, not a file",
        ".": "is a folder, not a file",
        "x\0y": "is no name that a file can have",
        "\udcff\ud800": "is no name that a file can have",
        "": "is an empty text, no path",
        "y" * 300: "cannot be read: File name too long",
        "loop": "cannot be read: Too many levels of symbolic links",
    }
    assert {value: fault(value, reach).reason for value in expected} == expected
    assert fault(b"", reach).reason == "is empty"
    assert str(fault("sub/\x1b[31m\n.png", reach)) == "sub/␛[31m␊.png does not exist"
    assert len(str(fault("z" * 100_000, reach))) < 200


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "is a number: neither a path nor bytes"),
        (True, "is a truth value: neither a path nor bytes"),
        ([None], "is null: neither a path nor bytes"),
        ([["a.bin"]], "is a list: neither a path nor bytes"),
        ({}, "has neither bytes, path nor array, only none"),
        ({"url": "x"}, "has neither bytes, path nor array, only 'url'"),
        ({"bytes": "abc"}, "has under 'bytes' a text, no bytes"),
        ({"array": [0.0], "sampling_rate": None}, "has the sampling rate None, no number of Hz"),
        ({"array": [0.0], "sampling_rate": float("nan")}, "has the sampling rate nan, no number of Hz"),
        ({"array": [1, 2], "sampling_rate": 8000}, "has an array of int64, not of floats, int16 or int32"),
        (
            {"array": [[0.0], [1.0, 2.0]], "sampling_rate": 8000},
            "has an array of object, not of floats, int16 or int32",
        ),
        ("data:image/png,abc", "is a data URL, but not one of base64"),
        ("data:;base64,a", "is a data URL whose base64 is damaged"),
        ("data:;base64,????", "is a data URL whose base64 is damaged"),
        ("data:;base64,", "is empty"),
        ("file:///etc/passwd", "is a URL of the kind file, which is not fetched"),
        ("http://127.0.0.1/x.png", "is a URL, which is not fetched unless data.allow_urls is true"),
        ("HTTPS://127.0.0.1/x.png", "is a URL, which is not fetched unless data.allow_urls is true"),
    ],
)
def test_what_is_no_image_or_sound_says_what_it_is(value: Any, reason: str, reach: Reach) -> None:
    assert fault(value, reach).reason == reason


def test_samples_are_scaled_by_their_type(reach: Reach) -> None:
    (media,) = media_of({"array": np.array([-32768, 16384], dtype=np.int16), "sampling_rate": 8000.0}, reach)
    assert isinstance(media.source, Samples) and media.source.rate == 8000
    assert media.source.values.tolist() == [-1.0, 0.5]
    (floats,) = media_of({"array": [-1.0, 0.5], "sampling_rate": 8000, "path": "x.wav", "bytes": None}, reach)
    assert content_hash(floats) != content_hash(media)  # float64 and float32
    assert content_hash(pickle.loads(pickle.dumps(media))) == content_hash(media)


def test_a_fault_survives_the_way_out_of_a_worker() -> None:
    found = pickle.loads(pickle.dumps(MediaFault("a.png", "too large", "has 4 pixels")))
    assert (found.name, found.kind, found.reason, str(found)) == (
        "a.png",
        "too large",
        "has 4 pixels",
        "a.png has 4 pixels",
    )


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path
        if path == "/file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
        elif path == "/ftp":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/x")
        elif path == "/away":
            self.send_response(302)
            self.send_header("Location", "/a%20b.png")
        elif path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
        elif path == "/none":
            self.send_response(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "100" if path == "/short" else "8")
        self.end_headers()
        if path in ("/a%20b.png", "/short", "/%C3%A9"):
            self.wfile.write(b"01234567")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_fetched_where_they_are_allowed(reach: Reach, server: str) -> None:
    allowed = Reach.of(reach.folder / "rows.jsonl", allow_urls=True)
    for path in ("/a b.png", "/away", "/é", "/a b.png#part"):
        (media,) = media_of(server + path, allowed)
        assert read(pickle.loads(pickle.dumps(media))) == b"01234567"
    reasons = {path: fault(server + path, allowed).reason for path in ("/none", "/short", "/file", "/ftp", "/loop")}
    assert reasons.pop("/file").startswith("cannot be fetched: the answer is 302")
    assert reasons.pop("/loop").startswith("cannot be fetched: the answer is 302")
    assert reasons == {
        "/none": "cannot be fetched: the answer is 404 Not Found",
        "/short": "cannot be fetched: the answer ends after 8 of 100 bytes",
        "/ftp": "cannot be fetched: it leads to an address that is neither http nor https",
    }
    assert fault("http://127.0.0.1:1/x", allowed).reason == "cannot be fetched: [Errno 111] Connection refused"
    for wrong in (
        "http://",
        "http://[::1",
        "http://a:b/",
        "http://\udcff/",
        "https://x y/",
        "http://" + "é" * 80 + "/",
    ):
        assert fault(wrong, allowed).kind == "not fetched"


def test_what_is_fetched_is_limited_in_size_and_time(server: str) -> None:
    with pytest.raises(MediaFault, match=r"x is larger than 0\.0 MiB"):
        fetched(f"{server}/a%20b.png", "x", max_bytes=7)
    with pytest.raises(MediaFault, match="x cannot be fetched: ") as caught:
        fetched(f"{server}/a%20b.png", "x", seconds=1e-9)
    assert caught.value.kind == "not fetched"
