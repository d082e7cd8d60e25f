"""The Beam engine: the same segments and cells as an Apache Beam pipeline, on whatever runner its options name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pairmill.engines import Engine
from pairmill.errors import EngineError
from schemas.config import Engine as EngineConfig


@contextlib.contextmanager
def beam_engine(config: EngineConfig) -> Iterator[Engine]:  # noqa: ARG001
    """The engine of `beam_runner.py`."""
    raise EngineError("engine.kind beam runs by `python beam_runner.py CONFIG.yaml --runner=...`")
    yield
