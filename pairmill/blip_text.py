"""BLIP's text model (BERT whose layers also attend to an image), read by less arithmetic than transformers' own.

Numbers are those of transformers' modules up to their last bits; the weights are theirs.

Cross-attention happens in the space of the image's features. Keys are ``x W_k`` for features ``x``, so logits
``q (x W_k)^T`` are ``(q W_k^T) x^T``, and the mixed values ``p (x W_v)`` are ``(p x) W_v``. A text has few tokens and
an image hundreds (577 at 384 pixels), so it is cheaper to bring the text's queries to the image than the image's tokens
to each of the layers: keys and values of BLIP-base cost as much as a sixth of the vision model, and are read again from
memory for each token that is written. The bias of the keys moves all logits of a query alike and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class SeenImages:
    """Image features as what groups of texts attend to.

    Args:
        states: of each group its image's features, of shape (image tokens, width). Groups of one image share a tensor.
    """

    def __init__(self, states: Sequence[torch.Tensor]) -> None:
        import torch

        from pairmill import onednn

        self.groups = len(states)
        self._stacked: torch.Tensor | None = None
        self._products: list[tuple[Any, Any]] = []
        if states[0].device.type == "cpu" and onednn.usable():
            products = {id(state): _products(state) for state in {id(state): state for state in states}.values()}
            self._products = [products[id(state)] for state in states]
        else:
            self._stacked = torch.stack(list(states))

    def mixed(self, queries: torch.Tensor) -> torch.Tensor:
        """Features weighted by the softmax of their inner products with queries.

        Args:
            queries: of shape (heads, texts, width), as many texts one after the other for each group.

        Returns:
            The same shape.
        """
        import torch

        heads, _, width = queries.shape
        grouped = queries.view(heads, self.groups, -1, width)
        if self._stacked is not None:
            flat = grouped.transpose(0, 1).reshape(self.groups, -1, width)
            weights = torch.bmm(flat, self._stacked.transpose(1, 2)).softmax(dim=-1)
            parts = torch.bmm(weights, self._stacked).view(self.groups, heads, -1, width)
            return parts.transpose(0, 1).reshape(queries.shape)
        found = []
        for group, (weigh, mix) in enumerate(self._products):
            weights = weigh(grouped[:, group].reshape(-1, width)).softmax(dim=-1)
            found.append(mix(weights).view(heads, -1, width))
        return torch.stack(found, dim=1).view(queries.shape)


def _products(state: torch.Tensor) -> tuple[Any, Any]:
    """Layers that multiply by an image's features and by their transpose."""
    from pairmill.onednn import PackedLinear

    return PackedLinear(state, None), PackedLinear(state.T.contiguous(), None)


class Past:
    """Keys and values of the tokens that a decoder has read, for each layer: (rows, heads, length, width of a head)."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers

    def repeated(self, count: int) -> Past:
        """Each row so many times in a row."""
        return Past([(k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in self.layers])


class TextTower:
    """Reads texts that attend to images.

    Args:
        bert: transformers' `BlipTextModel`, with its weights as they were loaded: those of keys and values are taken
            from it before others are laid out anew (`pairmill.onednn`).
    """

    def __init__(self, bert: Any) -> None:
        self._embeddings = bert.embeddings
        self._layers = list(bert.encoder.layer)
        attention = self._layers[0].attention.self
        self._heads = attention.num_attention_heads
        self._width = attention.attention_head_size
        crossing = [layer.crossattention.self for layer in self._layers]
        self._keys = [self._by_head(one.key.weight) for one in crossing]
        self._values = [self._by_head(one.value.weight) for one in crossing]
        self._value_biases = [one.value.bias.detach() for one in crossing]

    def _by_head(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().view(self._heads, self._width, -1)

    def past(self, rows: int, length: int) -> Past:
        """Room for so many rows and tokens."""
        weight = self._keys[0]
        shape = rows, self._heads, length, self._width
        return Past([(weight.new_empty(shape), weight.new_empty(shape)) for _ in self._layers])

    def read(
        self,
        ids: torch.Tensor,
        images: SeenImages,
        *,
        mask: torch.Tensor | None = None,
        past: Past | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        """The last hidden states of tokens, of shape (texts, tokens, width).

        Args:
            ids: of shape (texts, tokens); as many texts one after the other for each of the images.
            images: what they attend to.
            mask: an encoder's: true for tokens that are read, of shape (texts, tokens).
            past: a decoder's: what was read of the texts before, and where what is read now is added.
            start: how many tokens were.
        """
        places = self._embeddings.position_ids[:, start : start + ids.shape[1]]
        hidden = self._embeddings(input_ids=ids, position_ids=places)
        for number, layer in enumerate(self._layers):
            kept = None if past is None else past.layers[number]
            context = self._among_tokens(layer.attention.self, hidden, mask, kept, start)
            hidden = layer.attention.output(context, hidden)
            hidden = layer.crossattention.output(self._to_images(number, hidden, images), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        return hidden

    def _among_tokens(
        self,
        attention: Any,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor] | None,
        start: int,
    ) -> torch.Tensor:
        from torch.nn.functional import scaled_dot_product_attention

        rows, tokens, width = hidden.shape

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.view(rows, tokens, self._heads, self._width).transpose(1, 2)

        query, key, value = (split(part(hidden)) for part in (attention.query, attention.key, attention.value))
        if past is not None:
            for room, new in zip(past, (key, value), strict=True):
                room[:, :, start : start + tokens] = new
            key, value = (room[:, :, : start + tokens] for room in past)
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            None if mask is None else mask[:, None, None, :],
            is_causal=past is not None and tokens > 1,
        )
        return context.transpose(1, 2).reshape(rows, tokens, width)

    def _to_images(self, number: int, hidden: torch.Tensor, images: SeenImages) -> torch.Tensor:
        import torch

        rows, tokens, width = hidden.shape
        query = self._layers[number].crossattention.self.query(hidden) * self._width**-0.5
        by_head = query.view(rows * tokens, self._heads, self._width).transpose(0, 1)
        mixed = images.mixed(torch.bmm(by_head, self._keys[number]))
        context = torch.bmm(mixed, self._values[number].transpose(1, 2))
        return context.transpose(0, 1).reshape(rows, tokens, width) + self._value_biases[number]
