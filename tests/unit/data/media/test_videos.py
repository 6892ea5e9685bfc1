from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.reference import Media, Reach, videos_of
from gptcli.data.media.video import evenly, load_video
from gptcli.errors import MissingError

Image = pytest.importorskip("PIL.Image", reason="the extra multimodal is not installed")


def frames(folder: Path, count: int) -> list[str]:
    """Images whose grey is their number."""
    for index in range(count):
        Image.new("L", (8, 8), index).save(folder / f"{index}.png")
    return [f"{index}.png" for index in range(count)]


def greys(images: list[Any]) -> list[int]:
    return [int(np.asarray(image).mean().round()) for image in images]


def test_frames_are_evenly_spaced() -> None:
    assert evenly(3, 8) == evenly(3, 3) == [0, 1, 2]
    assert evenly(10, 1) == [5]
    assert evenly(100, 4) == [12, 37, 62, 87]
    for total in range(1, 50):
        for count in range(1, total):
            found = evenly(total, count)
            assert len(set(found)) == count and max(np.diff([-1, *found, total])) <= -(-total // count)


def test_a_list_of_frames_is_a_video(tmp_path: Path) -> None:
    names = frames(tmp_path, 10)
    (video,) = videos_of(names, Reach.of(tmp_path / "rows.jsonl"))
    assert greys(load_video(video, 5, max_seconds=1)) == [1, 3, 5, 7, 9]
    assert greys(load_video(video, 99, max_seconds=1)) == list(range(10))
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(MediaFault, match=r"5\.png is empty"):
        load_video(video, 5, max_seconds=1)
    with pytest.raises(MediaFault, match="is a video without frames"):
        load_video([], 5, max_seconds=1)


def test_without_pyav_a_file_of_a_video_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingError) as caught:
        load_video(Media("x.mp4", b"x"), 5, max_seconds=1)
    assert caught.value.lines()[-1] == "pip install 'gptcli[video]'"


def encoded(count: int, size: int = 32) -> bytes:
    av = pytest.importorskip("av", reason="the extra video is not installed")
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            image = Image.new("RGB", (size, size), (index * 5,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return target.getvalue()


def fault(data: bytes, **options: Any) -> MediaFault:
    with pytest.raises(MediaFault) as caught:
        load_video(Media("x", data), 4, **{"max_seconds": 60, **options})
    return caught.value


def test_frames_of_a_file_are_evenly_spaced() -> None:
    data = encoded(40)
    images = load_video(Media("x", data), 4, max_seconds=60)
    assert all(image.mode == "RGB" for image in images)
    assert np.abs(np.array(greys(images)) - [25, 75, 125, 175]).max() <= 3
    assert len(load_video(Media("x", data), 99, max_seconds=60)) == 40
    assert fault(data, max_seconds=1).reason.startswith("lasts ")
    assert fault(data, max_pixels=1023).reason == "has 1,024 pixels, more than 1,023"


def test_a_file_that_is_no_video_is_a_fault() -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    assert fault(b"once upon a time " * 100).reason == "is not a video, or damaged"


def test_a_list_of_other_files_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.mkv").write_bytes(encoded(40))
    monkeypatch.chdir(tmp_path)  # where FFmpeg's concat looks for relative names, and opens them unless it is not let
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile://{tmp_path}/secret.mkv\n#EXT-X-ENDLIST\n"
    for playlist in (hls, "ffconcat version 1.0\nfile secret.mkv\n"):
        assert fault(playlist.encode()).reason == "is not a video, or damaged"


def test_no_damage_of_a_video_brings_anything_but_images_or_a_fault() -> None:
    data = encoded(20)
    random = np.random.RandomState(0)
    for size in range(1, len(data), len(data) // 20):
        broken = bytearray(data)
        broken[random.randint(len(broken))] ^= 1 << random.randint(8)
        for changed in (bytes(broken), data[:size]):
            try:
                assert len(load_video(Media("x", changed), 4, max_seconds=60)) <= 4
            except MediaFault as error:
                assert "\n" not in str(error)
