"""Loss and learning-rate curves of a training, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_LEFT_OUT = ("step", "lr")


def draw_curves(history: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Write a PNG: each loss term over steps, held-out figures as points, and the learning rate below.

    Args:
        history: as `pairmill.train.fit.Fitted.history`.
        path: the picture to write.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    names = list(dict.fromkeys(name for entry in history for name in entry if name not in _LEFT_OUT))
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        held_out = name.startswith("eval_")
        label = name.removeprefix("eval_") + " (held out)" if held_out else name
        upper.plot(*zip(*points, strict=True), "o-" if held_out else "-", label=label, linewidth=1.2, markersize=4)
    upper.set_ylabel("loss")
    upper.set_title(title)
    upper.grid(alpha=0.3)
    if names:
        upper.legend()
    rates = [(entry["step"], entry["lr"]) for entry in history if "lr" in entry]
    if rates:
        lower.plot(*zip(*rates, strict=True), color="tab:gray")
    lower.set_xlabel("optimizer step")
    lower.set_ylabel("learning rate")
    lower.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
