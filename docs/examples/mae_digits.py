"""Train a masked autoencoder on the digits: draw the three quarters of an image that were hidden.

    python docs/examples/mae_digits.py --epochs 200 --seed 0 --out runs/mae_digits

Writes DIR/result.json (the error where patches were hidden, and what the encoder's features are worth) and
DIR/reconstructions.png.
"""

import copy
from functools import partial

import torch
from common import digits, parse, scores, write_result
from torch import Tensor, nn

from fluxloop import KNNProbe, Learner, MAEPhase, ObjectiveValidationPhase, TensorBatches
from fluxloop.callbacks.sample_images import image_grid, save_image
from fluxloop.losses import masked_mse
from fluxloop.phases.mae import patchify, unpatchify

PATCH = 2
COUNT = (8 // PATCH) ** 2


def transformer(size: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(size), enable_nested_tensor=False)


class Encoder(nn.Module):
    """A transformer over the patches that are there, each with its place."""

    def __init__(self, size: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, size)
        self.position = nn.Parameter(0.1 * torch.randn(COUNT, size))
        self.blocks = transformer(size, depth)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        return self.blocks(self.embed(patches) + self.position[places])


class Decoder(nn.Module):
    """A smaller one over all places, with the same learned token at each that was hidden."""

    def __init__(self, size: int = 64, depth: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Parameter(0.1 * torch.randn(size))
        self.position = nn.Parameter(0.1 * torch.randn(COUNT, size))
        self.blocks = transformer(size, depth)
        self.head = nn.Linear(size, PATCH * PATCH)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        everywhere = self.hidden.expand(len(tokens), COUNT, -1)
        everywhere = everywhere.scatter(1, places.unsqueeze(2).expand_as(tokens), tokens)
        return self.head(self.blocks(everywhere + self.position))


def whole_image(encoder: nn.Module, images: Tensor) -> Tensor:
    """Give the mean token of images of which nothing is hidden."""
    return encoder(patchify(images, PATCH), torch.arange(COUNT).expand(len(images), -1)).mean(1)


class Features(nn.Module):
    """The mean token of an image of which nothing is hidden."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return whole_image(self.encoder, images)
