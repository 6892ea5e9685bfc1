"""What a processor makes of media: the text that stands for each, and the numbers that the model takes.

One way for every processor of transformers. It is asked with placeholders alone, never with a user's text: how it
replaces them is put into the text where the marks of the media are, and the whole is tokenized as any text is.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.data.media.audio import load_audio
from gptcli.data.media.fault import MediaFault
from gptcli.data.media.image import load_image
from gptcli.data.media.item import A_NOUN, NOUNS, PLACE, Medium, Modality, hashed
from gptcli.data.media.video import load_video
from gptcli.errors import CheckpointError, DataError, MissingError, RecipeError, first_line
from gptcli.processors import CROSSED, PROCESSOR_FILES, fitted, has_processor, process, process_crossed, takes_media
from gptcli.reporting import quiet

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

# A sound of a processor that says no length, and a video.
MAX_SECONDS = 600.0
MAX_VIDEO_SECONDS = 3600.0
FRAMES = 8
TYPE_IDS = "mm_token_type_ids"
_ARGUMENTS: dict[Modality, str] = {"image": "images", "audio": "audio", "video": "videos"}
_READERS: dict[Modality, tuple[str, ...]] = {
    "image": ("image_processor",),
    "audio": ("feature_extractor", "audio_processor"),
    "video": ("video_processor",),
}


@dataclass(frozen=True)
class MediaReader:
    """A processor, ready to read media.

    Attributes:
        processor: transformers' own.
        tokens: the placeholder of each kind of media that it reads.
    """

    processor: Any
    tokens: Mapping[Modality, str]

    @property
    def reads(self) -> str:
        """What is read, for people."""
        return " and ".join(f"{NOUNS[each]}s" for each in self.tokens) or "text"

    @property
    def rate(self) -> int:
        """The samples a second of the sounds that the processor takes."""
        return int(self._sounds.sampling_rate)

    @property
    def max_seconds(self) -> float:
        """How long a sound may be: a processor that pads to a length would cut what is longer, but into windows."""
        length = getattr(self._sounds, "chunk_length", None) if takes_media(self.processor) else None
        return float(length or MAX_SECONDS)

    @property
    def _sounds(self) -> Any:
        found = (getattr(self.processor, name, None) for name in _READERS["audio"])
        return next(each for each in found if each is not None)

    def load(self, medium: Medium) -> Any:
        """A medium decoded, as the processor takes it. Raises `MediaFault`; one that has changed since is one too."""
        if medium.modality not in self.tokens:
            what = f"is {A_NOUN[medium.modality]}, and the model reads {self.reads} alone"
            raise MediaFault(medium.name, "not media", what)
        if medium.hash and hashed(medium).hash != medium.hash:
            raise MediaFault(medium.name, "damaged file", "is another one than when the data was prepared")
        if isinstance(medium.value, list) or medium.modality == "video":
            frames = int(getattr(self.processor.video_processor, "num_frames", None) or FRAMES)
            return load_video(medium.value, frames, max_seconds=MAX_VIDEO_SECONDS)
        if medium.modality == "image":
            return load_image(medium.value)
        return load_audio(medium.value, self.rate, max_seconds=self.max_seconds)

    def texts(self, media: Sequence[Medium]) -> list[str]:
        """What stands in a text for each of a row's media: placeholders, and what the processor puts around them.

        Raises:
            MediaFault: one cannot be read, or the processor does not take it.
            RecipeError: it does not say what it replaces placeholders by.
        """
        return [text for text, _ in self.read(media)]

    def read(self, media: Sequence[Medium]) -> list[tuple[str, Medium]]:
        """What stands for each of a row's media, as `texts`, and the medium with its extent and its tokens."""
        if not media:
            return []
        loaded = [self.load(medium) for medium in media]
        with _faults(media):
            kinds = [medium.modality for medium in media]
            made = self._processed([kinds], [loaded], return_text_replacement_offsets=True)
        if self.crossed:
            found = [self.tokens[modality] for modality in kinds]
        elif "text_replacement_offsets" not in made:
            raise RecipeError(
                f"{type(self.processor).__name__} does not say what stands in a text for an image or a sound, so rows "
                "cannot be made for its model",
                remedy="Take one that does: llava, idefics3, mllama, qwen2_audio.",
            )
        else:
            found = [each["replacement"] for each in made["text_replacement_offsets"][0]]
        if len(found) != len(media) or "" in found:
            named = media[found.index("")] if "" in found else media[0]
            raise MediaFault(
                named.name, "not media", f"is too small or too short: no token of the {NOUNS[named.modality]} is left"
            )
        sizes = {text: self._tokens(text) for text in set(found)}
        return [
            (text, replace(medium, extent=self._extent(value), tokens=sizes[text]))
            for text, medium, value in zip(found, media, loaded, strict=True)
        ]

    def _tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _extent(self, value: Any) -> tuple[float, ...]:
        """Width and height of a picture or of a video's first frame, or the seconds of a sound."""
        first = value[0] if isinstance(value, list) else value
        return tuple(first.size) if hasattr(first, "getbands") else (len(value) / self.rate,)

    @property
    def crossed(self) -> bool:
        """Whether layers of the model attend to media beside the text, by a mask of its tokens that is made of them."""
        return CROSSED in self.processor.model_input_names

    def inputs(self, rows: Sequence[Sequence[Medium]], ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What a model takes of the media of some rows, beside their tokens; nothing where there are none.

        One that is in several rows is decoded once. Tensors have no dimension of rows that could be cut: a processor
        lays them out as its model wants them.

        Args:
            rows: their media.
            ids: their tokens [n, T], which a model that is `crossed` is told of.

        Raises:
            MediaFault: one cannot be read.
            RecipeError: rows with other numbers of images, of which what fills up the fewer would be attended to.
        """
        every = [medium for row in rows for medium in row]
        if not every:
            return {}
        if self.crossed and len({len(row) for row in rows}) > 1:
            # transformers' mllama masks neither a row without images nor the words before the first.
            raise RecipeError(
                "the model has layers that attend to images beside the text, by which rows with more and fewer images "
                "in one batch depend on each other",
                remedy="Set train.micro_batch_size: 1, or give every row as many images.",
            )
        decoded = {medium: self.load(medium) for medium in dict.fromkeys(every)}
        read = [row for row in rows if row or self.crossed]
        loaded = [[decoded[medium] for medium in row] for row in read]
        with _faults(every):
            return self._inputs([[medium.modality for medium in row] for row in read], loaded, ids)

    def inputs_of(self, loaded: Sequence[Sequence[Any]], modality: Modality) -> dict[str, torch.Tensor]:
        """`inputs` of decoded media of one kind, by rows of one or more."""
        return self._inputs([[modality] * len(row) for row in loaded], loaded)

    def _inputs(
        self, kinds: Sequence[Sequence[Modality]], loaded: Sequence[Sequence[Any]], ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        made = self._processed(kinds, loaded, ids, return_tensors="pt", padding=True)
        of_text = {*self.processor.tokenizer.model_input_names, TYPE_IDS, "input_ids", "attention_mask"}
        own = {name: value for name, value in made.items() if name not in of_text}
        return {name: value for name, value in own.items() if hasattr(value, "shape")}

    def beside(self, ids: torch.Tensor, *, packed: bool = False) -> dict[str, torch.Tensor]:
        """What a model is told of the tokens [n, T] of rows, in the same shape; `packed`: a row is several documents.

        The kind of each (text 0, image 1, video 2, sound 3), for models that are told it. Where no medium is more than
        one token, that all of them count: some ask for it then (qwen2_audio), which of packed rows cannot be said.
        """
        import torch

        told = {}
        if TYPE_IDS in self.processor.model_input_names:
            told[TYPE_IDS] = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))
        numbers = self.processor.tokenizer.convert_tokens_to_ids([*self.tokens.values()])
        marks = torch.isin(ids, torch.tensor(numbers, device=ids.device))
        if not packed and marks.any() and not (marks[:, 1:] & marks[:, :-1]).any():
            told["attention_mask"] = torch.ones_like(ids)
        return told

    def filled(self, text: str, texts: Iterator[str]) -> str:
        """A text with the next of what stands for media (`texts`) in each of its places. Raises `MediaFault`.

        A placeholder that a user has written is a fault: the model would look for a medium there.
        """
        parts = PLACE.split(text)
        # Not behind the mark of what is meant as text (transformers' `mark_control_tokens`).
        pattern = re.compile(f"(?<!\U000f0000)({'|'.join(map(re.escape, self.tokens.values())) or '(?!)'})")
        for part in parts[::2]:
            if written := pattern.search(part):
                named = next(each for each, token in self.tokens.items() if token == written[0])
                wrong = f"holds {written[0]}, by which the model knows {A_NOUN[named]}; no text can hold it"
                raise MediaFault("the text", "not media", wrong)
        return "".join(part if index % 2 == 0 else next(texts) for index, part in enumerate(parts))

    def _processed(
        self,
        kinds: Sequence[Sequence[Modality]],
        loaded: Sequence[Sequence[Any]],
        ids: torch.Tensor | None = None,
        **more: Any,
    ) -> Any:
        texts = ["".join(self.tokens[modality] for modality in row) for row in kinds]
        given: dict[str, Any] = {}
        if self.crossed:
            written = None if ids is None else ids.tolist()
            return process_crossed(self.processor, texts, [list(values) for values in loaded], written, **more)
        for row, values in zip(kinds, loaded, strict=True):
            for modality, value in zip(row, values, strict=True):
                given.setdefault(_ARGUMENTS[modality], []).append(value)
        if "audio" in given:
            more["sampling_rate"] = self.rate
        return process(self.processor, texts, **given, **more)


def changed(fault: MediaFault, where: str) -> DataError:
    """The error for a medium that could be read when the data was prepared, and is met again `where`."""
    return DataError(
        f"{fault}, {where}",
        remedy="All images and sounds were read when the data was prepared: put back what was there, or run "
        "gptcli tokenize RECIPE --verify, which prepares again what has changed.",
    )


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a folder.

    Pictures are read by PIL whether or not torchvision is there, so that they are the same numbers everywhere.

    Raises:
        MissingError: there is none, or a package that it needs is not installed.
        CheckpointError: its files are damaged.
    """
    if not has_processor(folder):
        raise MissingError(
            "no processor in this folder, so it reads no images and sounds",
            where=str(folder),
            remedy=f"Looked for {' and '.join(PROCESSOR_FILES[:2])}.",
        )
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with quiet():
        try:
            from transformers import AutoImageProcessor, AutoProcessor

            processor: Any = AutoProcessor.from_pretrained(str(folder), **shared)  # type: ignore[no-untyped-call]
            if "image_processor" in type(processor).get_attributes():
                pil: Any = AutoImageProcessor
                processor.image_processor = pil.from_pretrained(str(folder), backend="pil", **shared)
            if "tokenizer" in type(processor).get_attributes() and processor.tokenizer.pad_token is None:
                # Its texts are placeholders that are thrown away: any token pads them.
                processor.tokenizer.pad_token = processor.tokenizer.convert_ids_to_tokens(0)
            fitted(processor, folder)
        except ImportError as error:
            raise MissingError(
                "a package that this processor needs is missing",
                where=str(folder),
                remedy=f"{first_line(error)[:300]}\npip install 'gptcli[multimodal]' brings what reads media.",
            ) from error
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # whatever a class raises for files that are not its own
            reason = first_line(error)[:300]
            raise CheckpointError(f"the processor cannot be loaded: {reason}", where=str(folder)) from error
    return processor  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=2)
def open_reader(folder: Path) -> MediaReader:
    """The reader of a folder's processor, opened once a process. Raises as `load_processor`."""
    return reader_of(load_processor(folder))


def find_reader(folder: Path) -> MediaReader | None:
    """`open_reader`; None where the folder holds no processor."""
    return open_reader(folder) if has_processor(folder) else None


def reader_of(processor: Any) -> MediaReader:
    """A processor as a reader of media."""
    tokens = {
        modality: str(token)
        for modality, names in _READERS.items()
        if any(getattr(processor, name, None) is not None for name in names)
        and (token := getattr(processor, f"{modality}_token", None)) is not None
    }
    return MediaReader(processor, tokens)


@contextlib.contextmanager
def _faults(media: Sequence[Medium]) -> Iterator[None]:
    """Whatever a processor raises for decoded media is a fault of them."""
    try:
        yield
    except (MediaFault, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        named = media[0].name if len(media) == 1 else f"one of {len(media)} media ({media[0].name}, ...)"
        raise MediaFault(named, "not media", f"is not taken by the model's processor: {first_line(error)}") from error
