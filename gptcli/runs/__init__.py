"""A run and its folder: its layout, its metrics, its report."""
