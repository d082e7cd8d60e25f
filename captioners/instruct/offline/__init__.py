"""The offline writer: conversations composed from an image's texts and boxes, without a model."""

from captioners.instruct.offline.writer import OfflineWriter

__all__ = ["OfflineWriter"]
