"""Models: built from a type and a size, or loaded from a folder."""
