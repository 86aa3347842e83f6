"""A set encoder for the parts of a signal, some of which are missing: headset views, landmarks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lipflow.model.blocks import NormLinear, leaky

_HEADS = 4


class MaskedSetEncoder(nn.Module):
    """N tokens, one for each part of a signal, to one feature.

    A missing part has a token too, its learned embedding alone. One attention block (pre-norm, as in ViT) lets every
    token attend to those of the parts that are seen, so that a missing one takes from them what they tell of it, as in
    masked autoencoders; a layer with weights for every part then reads all tokens. A mean over the seen tokens in its
    place loses which part said what: see ``tests/benchmarks/RESULTS.md``.

    Args:
        parts: N.
        width: of a token, a multiple of 4, the number of attention heads.
        outputs: width of the feature.
    """

    def __init__(self, parts: int, width: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.own_norm = nn.LayerNorm(width)
        self.expand = NormLinear(width, 2 * width)
        self.contract = NormLinear(2 * width, width, last=True)
        self.fc = NormLinear(parts * width, outputs)

    def forward(self, token: Tensor, seen: Tensor) -> Tensor:
        """``(B, N, width)`` under ``seen (B, N)`` bool to ``(B, outputs)``.

        The token of a part that is not seen must not depend on what stands in its place.
        """
        heads = self.query_key_value(self.norm(token)).unflatten(-1, (3, _HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # A frame without any is not masked: not every kernel has a value for a softmax over nothing.
        asked = (seen | ~seen.any(-1, keepdim=True))[:, None, None]
        # Not nn.MultiheadAttention, which rounds otherwise where no gradient is kept.
        told = F.scaled_dot_product_attention(query, key, value, attn_mask=asked)
        token = token + self.attended(told.transpose(1, 2).flatten(2))
        token = token + self.contract(leaky(self.expand(self.own_norm(token))))
        return leaky(self.fc(token.flatten(1)))
