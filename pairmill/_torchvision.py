"""Make torchvision importable beside a build of torch that its own C++ operators do not fit.

torchvision from the package index is built for CUDA. Beside a CPU build of torch its operators cannot load, and
importing it (so also open_clip, timm and the image processors of transformers) fails with "operator
torchvision::nms does not exist". The transforms need none of those operators; declaring the schemas of the two that
torchvision describes while it is imported is enough.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


def ensure_torchvision() -> None:
    """Call before the first import of torchvision, open_clip or timm.

    Does nothing where torchvision is imported already, is not installed, or has operators that load. Otherwise
    declares `torchvision::nms` and `torchvision::qnms` without an implementation: calling them still fails.
    """
    if "torchvision" in sys.modules or _declared:
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    import torch

    if hasattr(torch.ops.torchvision, "nms") or _own_operators_load(Path(found.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)


def _own_operators_load(folder: Path) -> bool:
    """Whether torchvision's operator library loads (it then registers its operators)."""
    import torch

    for library in sorted((*folder.glob("_C*.so"), *folder.glob("_C*.pyd"), *folder.glob("_C*.dylib"))):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return hasattr(torch.ops.torchvision, "nms")
    return False
