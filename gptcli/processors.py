"""transformers' processors: called with placeholders and media, they make what a model takes.

Most take media with a text that has a placeholder for each. Some take a text alone, because it is their own tokenizer
(mistral-common's, of voxtral) that brings the media and knows how many tokens each becomes. For these the same is made
of their feature extractor, whose windows of one length the model turns into so many tokens each.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.files import read_json, write_json
from gptcli.reporting import quiet

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedConfig

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
PROCESSOR = PROCESSOR_FILES[0]
CROSSED = "cross_attention_mask"  # transformers' name (mllama)
_WINDOWS = "audio_windows"  # our field in that file: the placeholder of a sound and how many a window becomes


def has_processor(folder: Path) -> bool:
    """Whether a folder holds a processor."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES[:2])


def process(processor: Any, texts: Sequence[str], **given: Any) -> Any:
    """What a processor makes of texts with placeholders and their media, with every media field its model takes.

    Args:
        processor: transformers' own; `fit` for one that takes a text alone.
        texts: one a row.
        given: `images`, `audio`, `videos` in the order of their placeholders, and what else the processor takes.

    Raises:
        Whatever the processor does for what it does not take.
    """
    with quiet():
        if takes_media(processor):
            return processor(text=list(texts), **given)
        return _joined(processor, texts, **given)


def process_crossed(
    processor: Any, texts: Sequence[str], images: Sequence[list[Any]], ids: list[list[int]] | None, **given: Any
) -> Any:
    """`process` for a model whose layers attend to images beside the text, by a mask of its tokens (`CROSSED`).

    Args:
        processor: transformers' own.
        texts: the placeholders of each row.
        images: those of each row.
        ids: the tokens of the rows, all of a length, for which the mask is made; None: those of `texts`.
        given: what else the processor takes.
    """
    if ids is not None:
        processor = copy.copy(processor)
        processor.tokenizer = _Written(processor.tokenizer, ids)
    with quiet():
        return processor(text=list(texts), images=list(images), **given)


class _Written:
    """A tokenizer to which every text is the tokens that are there already: its processor makes masks for these."""

    def __init__(self, tokenizer: Any, ids: list[list[int]]) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": self._ids, "attention_mask": [[1] * len(row) for row in self._ids]}


def takes_media(processor: Any) -> bool:
    """Whether sounds can be given to a processor, or to those of a class, with their text, if it hears at all."""
    kind = processor if isinstance(processor, type) else type(processor)
    hears = "feature_extractor" in getattr(kind, "get_attributes", list)()
    return not hears or "audio" in inspect.signature(kind.__call__).parameters


def fit(processor: Any, config: PreTrainedConfig) -> None:
    """Let a processor that takes a text alone stand for its model's sounds: by which token, and how often a window.

    Counted on a model of the configuration without values. A processor that takes media is left as it is.
    """
    if takes_media(processor):
        return
    import torch
    from transformers import AutoModelForMultimodalLM

    silence = torch.zeros(processor.feature_extractor.sampling_rate)
    with quiet(), torch.no_grad():
        windows = _windows(processor.feature_extractor, silence.numpy())
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(config)  # type: ignore[no-untyped-call]
        found = model.get_audio_features(windows.to("meta"), return_dict=True).pooler_output
    each = found.numel() // config.get_text_config().hidden_size // len(windows)
    _set(processor, int(config.audio_token_id), each)


def save_processor(processor: Any, folder: Path) -> None:
    """Write a processor into a folder; what `fit` found goes into its file."""
    processor.save_pretrained(str(folder))
    if not takes_media(processor):
        about = {"token_id": processor.audio_token_id, "tokens": processor.tokens_of_a_window}
        write_json(folder / PROCESSOR, {**read_json(folder / PROCESSOR), _WINDOWS: about})


def fitted(processor: Any, folder: Path) -> None:
    """`fit` a processor that was loaded from a folder, by what was saved with it, else by the model's configuration.

    Raises:
        OSError, ValueError: neither is there, or is damaged.
    """
    if takes_media(processor):
        return
    path = folder / PROCESSOR
    about = read_json(path).get(_WINDOWS) if path.is_file() else None
    if about is not None:
        _set(processor, int(about["token_id"]), int(about["tokens"]))
        return
    from transformers import AutoConfig

    fit(processor, AutoConfig.from_pretrained(str(folder), local_files_only=True))


def _set(processor: Any, token: int, each: int) -> None:
    processor.audio_token_id = token
    processor.audio_token = processor.tokenizer.convert_ids_to_tokens(token)
    processor.tokens_of_a_window = each


def _windows(extractor: Any, sound: Any) -> torch.Tensor:
    """The log-mel features of a sound, [windows, bins, frames]; the last window is filled up with silence.

    As transformers' VoxtralProcessor cuts them: of the whole sound, then into the lengths that the tower takes.
    """
    made = extractor(
        sound,
        sampling_rate=extractor.sampling_rate,
        padding=True,
        truncation=False,
        pad_to_multiple_of=extractor.n_samples,
        return_tensors="pt",
    )["input_features"]
    return made.reshape(extractor.feature_size, -1, extractor.nb_max_frames).transpose(0, 1)  # type: ignore[no-any-return]


def _joined(
    processor: Any,
    texts: Sequence[str],
    *,
    audio: Sequence[Any] = (),
    sampling_rate: int | None = None,
    return_text_replacement_offsets: bool = False,
    **of_text: Any,
) -> BatchFeature:
    """`process` by the parts of a processor: its tokenizer and its feature extractor."""
    import torch
    from transformers import BatchFeature

    extractor, mark = processor.feature_extractor, processor.audio_token
    if sampling_rate not in (None, extractor.sampling_rate):
        raise ValueError(f"sounds of {sampling_rate} samples a second, where {extractor.sampling_rate} are taken")
    if (wanted := sum(text.count(mark) for text in texts)) != len(audio):
        raise ValueError(f"{wanted} placeholders for {len(audio)} sounds")
    windows = [_windows(extractor, sound) for sound in audio]
    left = iter([mark * (len(each) * processor.tokens_of_a_window) for each in windows])
    replaced = [[next(left) for _ in range(text.count(mark))] for text in texts]
    filled = []
    for text, marks in zip(texts, replaced, strict=True):
        parts = text.split(mark)
        filled.append(parts[0] + "".join(a + b for a, b in zip(marks, parts[1:], strict=True)))
    made = BatchFeature(dict(processor.tokenizer(filled, **of_text)))
    if windows:
        made["input_features"] = torch.cat(windows)
    if return_text_replacement_offsets:
        made["text_replacement_offsets"] = [[{"replacement": text} for text in marks] for marks in replaced]
    return made
