"""The training job that the overhead benchmark watches: a plain GPT with a module for each thing worth observing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

CAPTURED = ["blocks.?", "blocks.*.attention", "blocks.*.mlp.1", "blocks.*.mlp", "norm"]
"""Globs of the capture points: block, attention, MLP activation and MLP output of each layer, and the final norm."""

OnStep = Callable[[torch.Tensor], None]
"""Called with the loss of each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    layers: int = 6
    width: int = 256
    heads: int = 4
    context: int = 256
    batch: int = 8
    vocabulary: int = 8192


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv, self.projection = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = (batch, tokens, self.heads, width // self.heads)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.norm_attention, self.attention, self.norm_mlp = nn.LayerNorm(width), Attention(size), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Job:
    """A model in training: `step` is what any training script does."""

    def __init__(self, size: Size, device: str = "cpu", autocast: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        self.size, self.device, self.autocast = size, device, autocast
        self.model = GPT(size).to(device)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = self.model
        """The model, or what `torch.compile` has made of it."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=device == "cuda")
        self._batches = torch.randint(0, size.vocabulary, (16, size.batch, size.context + 1), device=device)
        self._step = 0
        self.in_backward = False

    def step(self, on_step: OnStep | None = None) -> None:
        batch = self._batches[self._step % len(self._batches)]
        self._step += 1
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            loss = F.cross_entropy(self.forward(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        self.in_backward = True
        loss.backward()
        self.in_backward = False
        self.optimizer.step()
        if on_step is not None:
            on_step(loss.detach())

    def captured(self) -> dict[str, nn.Module]:
        """The modules that `CAPTURED` names, for the peers."""
        found = {"norm": self.model.norm}
        for index, block in enumerate(self.model.blocks):
            found |= {
                f"blocks.{index}.attention": block.attention,
                f"blocks.{index}.mlp.1": block.mlp[1],
                f"blocks.{index}.mlp": block.mlp,
                f"blocks.{index}": block,
            }
        return found
