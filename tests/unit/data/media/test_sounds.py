from __future__ import annotations

import io
import os
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptcli.data.media.audio import load_audio
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.reference import Media, Reach, media_of
from gptcli.errors import MissingError
from tests.conftest import shared_data

soundfile = pytest.importorskip("soundfile", reason="the extra multimodal is not installed")
soxr = pytest.importorskip("soxr", reason="the extra multimodal is not installed")


def tone(samples: int = 8000, channels: int = 1) -> NDArray[np.float32]:
    """Tones with noise, another one in each channel."""
    times = np.arange(samples)[:, None] * np.linspace(0.02, 0.3, channels)
    noise = np.random.RandomState(0).uniform(-0.05, 0.05, times.shape)
    return (0.6 * np.sin(times) + noise).astype(np.float32)


def saved(values: NDArray[Any], rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, values, rate, format=form, subtype=subtype)
    return target.getvalue()


def load(data: bytes, rate: int = 16000, *, max_seconds: float = 30, cut: bool = False) -> NDArray[np.float32]:
    samples = load_audio(Media("x", data), rate, max_seconds=max_seconds, cut=cut)
    assert samples.dtype == np.float32 and samples.ndim == 1
    return samples


def fault(data: bytes, **options: Any) -> MediaFault:
    with pytest.raises(MediaFault) as caught:
        load(data, **options)
    return caught.value


FORMS = [
    *(("WAV", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")),
    *(("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    *(("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16")),
]


@pytest.mark.parametrize(("form", "subtype"), FORMS)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_are_read_as_soundfile_does_with_channels_averaged(form: str, subtype: str, channels: int) -> None:
    data = saved(tone(24_000, channels), 16_000, form, subtype)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    np.testing.assert_allclose(load(data), expected.mean(axis=1), atol=1e-6)


def test_whole_numbers_of_any_width_have_the_same_full_scale() -> None:
    for subtype, step in (("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-31)):
        values = load(saved(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), 16_000, "WAV", subtype))
        np.testing.assert_allclose(values, [-1, -0.5, 0, 0.5, 1], atol=step)


@pytest.mark.parametrize("source", [8_000, 11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_resampling_is_that_of_soxr_for_the_whole_sound(source: int, rate: int) -> None:
    values = tone(source * 7)[:, 0]  # more than one block
    expected = soxr.resample(values, source, rate, quality="HQ")
    assert np.array_equal(load(saved(values, source, "WAV", "FLOAT"), rate), expected)
    stereo = tone(source, 2)
    assert np.array_equal(
        load(saved(stereo, source, "WAV", "FLOAT"), rate),
        soxr.resample(stereo.mean(axis=1, dtype=np.float32), source, rate, quality="HQ"),
    )


def test_samples_of_datasets_are_taken_as_the_file_would_be(tmp_path: Path) -> None:
    reach = Reach.of(tmp_path / "rows.jsonl")
    stereo = tone(4000, 2)
    expected = load(saved(stereo, 8000, "WAV", "FLOAT"))
    for array in (stereo, stereo.T, stereo.astype(np.float64), stereo.tolist()):
        (media,) = media_of({"array": array, "sampling_rate": 8000}, reach)
        assert np.array_equal(load_audio(media, 16_000, max_seconds=1), expected)
    for array, reason in (([], "has no samples"), ([0.0, float("nan")], "holds NaN"), ([0.0] * 9000, "lasts 1.125 s")):
        with pytest.raises(MediaFault, match=reason):
            load_audio(media_of({"array": array, "sampling_rate": 8000}, reach)[0], 16_000, max_seconds=1)
    with pytest.raises(MediaFault, match="has an array of 3 dimensions"):
        load_audio(media_of({"array": np.zeros((1, 1, 1)), "sampling_rate": 8000}, reach)[0], 16_000, max_seconds=1)


def test_a_sound_without_samples_or_with_numbers_that_are_not_finite_is_a_fault() -> None:
    assert fault(saved(np.zeros(0), 16_000)).reason == "has no samples"
    for value, reason in ((np.nan, "holds NaN"), (np.inf, "holds infinity"), (-np.inf, "holds infinity")):
        values = tone(300_000)
        values[290_000] = value
        found = fault(saved(values, 16_000, "WAV", "FLOAT"))
        assert (found.kind, found.reason) == ("not finite", reason)
    assert fault(saved(np.array([0.0, 1e300]), 16_000, "WAV", "DOUBLE")).reason == "holds infinity"
    assert fault(saved(np.ones(1), 48_000)).reason == "has no samples"  # at 16 kHz


def hour(path: Path, rate: int = 48_000) -> Path:
    """A WAV of an hour in stereo, of which the disk holds nothing: 691 MB of zeros."""
    size = 3600 * rate * 4
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 2, rate, rate * 4, 4, 16, b"data", size
    )
    path.write_bytes(head)
    os.truncate(path, len(head) + size)
    return path


def test_a_sound_of_an_hour_is_refused_or_cut_without_being_held(tmp_path: Path) -> None:
    (media,) = media_of(hour(tmp_path / "hour.wav"), Reach.of(tmp_path / "rows.jsonl"))
    load(saved(tone(), 8000))  # the libraries are there
    tracemalloc.start()
    try:
        with pytest.raises(MediaFault) as caught:
            load_audio(media, 16_000, max_seconds=30)
        assert (caught.value.kind, str(caught.value)) == ("too large", f"{media.name} lasts 3,600 s, more than 30 s")
        assert len(load_audio(media, 16_000, max_seconds=30, cut=True)) == 30 * 16_000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_limit_holds_where_the_header_does_not_say_how_long_it_is() -> None:
    flac = bytearray(saved(tone(16_000), 8000, "FLAC"))
    expected = load(bytes(flac))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # the number of samples in STREAMINFO: unknown
    assert np.array_equal(load(bytes(flac)), expected)
    assert fault(bytes(flac), max_seconds=1).reason == "lasts more than 1 s"
    assert len(load(bytes(flac), max_seconds=1, cut=True)) == 16_000
    wav = bytearray(saved(tone(), 8000))
    wav[4:8] = wav[40:44] = b"\xff" * 4  # as a writer to a pipe leaves them
    assert len(load(bytes(wav))) == 16_000


def test_what_is_cut_is_the_beginning() -> None:
    data = saved(tone(16_000), 8000, "WAV", "FLOAT")
    assert np.array_equal(load(data, 8000, max_seconds=0.5, cut=True), tone(16_000)[:4000, 0])
    assert np.array_equal(load(data, 8000, max_seconds=2, cut=True), tone(16_000)[:, 0])
    assert fault(data, max_seconds=1.999).reason == "lasts 2 s, more than 1.999 s"


@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_a_truncated_sound_is_a_fault(form: str, subtype: str) -> None:
    data = saved(tone(24_000), 16_000, form, subtype)
    for size in (len(data) // 4, len(data) // 2, len(data) * 4 // 5):
        found = fault(data[:size])
        assert found.kind == "damaged file"
        assert "truncated" in found.reason or found.reason == "has no samples", found.reason


def test_a_wav_whose_outer_size_alone_is_wrong_is_whole() -> None:
    wav = bytearray(saved(tone(), 8000))
    wav[4:8] = struct.pack("<I", len(wav))  # 8 too many, a common mistake
    assert len(load(bytes(wav))) == 16_000


@pytest.mark.parametrize("rate", [1, 2_000_000_000])
def test_a_sampling_rate_that_no_sound_has_is_refused(rate: int) -> None:
    wav = bytearray(saved(tone(), 8000))
    wav[24:28] = struct.pack("<I", rate)
    assert fault(bytes(wav)).reason == f"has a sampling rate of {rate:,} Hz"


@pytest.mark.parametrize(("form", "subtype"), [f for f in FORMS if f[1] in ("PCM_16", "VORBIS", "MPEG_LAYER_III")])
def test_no_damage_brings_anything_but_a_sound_or_a_fault(
    form: str, subtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = saved(tone(3000), 16_000, form, subtype)
    random = np.random.RandomState(0)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(random.randint(1, 4)):
            place = random.randint(len(broken)) if random.rand() < 0.5 else random.randint(80)
            broken[place] ^= 1 << random.randint(8)
        if random.rand() < 0.2:
            del broken[random.randint(len(broken)) :]
        try:
            samples = load(bytes(broken), max_seconds=5)
        except MediaFault as error:
            assert "\n" not in str(error)
        else:
            assert 0 < len(samples) <= 5 * 16_000 and np.isfinite(samples).all()
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_no_sound_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("once upon a time")
    (tmp_path / "empty.wav").write_bytes(b"")
    reach = Reach.of(tmp_path / "rows.jsonl")
    for name, reason in (("text.wav", "is not a sound"), ("empty.wav", "is empty"), ("none.wav", "does not exist")):
        with pytest.raises(MediaFault, match=f"{name} {reason}"):
            load_audio(media_of(name, reach)[0], 16_000, max_seconds=1)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_without_its_packages_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingError) as caught:
        load(b"x")
    assert caught.value.lines() == [
        f"reading sounds needs the package {package}, which is not installed",
        "pip install 'gptcli[multimodal]'",
    ]


def test_sounds_of_a_data_set_are_read_beside_its_rows() -> None:
    rows = shared_data("fsdd/test/metadata.jsonl")
    (media,) = media_of("audio/4_lucas_2.wav", Reach.of(rows))
    values, rate = soundfile.read(rows.parent / "audio" / "4_lucas_2.wav", dtype="float32")
    assert np.array_equal(load_audio(media, 16_000, max_seconds=10), soxr.resample(values, rate, 16_000))
