"""pairmill: from lists of web image URLs with alt text to clean training data for vision-language models."""

__version__ = "0.1.0"
