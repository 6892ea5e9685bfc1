"""The images, sounds and videos of rows: what a value may be, where it may lie, and its decoding."""
