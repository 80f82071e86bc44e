"""What self-supervised methods put between an encoder and their loss: perceptrons, and DINO's head of prototypes."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fluxloop.guard.given import check_number


def mlp_head(*sizes: int, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Make a perceptron: linear layers, with batch norm and ReLU between them.

    - SimCLR, SupCon: projector ``mlp_head(F, F, 128)``.
    - BYOL: projector ``mlp_head(F, 4096, 256)``, predictor ``mlp_head(256, 4096, 256)``.
    - Barlow Twins, VICReg: projector ``mlp_head(F, 8192, 8192, 8192)``.
    - SimSiam: ``mlp_head(F, F, F, 2048, last_norm=True)`` and ``mlp_head(2048, 512, 2048)``.
    - MoCo v3: ``mlp_head(F, 4096, 4096, 256, last_norm=True)`` and ``mlp_head(256, 4096, 256, last_norm=True)``.
    - NNCLR: ``mlp_head(F, 2048, 2048, 256, last_norm=True)`` and ``mlp_head(256, 4096, 256)``.
    - SwAV: projector ``mlp_head(F, 2048, 128)``. LeJEPA: projector ``mlp_head(F, 2048, 2048, 128)``.

    Args:
        sizes: Of the input, of what is between, and of the output, two or more.
        norm: Whether there is batch norm between the layers; these then have no bias.
        last_norm: Whether the output is normalised too, without weights of its own (SimSiam, MoCo v3).

    Returns:
        A module from (N, first size) to (N, last size).

    Raises:
        ValueError: There are fewer than two sizes, or one is no whole number from 1.

    Example:
        >>> mlp_head(8, 16, 4)(torch.randn(5, 8)).shape
        torch.Size([5, 4])
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp_head{sizes} was given; expected the sizes of input and output: mlp_head(512, 2048, 128)")
    for size in sizes:
        check_number("mlp_head", "sizes", size, least=1, whole=True)
    layers: list[nn.Module] = []
    pairs = list(pairwise(sizes))
    for number, (before, after) in enumerate(pairs, start=1):
        is_last = number == len(pairs)
        is_normed = last_norm if is_last else norm
        layers.append(nn.Linear(before, after, bias=not is_normed))
        if is_normed:
            layers.append(nn.BatchNorm1d(after, affine=not is_last))
        if not is_last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """Score features by their cosines with prototypes: the head of DINO, iBOT and DINOv2 (Caron et al., 2021).

    A perceptron with GELU to a narrow layer, whose output is normalised, and a linear layer without bias, whose rows,
    the prototypes, are normalised where they are used. The papers keep this layer at its beginning at first:
    ``Unfreeze({"student.projector.last": 1})``.

    Args:
        features: F of the encoder.
        prototypes: K, how many scores there are; the papers have 65536, small data sets some hundreds.
        hidden: Width of the perceptron.
        bottleneck: Width of the narrow layer.
        layers: Of the perceptron, the narrow one among them.

    Input: shape (N, F), or (N, L, F) of patches. Output: (N, K) or (N, L, K), from -1 to 1.

    Raises:
        ValueError: A number is no whole one from 1.

    Example:
        >>> DINOHead(8, 32, hidden=16, bottleneck=4)(torch.randn(5, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self, features: int, prototypes: int, *, hidden: int = 2048, bottleneck: int = 256, layers: int = 3
    ) -> None:
        super().__init__()
        given = {"features": features, "prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck}
        for name, value in {**given, "layers": layers}.items():
            check_number("DINOHead", name, value, least=1, whole=True)
        sizes = [features, *[hidden] * (layers - 1), bottleneck]
        made: list[nn.Module] = []
        for before, after in pairwise(sizes):
            made += [nn.Linear(before, after), nn.GELU()]
        self.perceptron = nn.Sequential(*made[:-1])
        self.last = nn.Linear(bottleneck, prototypes, bias=False)
        for layer in made[::2]:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores."""
        narrow = normalize(self.perceptron(features), dim=-1)
        return linear(narrow, normalize(self.last.weight, dim=1))
