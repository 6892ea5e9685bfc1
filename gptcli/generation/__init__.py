"""Text from a model: one prompt, streamed."""
