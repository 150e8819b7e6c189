"""TextEncoder: a small network of texts, which is trained along with the network that it is in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
# A text of emoji needs no more, and the network of the pictures remains the larger one.
_NARROWEST, _WIDEST = 32, 128
# Bytes that the convolution sees at once: about a word.
_WORD = 5


class TextEncoder(nn.Module):
    """Bytes of a text to one vector: a convolution finds words, attention reads and sums them up.

    Bytes and their places are embedded; a convolution over five bytes, and one layer of
    self-attention with its perceptron (Vaswani et al. 2017), add to them; four learned queries
    attend to the result, and a linear layer makes the vector. Padding is never seen, and the answer
    to a text does not depend on how much of it there is. A start that every text has is what is
    left of an empty one.

    Args:
        length: most bytes of a text.
        out: numbers of the vector.
    """

    def __init__(self, length: int, out: int) -> None:
        super().__init__()
        width = min(max(out // HEADS * HEADS, _NARROWEST), _WIDEST)
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.words = nn.Conv1d(width, width, _WORD, padding=_WORD // 2)
        self.start = nn.Parameter(torch.randn(width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.norm3 = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(HEADS, width) * width**-0.5)
        self.out = nn.Linear(HEADS * width, out)

    def forward(self, condition: Tensor) -> Tensor:
        """Map bytes (N, length), 0 where there is no text, to (N, out)."""
        if not condition.is_cuda:  # a GPU would have to be waited for
            longest = int(condition.ne(0).any(0).nonzero().amax()) + 1 if condition.any() else 0
            condition = condition[:, :longest]
        n, length = condition.shape
        there = condition.ne(0)
        h = (self.bytes(condition) + self.places[:length]) * there[..., None]
        if length:
            h = h + F.silu(self.words(h.mT)).mT
        h = torch.cat([self.start.expand(n, 1, -1).to(h.dtype), h], 1)
        there = F.pad(there, (1, 0), value=True)
        h = h + self.attended(self._attention(self.norm1(h), there))
        h = h + self.think(self.norm2(h))
        h = self.norm3(h)
        scores = (h @ self.queries.mT).masked_fill(~there[..., None], -torch.inf)
        pooled = scores.softmax(1).mT.to(h.dtype) @ h
        return self.out(pooled.flatten(1))

    def _attention(self, h: Tensor, there: Tensor) -> Tensor:
        """Let each byte (N, L, width) read those that are there, (N, L)."""
        n, length, width = h.shape
        parts = self.attend(h).view(n, length, 3, HEADS, width // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None])
        return read.transpose(1, 2).reshape(n, length, width)
