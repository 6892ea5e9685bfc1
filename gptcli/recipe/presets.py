"""The sizes a model can be asked for by name: depth, width and heads, for any causal type.

The names are parameters of a llama with a vocabulary of 32 K (docs/recipe.md has the numbers for small ones, where
the embedding dominates). `model.config` wins over a preset.
"""

from __future__ import annotations

from dataclasses import dataclass


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


def body_parameters(shape: Shape) -> int:
    """Parameters of the layers of a GPT-style model (12 width^2 a layer), without embeddings."""
    return 12 * shape.num_hidden_layers * shape.hidden_size**2
