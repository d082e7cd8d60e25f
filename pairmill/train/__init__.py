"""Training: the tiny models that the package ships, on procedural scenes."""
