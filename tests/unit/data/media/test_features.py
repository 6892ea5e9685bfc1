"""Features of media on disk: what is written is found again, in any order, and a damaged file is as if it were not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.data.media.features import FeatureStore, FeatureWriter, by_rows
from gptcli.data.media.item import Medium
from gptcli.data.media.reference import Media
from tests.runs import truncate


def medium(number: int) -> Medium:
    # Keys with zeros at their end, which numpy drops, are keys like others.
    return Medium("image", Media(f"{number}.png", Path("x")), f"{number:02x}".ljust(32, "0"))


def parts(number: int, width: int = 3) -> list[torch.Tensor]:
    """One part of one row a medium and one of several."""
    return [torch.full((1, 4), number, dtype=torch.bfloat16), torch.full((number % 3 + 1, width), float(number))]


def write(folder: Path, numbers: range, width: int = 3) -> None:
    writer = FeatureWriter(folder, file_bytes=100)
    for number in numbers:
        writer.add(bytes.fromhex(medium(number).hash), (number, 7), parts(number, width))
    writer.close()
    assert writer.written == len(numbers)


def test_parts_of_a_batch_are_those_of_its_media_in_order(tmp_path: Path) -> None:
    write(tmp_path, range(20))
    assert len([*tmp_path.iterdir()]) > 3
    store = FeatureStore(tmp_path)
    assert len(store) == 20
    wanted = [7, 0, 19, 7]
    found = store.find([medium(number) for number in wanted])
    assert found is not None and found.sizes == [(number, 7) for number in wanted]
    for at, part in enumerate(found.parts):
        expected = torch.cat([parts(number)[at] for number in wanted])
        assert torch.equal(part, expected) and part.dtype == expected.dtype
    assert by_rows(found.sizes, [[medium(7)], [], [medium(0), medium(19)], [medium(7)]]) == [
        *([(7, 7)], [], [(0, 7), (19, 7)], [(7, 7)])
    ]


def test_a_batch_with_a_medium_that_is_not_there_or_has_another_shape_is_not_put_together(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    write(tmp_path, range(3, 5), width=5)
    store = FeatureStore(tmp_path)
    assert store.find([medium(0), medium(9)]) is None
    assert store.find([medium(0), medium(3)]) is None
    assert store.find([medium(3), medium(4)]) is not None and store.find([]) is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "begun"])
def test_a_file_that_is_not_whole_is_not_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, range(20))
    file = sorted(tmp_path.iterdir())[0]
    whole = file.read_bytes()
    if damage == "cut":
        truncate(file)
    elif damage == "emptied":
        file.write_bytes(b"")
    else:  # as a process that was killed leaves it
        file.rename(tmp_path / f".{file.name}.x1")
    left = len(FeatureStore(tmp_path))
    assert 0 < left < 20
    (tmp_path / file.name).write_bytes(whole)
    store = FeatureStore(tmp_path)
    assert len(store) == 20
