"""COCO's compressed run-length encoding of masks, as `pycocotools.mask` reads and writes it.

Runs go down the columns, from the left; the first one is of zeros, and may be empty. From the fourth run on the
difference to the run two before is written. Each number is cut into groups of five bits, the lowest first; a sixth bit
says that more follow, the highest bit of the last group is the sign, and 48 is added to make a printable character.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def encode(mask: npt.NDArray[np.bool_]) -> str:
    """The ``counts`` of a mask of shape (height, width)."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    if mask.size and mask[-1, -1]:
        edges = edges[:-1]  # the last run ends with the mask
    runs = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist() if mask.size else []
    letters = []
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            low = number & 0x1F
            number >>= 5
            more = number != (-1 if low & 0x10 else 0)
            letters.append(chr((low | 0x20 if more else low) + 48))
    return "".join(letters)


def decode(counts: str, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The mask of shape (height, width) that `encode` made `counts` of.

    Raises:
        ValueError: `counts` is damaged, or of a mask of another size.
    """
    runs: list[int] = []
    number = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{letter!r} in the counts of a mask")
        number |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    if shift or sum(runs) != height * width or any(run < 0 for run in runs):
        raise ValueError(f"the counts of a mask are not those of {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")
