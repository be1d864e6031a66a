"""studies: what the notebooks of notebooks/analysis/ measure, and what may be said of it."""
