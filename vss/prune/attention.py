"""`nn.MultiheadAttention` after a cut: torch's own takes the sizes of everything inside it from `embed_dim`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(nn.MultiheadAttention):
    """What is left of an `nn.MultiheadAttention`: fewer heads, or heads of fewer channels, with its scale and names.

    Query and key have `num_heads` heads of as many channels as their weights have rows for; `head_dim` is that before
    the cut, of which the scale is made. Values may have another number. Arguments and results are those of torch's.
    """

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> None:
        """Turn a module into one, in place; one with an added key stays torch's, so that its cut does not run."""
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = cls
            module._qkv_same_embed_dim = False  # by which the fused layers of torch leave it alone

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`; of `is_causal` the mask that comes with it is used."""
        batched, turned = query.ndim == 3, query.ndim == 3 and not self.batch_first
        given = [x.transpose(0, 1) if turned else x if batched else x[None] for x in (query, key, value)]
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, (weight, bias) in zip(given, self._projections(), strict=True)
        )
        mask = _added(attn_mask, key_padding_mask, q)
        scale, dropout = self.head_dim**-0.5, self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = q * scale @ k.transpose(-2, -1)
            weights = F.dropout((weights if mask is None else weights + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out.transpose(0, 1) if turned else out if batched else out[0], weights

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of query, key and value."""
        wide = self.out_proj.weight.shape[1]
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            rows = (self.in_proj_weight.shape[0] - wide) // 2
            weights = list(self.in_proj_weight.split([rows, rows, wide]))
        biases: list[Tensor | None] = [None] * 3
        if self.in_proj_bias is not None:
            biases = list(self.in_proj_bias.split([len(weight) for weight in weights]))
        return list(zip(weights, biases, strict=True))


def _added(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to products of q (N, heads, L, d): a mask (L, S) or (N heads, L, S), a padding (N, S) or (S,)."""
    batch, heads = q.shape[:2]
    found = None
    if mask is not None:
        found = _numbers(mask, q)
        found = found.unflatten(0, (batch, heads)) if found.ndim == 3 else found
    if padding is not None:
        own = _numbers(padding, q).view(batch, 1, 1, -1)
        found = own if found is None else found + own
    return found


def _numbers(mask: Tensor, q: Tensor) -> Tensor:
    """-inf where a mask of bool is true."""
    if mask.dtype is not torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))
