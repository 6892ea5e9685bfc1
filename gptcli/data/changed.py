"""Whether the images and sounds of prepared data are still what they were: each is read again, for `--verify`.

The key of prepared data is made of the rows alone, so that a second run does not read a data set of pictures.
"""

from __future__ import annotations

from pathlib import Path

from gptcli.data.media.fault import MediaFault
from gptcli.data.media.item import hashed
from gptcli.data.shards import Shards
from gptcli.data.split import SIDES

_DOCUMENTS = 1000


def changed_medium(folder: Path) -> str | None:
    """The first medium of prepared data that is another one now or cannot be read, as a sentence; None: none is."""
    for side in SIDES:
        if (folder / side).is_dir() and (shards := Shards.open(folder / side, verify=False)).has_media:
            for number in range(len(shards.streams)):
                if (changed := _changed(shards, number)) is not None:
                    return changed
    return None


def _changed(shards: Shards, number: int) -> str | None:
    begins = shards.document_offsets(number)[:-1]
    for at in range(0, len(begins), _DOCUMENTS):
        for medium in (each for media in shards.media(number, begins[at : at + _DOCUMENTS]) for each in media):
            try:
                if hashed(medium).hash != medium.hash:
                    return f"{medium.name} is another one than when the data was prepared"
            except MediaFault as fault:
                return str(fault)
    return None
