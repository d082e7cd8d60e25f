"""Attention of BLIP's vision model without the matrix of all pairs of tokens that transformers' own keeps in memory."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def attend_by_parts(vision: Any) -> None:
    """Let the layers of transformers' `BlipVisionModel` attend by torch's fused kernels, or head by head where that is
    faster: on CPUs with oneDNN (`pairmill.onednn.attended`), and in bf16 on any without tiles (AMX).

    577 tokens and 12 heads take a layer, CPU ms on an EPYC with AVX-512: bf16 13.5 by the fused kernel, 5.5 head by
    head; fp32 12.6 and 7.3. With tiles the fused kernel uses them.
    """
    import torch

    from pairmill import onednn

    weight = vision.post_layernorm.weight
    bf16 = weight.dtype == torch.bfloat16
    fused = torch.cpu._is_amx_tile_supported() if bf16 else not onednn.usable()
    attend = _attend_by_fused_kernel if weight.device.type != "cpu" or fused else _attend_by_head
    for layer in vision.encoder.layers:
        layer.self_attn.forward = MethodType(attend, layer.self_attn)


def _attend_by_fused_kernel(attention: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """In place of `BlipAttention.forward`: what it computes, of shape (images, tokens, width), and no weights."""
    from torch.nn.functional import scaled_dot_product_attention

    images, tokens, width = hidden_states.shape
    split = attention.qkv(hidden_states).view(images, tokens, 3, attention.num_heads, -1)
    query, key, value = split.permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product_attention(query, key, value, scale=attention.scale)
    return attention.projection(mixed.transpose(1, 2).reshape(images, tokens, width)), None


def _attend_by_head(attention: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """As `_attend_by_fused_kernel`."""
    from pairmill.onednn import attended

    images, tokens, width = hidden_states.shape
    heads = attention.num_heads
    split = attention.qkv(hidden_states).view(images, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = split.reshape(3, images * heads, tokens, -1)
    mixed = attended(query * attention.scale, key, value).view(images, heads, tokens, -1)
    return attention.projection(mixed.transpose(1, 2).reshape(images, tokens, width)), None
