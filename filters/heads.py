"""Heads over stored CLIP embeddings (aesthetic, NSFW, watermark and the like): a linear layer or an MLP in safetensors.

A head is only as good as the embeddings it was trained on: it must belong to the model of `models.clip`. It costs a few
vector products a row, so it runs on the stored embeddings, without images, GPU or torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairmill.errors import ConfigError
from pairmill.stage import Batch, Kernel, Resources, Stage
from pairmill.weights_cache import local_path
from schemas import fields
from schemas.config import Keep, Models

Vector = npt.NDArray[np.float64]

ACTIVATIONS = ("none", "relu", "gelu")
"""Between layers, as the file's metadata may say (``activation``)."""
OUTPUT_ACTIVATIONS = ("none", "sigmoid", "softmax")
"""Of the output, as the config or the file's metadata may say (``output_activation``)."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")
_FLOATS = frozenset({"F16", "F32", "F64"})


@dataclass(frozen=True)
class HeadFile:
    """The file of a head. Its `identity` is its content, never its path."""

    path: str = field(metadata={"identity": False})

    def identity(self) -> dict[str, str]:
        """sha256 (hex) of the file.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return {"sha256": hashlib.sha256(Path(self.path).read_bytes()).hexdigest()}
        except OSError as error:
            raise ConfigError(f"models.heads: cannot read {self.path}: {error.strerror}; correct the path") from error


@dataclass(frozen=True)
class EmbeddingHead(Stage):
    """A score of each image from its embedding: one float32 column, named as the config names the head.

    A row without embedding, or with one that is not finite, has no score. Results do not depend on the batch: each row
    is computed on its own, in float64.
    """

    reads = (fields.CLIP_IMAGE.name,)

    column: str
    file: HeadFile
    activation: str | None = None
    """Of the output: none, sigmoid or softmax; None: as the file says."""
    output: int = 0
    """Which output is the score."""
    resources: Resources = field(default=Resources(rows=256), metadata={"identity": False})

    @property
    def name(self) -> str:  # type: ignore[override]
        """``head_`` and the column."""
        return f"head_{self.column}"

    @property
    def writes(self) -> tuple[pa.Field, ...]:
        """The score."""
        return (pa.field(self.column, pa.float32()),)

    @classmethod
    def all_of(cls, models: Models) -> tuple[EmbeddingHead, ...]:
        """The heads that a config asks for, in its order. Each is loaded once, so that a wrong file is found now.

        Raises:
            ConfigError: a name that is no name of a column, or a file that is no head.
        """
        stages = []
        for column, choice in models.heads.items():
            key = f"models.heads.{column}"
            if not _NAME.fullmatch(column):
                raise ConfigError(f"{key}: a head's name becomes a column: a to z, 0 to 9 and _, at most 48 characters")
            if column in Keep.model_fields:
                raise ConfigError(f"{key}: keep.{column} is a rule of its own already; give the head another name")
            path = _the_file(Path(local_path(choice.path)).expanduser(), key)
            stages.append(cls(column, HeadFile(str(path)), choice.activation, choice.output))
            load_head(path, key, choice.activation, choice.output)
        return tuple(stages)

    def open(self) -> Kernel:
        """Load the head.

        Raises:
            ConfigError: see `load_head`.
        """
        key = f"models.heads.{self.column}"
        head = load_head(Path(self.file.path), key, self.activation, self.output)

        def kernel(batch: Batch) -> pa.Table:
            scores = []
            for embedding in batch.column(fields.CLIP_IMAGE.name):
                values = embedding.values
                if values is not None and len(values) != head.width:
                    raise ConfigError(
                        f"{key}: the head takes embeddings of width {head.width}, models.clip writes {len(values)}; "
                        "give the head that was trained on this CLIP model, or the CLIP model that it was trained on"
                    )
                scores.append(None if values is None else head.score(values.to_numpy(zero_copy_only=False)))
            return pa.table({self.column: pa.array(scores, pa.float32())})

        return kernel


@dataclass(frozen=True)
class Linear:
    """``weight @ x + bias``, as `torch.nn.Linear`."""

    name: str
    weight: npt.NDArray[np.float64]
    """Of shape (outputs, inputs)."""
    bias: Vector

    def __call__(self, x: Vector) -> Vector:
        """The outputs. Summed by numpy itself: BLAS may add in another order on another number of threads."""
        outputs: Vector = np.einsum("oi,i->o", self.weight, x) + self.bias
        return outputs


@dataclass(frozen=True)
class Head:
    """A loaded head."""

    layers: tuple[Linear, ...]
    activation: str
    """Between layers: one of `ACTIVATIONS`."""
    output_activation: str
    """One of `OUTPUT_ACTIVATIONS`."""
    output: int

    @property
    def width(self) -> int:
        """Of the embeddings it takes."""
        return int(self.layers[0].weight.shape[1])

    def score(self, embedding: npt.NDArray[Any]) -> float | None:
        """The score of one embedding of shape (width,); None where it is not finite."""
        x = embedding.astype(np.float64)
        if not np.isfinite(x).all():
            return None
        for number, layer in enumerate(self.layers):
            if number:
                x = _BETWEEN[self.activation](x)
            x = layer(x)
        score = _AT_END[self.output_activation](x.tolist(), self.output)
        return score if math.isfinite(score) else None


def _gelu(x: Vector) -> Vector:
    """The exact form, torch's default: x * Phi(x)."""
    return np.array([0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x.tolist()])


def _sigmoid(values: list[float], output: int) -> float:
    v = values[output]
    return 1.0 / (1.0 + math.exp(-v)) if v >= 0 else math.exp(v) / (1.0 + math.exp(v))


def _softmax(values: list[float], output: int) -> float:
    top = max(values)
    return math.exp(values[output] - top) / math.fsum(math.exp(v - top) for v in values)


_BETWEEN: dict[str, Callable[[Vector], Vector]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": _gelu,
}
# math.exp rather than np.exp, whose last bit may depend on where in an array a value stands
_AT_END: dict[str, Callable[[list[float], int], float]] = {
    "none": lambda values, output: values[output],
    "sigmoid": _sigmoid,
    "softmax": _softmax,
}


def load_head(path: Path, key: str, output_activation: str | None = None, output: int = 0) -> Head:
    """A head from a safetensors file: the state dict of an `nn.Linear`, or of an `nn.Sequential` of them (Dropout and
    activations have no weights), under any prefix. Layers follow the numbers in their names.

    What is between the layers cannot be seen in a state dict: nothing, unless the file's metadata says ``activation``
    (relu or gelu). LAION's aesthetic predictor, for one, has nothing there
    (https://github.com/christophschuhmann/improved-aesthetic-predictor, class MLP).

    Args:
        path: the file.
        key: of the config, for messages.
        output_activation: none, sigmoid or softmax; None: the metadata's ``output_activation``, else none.
        output: which output is the score.

    Raises:
        ConfigError: no safetensors file, other tensors than linear layers, layers that do not fit together, or an
            output that is not there.
    """
    tensors, metadata = _read(path, key)
    layers = _layers(tensors, path, key)
    for left, right in itertools.pairwise(layers):
        if left.weight.shape[0] != right.weight.shape[1]:
            raise ConfigError(
                f"{key}: in {path} the layer {left.name!r} gives {left.weight.shape[0]} values, but {right.name!r} "
                f"after it takes {right.weight.shape[1]}; layers follow the numbers in their names: save the "
                "state dict of an nn.Sequential of Linear layers"
            )
    outputs = layers[-1].weight.shape[0]
    if output >= outputs:
        raise ConfigError(f"{key}.output is {output}, but the head has {outputs} outputs, counted from 0")
    inner = metadata.get("activation", "none")
    final = output_activation or metadata.get("output_activation", "none")
    for word, known, where in ((inner, ACTIVATIONS, "activation"), (final, OUTPUT_ACTIVATIONS, "output_activation")):
        if word not in known:
            raise ConfigError(f"{key}: the metadata of {path} say {where} {word!r}; known are {', '.join(known)}")
    return Head(layers, inner, final, output)


def _the_file(path: Path, key: str) -> Path:
    """The file itself, or the only safetensors file of a folder."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ConfigError(f"{key}.path: {path} holds {len(found)} .safetensors files; name the file")
    return found[0]


def _read(path: Path, key: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors by name, and the file's metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"{key}.path: there is no file {path}; correct the path")
    try:
        with safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
            if others := sorted({kind for kind in kinds.values() if kind not in _FLOATS}):
                raise ConfigError(f"{key}: {path} holds {', '.join(others)} tensors; save them as float32")
            return {name: file.get_tensor(name) for name in kinds}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{key}: {path} is no safetensors file ({error}); others can carry code and are not read. Convert it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'head.safetensors')"
        ) from error


def _layers(tensors: dict[str, npt.NDArray[Any]], path: Path, key: str) -> tuple[Linear, ...]:
    """The linear layers, in the order of the numbers in their names."""
    left = dict(tensors)
    layers = []
    for name in sorted((n for n in tensors if n.rpartition(".")[2] == "weight"), key=_natural):
        prefix = name.removesuffix("weight")
        weight = left.pop(name)
        bias = left.pop(f"{prefix}bias", np.zeros(weight.shape[:1]))
        if weight.ndim != 2 or 0 in weight.shape or bias.shape != weight.shape[:1]:
            raise ConfigError(
                f"{key}: {name!r} in {path} has shape {weight.shape}, its bias {bias.shape}; a head consists of linear "
                "layers only: fold normalisation into them"
            )
        layers.append(Linear(prefix.rstrip(".") or "weight", weight.astype(np.float64), bias.astype(np.float64)))
    if left or not layers:
        what = f"the tensor {sorted(left)[0]!r}" if left else "no layer"
        raise ConfigError(
            f"{key}: {path} holds {what}; a head is the state dict of linear layers, with names such as "
            "'layers.0.weight' and 'layers.0.bias'"
        )
    return tuple(layers)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.10 after layers.2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
