"""A head of your own: fit a linear score of pictures on CLIP embeddings, and save it as `models.heads` reads it.

This one learns to count the objects of procedural scenes from the shipped CLIP (`examples/heads.yaml` uses it). For a
head on your own data, take embeddings from a dataset and labels from wherever you have them; the last ten lines stay.

    python examples/train_head.py examples/heads/objects.safetensors
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pairmill.models import ModelRef, load_clip
from pairmill.procedural.scene import render, sample_scene
from schemas.config import ModelChoice

SCENES, HELD_OUT, PENALTY = 3000, 600, 1e-2

rng = random.Random(0)
scenes = [sample_scene(rng, objects=rng.randint(1, 3)) for _ in range(SCENES)]
clip = load_clip(ModelRef.of(ModelChoice(name="tiny")))
x = clip.embed_images([render(scene) for scene in scenes]).astype(np.float64)
y = np.array([len(scene.objects) for scene in scenes], dtype=np.float64)

train, test = slice(HELD_OUT, None), slice(0, HELD_OUT)
mean, centre = x[train].mean(axis=0), y[train].mean()
inner = (x[train] - mean).T @ (x[train] - mean)
weight = np.linalg.solve(inner + PENALTY * np.eye(len(mean)), (x[train] - mean).T @ (y[train] - centre))
bias = centre - mean @ weight
told = x[test] @ weight + bias
print(f"held out: R2 {1 - np.var(told - y[test]) / np.var(y[test]):.3f}, ", end="")
print(f"one object told from several at 1.5: {np.mean((told >= 1.5) == (y[test] >= 2)):.1%}")

path = Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True)
save_file({"weight": weight[None].astype(np.float32), "bias": np.array([bias], dtype=np.float32)}, path)
