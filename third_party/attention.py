"""Attention whose heads can be taken out: PyTorch's MultiheadAttention, taken apart.

``nn.MultiheadAttention`` ties its heads to its width (``num_heads * head_dim == embed_dim``), and
torch-pruning prunes it as one piece with the width of the whole network. :class:`SplitAttention`
computes the same with one linear layer each for queries, keys, values and the output, in which a
head is a run of consecutive output positions of the first three and of inputs of the last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .groups import UnsupportedLayerError


class SplitAttention(nn.Module):
    """Self- or cross-attention with any number of heads of one size.

    Args:
        embed_dim: size of inputs and outputs.
        heads: how many to start with.
        head_dim: size of a head; it never changes.
        bias: whether the linear layers have biases.
        dropout: of the attention weights, in training.

    The number of heads is read off the layers, so nothing else has to change when whole heads are
    removed from them.
    """

    def __init__(
        self, embed_dim: int, heads: int, head_dim: int, *, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.query = nn.Linear(embed_dim, heads * head_dim, bias)
        self.key = nn.Linear(embed_dim, heads * head_dim, bias)
        self.value = nn.Linear(embed_dim, heads * head_dim, bias)
        self.out = nn.Linear(heads * head_dim, embed_dim, bias)

    @property
    def heads(self) -> int:
        """How many heads there are now."""
        return self.value.out_features // self.head_dim

    @classmethod
    def of(cls, layer: nn.MultiheadAttention, name: str = "layer") -> SplitAttention:
        """A layer that computes what ``layer`` does, with parameters of its own.

        Raises:
            UnsupportedLayerError: the layer has a setting that is not supported here.
        """
        odd = [
            what
            for what, given in (
                ("batch_first=False", not layer.batch_first),
                ("kdim or vdim", layer.in_proj_weight is None),
                ("add_bias_kv", layer.bias_k is not None),
                ("add_zero_attn", layer.add_zero_attn),
            )
            if given
        ]
        if odd:
            raise UnsupportedLayerError(
                f"{name!r} is a MultiheadAttention with {', '.join(odd)}, which cannot be taken "
                "apart here; leave it out"
            )
        weight, bias = layer.in_proj_weight, layer.in_proj_bias
        split = cls(
            layer.embed_dim,
            layer.num_heads,
            layer.head_dim,
            bias=bias is not None,
            dropout=layer.dropout,
        ).to(weight.device, weight.dtype)
        with torch.no_grad():
            parts = (split.query, split.key, split.value)
            for part, rows in zip(parts, weight.chunk(3), strict=True):
                part.weight.copy_(rows)
            split.out.weight.copy_(layer.out_proj.weight)
            if bias is not None:
                for part, values in zip(parts, bias.chunk(3), strict=True):
                    part.bias.copy_(values)
                split.out.bias.copy_(layer.out_proj.bias)
        return split.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Like that of ``nn.MultiheadAttention``, for inputs (batch, length, embed_dim).

        Raises:
            UnsupportedLayerError: attention weights are wanted, or a mask is given.
        """
        if need_weights or key_padding_mask is not None or attn_mask is not None or is_causal:
            raise UnsupportedLayerError(
                "SplitAttention gives no attention weights and takes no masks; call it with "
                "need_weights=False, or do not take this attention apart"
            )
        q, k, v = (
            layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


def split_attention(model: nn.Module) -> list[str]:
    """Take every MultiheadAttention of a model apart, in place, so that its heads can be pruned.

    Parameters become new objects under other names: do it when the weights are loaded and before
    there is an optimizer, and again on a freshly built model before what was removed is repeated.

    Returns:
        The names of the layers.

    Raises:
        UnsupportedLayerError: naming a layer that cannot be taken apart; nothing was changed.
    """
    whole = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    split = [(name, SplitAttention.of(layer, name)) for name, layer in whole]
    for name, layer in split:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return [name for name, _ in split]
