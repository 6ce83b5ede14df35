"""A small GPT over bytes, written plainly so that the demo shows what any user's model looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

NUM_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTOptions:
    """Size of the model."""

    vocabulary: int = NUM_BYTES
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    context: int = 256
    """Tokens the model can look back on."""
    dropout: float = 0.0


class Block(nn.Module):
    """Pre-norm attention and MLP; both write into the residual stream."""

    def __init__(self, options: GPTOptions) -> None:
        super().__init__()
        width = options.width
        self.num_heads, self.dropout = options.num_heads, options.dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(options.dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block.

        Args:
            x: residual stream, ``[B, T, d]``.

        Returns:
            The residual stream after the block, ``[B, T, d]``.
        """
        x = x + self._attend(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = (batch, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))


class ByteGPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, options: GPTOptions) -> None:
        super().__init__()
        self.bytes = nn.Embedding(options.vocabulary, options.width)
        self.positions = nn.Embedding(options.context, options.width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, options.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Score every next token.

        Args:
            tokens: ids, ``[B, T]``; bytes unless the vocabulary says otherwise.

        Returns:
            Logits, ``[B, T, vocabulary]``.
        """
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and "bias" in dict(module.named_parameters()):
        nn.init.zeros_(module.bias)
