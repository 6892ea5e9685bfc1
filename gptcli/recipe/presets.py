"""The sizes a model can be asked for by name: depth, width and heads, for any causal type.

The names are parameters of a llama with a vocabulary of 32 K (docs/recipe.md has the numbers for small ones, where
the embedding dominates). `model.config` wins over a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Depth, width and heads."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int


PRESETS: dict[str, Shape] = {
    "1m": Shape(4, 128, 4),
    "10m": Shape(6, 384, 6),
    "30m": Shape(6, 512, 8),
    "124m": Shape(12, 768, 12),
    "350m": Shape(24, 1024, 16),
    "774m": Shape(36, 1280, 20),
    "1.5b": Shape(48, 1600, 25),
}


@dataclass(frozen=True)
class MediaPreset:
    """A small model that sees or hears: its text model, and the tower that reads pictures or sounds.

    Attributes:
        text, tower: their shapes. Of one width, since some types have the tower's output as wide as the text.
        sizes: fields of the tower that a picture or a sound is cut by; the first one tells such a tower from others.
        model: fields of the whole model, set where its type has them.
    """

    text: Shape
    tower: Shape
    sizes: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)


# The last layer of a tower is read: published models read the one before it because theirs were trained for other ends,
# and a layer that nothing reads would stay random here.
MEDIA_PRESETS: dict[str, MediaPreset] = {
    "vision-1m": MediaPreset(
        Shape(4, 128, 4), Shape(2, 128, 4), {"patch_size": 7, "image_size": 28}, {"vision_feature_layer": -1}
    ),
    "audio-1m": MediaPreset(Shape(2, 128, 4), Shape(2, 128, 4), {"num_mel_bins": 64, "max_source_positions": 200}),
}


def body_parameters(shape: Shape) -> int:
    """Parameters of the layers of a GPT-style model (12 width^2 a layer), without embeddings."""
    return 12 * shape.num_hidden_layers * shape.hidden_size**2
