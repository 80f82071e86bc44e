"""Train a small transformer to write like Shakespeare's sonnets, one character after the other.

    python docs/examples/char_lm.py --epochs 12 --seed 0 --out runs/char_lm

Writes DIR/result.json (bits per character of held-out text, and what the model wrote while it
learned) and DIR/char_lm_history.png.
"""

import math
from pathlib import Path

import torch
from attrs import define, field
from common import parse, write_result
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, scaled_dot_product_attention
from torch.utils.data import Dataset

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CustomCallback,
    History,
    Learner,
    Metric,
    Metrics,
    Recorder,
    StepEnd,
    UpdateBegin,
    UpdateEnd,
    as_dataloader,
    on,
)
from fluxloop.loop import watching

TEXT = Path(__file__).parent / "text" / "sonnets.txt"
CONTEXT = 64
"""How many characters the model sees at most."""


class Windows(Dataset):
    """Pieces of a text as ``(xs, ys)``, each `stride` characters after the last; ys is one character ahead of xs."""

    def __init__(self, text: Tensor, stride: int) -> None:
        self.text, self.stride = text, stride

    def __len__(self) -> int:
        return (len(self.text) - CONTEXT - 1) // self.stride + 1

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        piece = self.text[row * self.stride :][: CONTEXT + 1]
        return piece[:-1], piece[1:]


class Block(nn.Module):
    """Attention to what came before, then a small network for each place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, zs: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(zs)).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2).flatten(2)
        zs = zs + self.out(mixed)
        return zs + self.mlp(zs)


class CharTransformer(nn.Module):
    """Scores for each next character, (N, T, symbols), of whole numbers (N, T), T at most `CONTEXT`."""

    def __init__(self, symbols: int, width: int = 96, heads: int = 4, depth: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(CONTEXT, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, symbols))

    def forward(self, xs: Tensor) -> Tensor:
        return self.head(self.blocks(self.dropout(self.symbols(xs) + self.places.weight[: xs.shape[1]])))

    def write(self, xs: Tensor, length: int) -> Tensor:
        """Go on with whole numbers (N, T): draw `length` characters, one after the other."""
        for _ in range(length):
            odds = self(xs[:, -CONTEXT:])[:, -1].softmax(-1)
            xs = torch.cat([xs, torch.multinomial(odds, 1)], dim=1)
        return xs


def nats(preds: Tensor, ys: Tensor) -> Tensor:
    return cross_entropy(preds.flatten(0, 1), ys.flatten())


def bits(preds: Tensor, ys: Tensor) -> Tensor:
    return nats(preds, ys) / math.log(2)
