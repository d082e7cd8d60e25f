"""Linear layers by oneDNN, where models run on x86 CPUs. Import this module where torch is needed anyway.

torch sends products in fp32 to MKL, which leaves AVX-512 unused on processors that are not Intel's, and lays weights
out anew for each product. oneDNN's kernels, which torch itself uses for bf16 and in compiled graphs, take weights laid
out once. On an AMD EPYC (Zen 5), one thread, GFLOP/s of a product of 1,600 tokens by weights of 768 x 3072: fp32 102 by
MKL, 232 by oneDNN; bf16 408 and 473. Of 8 tokens, as when a decoder writes: fp32 0.52 ms and 0.20, bf16 0.19 and 0.11.
Results differ in their last bits.
"""

from __future__ import annotations

import itertools
import platform
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 512
"""Tokens of a product for which weights are laid out; other numbers work, too."""

LOGITS = 2**19
"""Logits that attention makes at a time, about: they stay in a core's cache. All of an image's (577 tokens, 12 heads:
8 MB in bf16, and as much again for each step to the weights) are memory that the system often hands out anew for each
layer: 10,000 to 70,000 page faults an image, and a tenth to a third of the CPU time of BLIP-base's vision model."""


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether this machine and this build of torch have what `pack` needs."""
    needed = ("_linear_pointwise", "_reorder_linear_weight")
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in needed)
    )


def pack(model: nn.Module) -> None:
    """Replace linear layers, and the self-attention of open_clip's transformers, by faster ones, where `usable`.

    Args:
        model: on the CPU, in evaluation mode. It can no longer be trained or saved. A layer whose weights are also an
            embedding's keeps a copy of its own.
    """
    if usable():
        _pack(model)


def gain_of_bf16() -> float:
    """How many times as fast as in fp32 this CPU multiplies in bf16: CPU time of one thread, the best of five each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, inputs = torch.ones(1024, 1024, dtype=dtype), torch.ones(ROWS, 1024, dtype=dtype)
        product: nn.Module = PackedLinear(weight, None) if usable() else nn.Linear(1024, 1024, bias=False, dtype=dtype)
        taken = []
        with torch.inference_mode():
            for _ in range(6):
                begin = time.thread_time()
                product(inputs)
                taken.append(time.thread_time() - begin)
        best[dtype] = min(taken[1:])
    torch.set_num_threads(threads)
    return best[torch.float32] / best[torch.bfloat16]


def _pack(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear and not _takes_weights(module, name):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        elif _cuts_patches(child):
            setattr(module, name, PatchEmbedding(child))
        elif _is_plain_self_attention(module, child):
            setattr(module, name, SelfAttention(child))
        else:
            _pack(child)
    if isinstance(module, nn.Sequential):
        _fuse_gelu(module)


class PackedLinear(nn.Module):
    """`torch.nn.Linear` with weights laid out for oneDNN, and perhaps an exact GELU after it.

    Args:
        weight: of shape (outputs, inputs), float32 or bfloat16.
        bias: of shape (outputs,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = None if bias is None else bias.detach()
        self.gelu = False
        self.out_features, self.in_features = weight.shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of shape (..., outputs) for inputs of shape (..., inputs)."""
        after: tuple[str, list[float], str] = ("gelu", [], "none") if self.gelu else ("none", [], "")
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *after)
        return outputs


class SelfAttention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes of one sequence, by products and a softmax in float32.

    In bf16 the fused kernel of torch's CPU build is slower: 16 rows of 77 tokens and 8 heads take it 4.7 ms, and these
    products 1.5 ms.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.scale = attention.head_dim**-0.5
        self.project_in = PackedLinear(attention.in_proj_weight, attention.in_proj_bias)
        self.project_out = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        """Attention of shape (rows, tokens, width) and, where the library returns its weights, None.

        Args:
            x: of shape (rows, tokens, width), query, key and value in one.
            attn_mask: added to the logits, of shape (tokens, tokens) or (rows x heads, tokens, tokens).
        """
        rows, tokens, width = x.shape
        split = self.project_in(x).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.reshape(3, rows * self.heads, tokens, width // self.heads).unbind()
        if attn_mask is None:
            mixed = attended(query * self.scale, key, value, torch.float32)
        else:  # texts are short
            logits = torch.baddbmm(attn_mask.to(query.dtype), query, key.transpose(1, 2), alpha=self.scale)
            mixed = _mixed(logits, value, torch.float32)
        mixed = mixed.view(rows, self.heads, tokens, -1).transpose(1, 2).reshape(rows, tokens, width)
        return self.project_out(mixed), None


def attended(query: Tensor, key: Tensor, value: Tensor, softmax: torch.dtype | None = None) -> Tensor:
    """``softmax(query @ key.T) @ value`` of each pair of image and head, some pairs at a time (`LOGITS`).

    In fp32 oneDNN multiplies where there is more than one part: 577 tokens and 12 heads took 7.3 ms, 12.6 by torch's
    fused kernel and 15.6 by MKL.

    Args:
        query: scaled, of shape (pairs, tokens, width of a head), as the others.
        key: as many tokens.
        value: as many.
        softmax: its dtype; None: that of the others.
    """
    pairs, tokens, _ = query.shape
    some = max(1, LOGITS // tokens**2)
    if pairs <= some:
        return _mixed(torch.bmm(query, key.transpose(1, 2)), value, softmax)
    mixed = torch.empty(query.shape, dtype=query.dtype)
    if query.dtype == torch.float32 and usable():
        # with strided operands oneDNN falls back to its reference kernels: 450 ms a product instead of 0.3
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        for pair in range(pairs):
            weights = _product(query[pair], key[pair]).softmax(dim=-1)
            mixed[pair] = _product(weights, value[pair].t())
        return mixed
    for start in range(0, pairs, some):
        part = slice(start, start + some)
        mixed[part] = _mixed(torch.bmm(query[part], key[part].transpose(1, 2)), value[part], softmax)
    return mixed


def _mixed(logits: Tensor, value: Tensor, softmax: torch.dtype | None = None) -> Tensor:
    return torch.bmm(logits.softmax(dim=-1, dtype=softmax).to(value.dtype), value)


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs @ weight.T`` by oneDNN, of weights that are not laid out for it."""
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return outputs


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel's size, as one product of patches with its weights.

    Pictures of 224 pixels in patches of 32 took the convolution 3.5 ms each, and the product 1.3.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.patch = convolution.kernel_size
        self.project = PackedLinear(convolution.weight.flatten(1), convolution.bias)
        self.weight = convolution.weight  # models ask for its dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Of shape (images, width, rows of patches, columns), for pixels of shape (images, 3, height, width)."""
        height, width = self.patch
        grid = pixels.unfold(2, height, height).unfold(3, width, width)
        patches = grid.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return self.project(patches).permute(0, 3, 1, 2)


def _cuts_patches(child: nn.Module) -> bool:
    """Whether a child is a convolution over patches that do not overlap."""
    return (
        type(child) is nn.Conv2d
        and child.stride == child.kernel_size
        and child.kernel_size != (1, 1)
        and child.padding in ((0, 0), "valid")
        and child.dilation == (1, 1)
        and child.groups == 1
    )


def _takes_weights(parent: nn.Module, name: str) -> bool:
    """Whether a module does more with a linear child than call it: the pooling of open_clip's ResNets, and timm's EVA,
    BEiT and Swin v2 where queries have a bias of their own, hand its weights to a function; open_clip's text towers ask
    what class their projection is of."""
    pooling = type(parent).__name__ == "AttentionPool2d"
    return pooling or name == "text_projection" or (name == "qkv" and getattr(parent, "q_bias", None) is not None)


def _is_plain_self_attention(parent: nn.Module, child: nn.Module) -> bool:
    """Whether a child is the self-attention of one of open_clip's residual blocks."""
    from open_clip.transformer import ResidualAttentionBlock

    return (
        isinstance(parent, ResidualAttentionBlock)
        and not hasattr(parent, "ln_1_kv")  # it would be cross-attention
        and type(child) is nn.MultiheadAttention
        and child.batch_first
        and child.in_proj_bias is not None
    )


def _fuse_gelu(layers: nn.Sequential) -> None:
    """A GELU behind a packed layer becomes a part of it."""
    named = list(layers.named_children())
    for (_, first), (name, second) in itertools.pairwise(named):
        if isinstance(first, PackedLinear) and isinstance(second, nn.GELU) and second.approximate == "none":
            first.gelu = True
            setattr(layers, name, nn.Identity())
