"""What compiling is worth for networks of convolutions: the whole step, or the model alone, against the eager loop.

    python benchmarks/convolutions.py            # the table
    python benchmarks/convolutions.py --quick    # one network, fewer rounds

What `compile.py` measures, of the kinds of networks whose layout in memory decides: SGD, one thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # before torch is imported, which reads it

import torch
from timing import Table, arguments
from torch import Tensor, nn
from workloads import SGD, Workload

from compile import COLUMNS, measure


class Residual(nn.Module):
    """Adds two convolutions of an image to the image."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        wide = 2 * channels if groups > 1 else channels  # ResNeXt's block: narrow, wide in groups, narrow
        sizes = (1, 3, 1) if groups > 1 else (3, 3)
        widths = (channels, *[wide] * (len(sizes) - 1), channels)
        layers: list[nn.Module] = []
        for before, after, size in zip(widths, widths[1:], sizes, strict=False):
            of = groups if before == after == wide and groups > 1 else 1
            layers += [nn.Conv2d(before, after, size, padding=size // 2, groups=of, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, xs: Tensor) -> Tensor:
        return (xs + self.layers(xs)).relu()


def head(channels: int, classes: int = 10) -> list[nn.Module]:
    """Make what classifies images by their mean pixel."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def residual(groups: int = 1) -> nn.Module:
    """Make a stem, two blocks, a convolution with stride 2 and two blocks."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(Residual(32, groups), Residual(32, groups)),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(Residual(64, groups), Residual(64, groups)),
        *head(64),
    )


def cifar() -> nn.Module:
    """Make pairs of convolutions with pooling after each, and linear layers."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10))


def separable() -> nn.Module:
    """Make MobileNet's layers: a convolution of each channel alone, and one of all channels of a pixel."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    for before, after, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)):
        layers += [
            nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU6(),
        ]
        layers += [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU6()]
    return nn.Sequential(*layers, *head(256))


class Patches(nn.Module):
    """A vision transformer: patches by one convolution, two layers, their mean classified."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.position = nn.Parameter(torch.randn(64, 64) / 8)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, xs: Tensor) -> Tensor:
        tokens = self.patches(xs).flatten(2).transpose(1, 2)
        return self.head(self.layers(tokens + self.position).mean(1))


def double(before: int, after: int) -> nn.Sequential:
    """Make a U-Net's pair of convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
        *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
    )


class UNet(nn.Module):
    """Two levels down and up; a class for each pixel.

    Args:
        transposed: Go up by transposed convolutions, not by bilinear interpolation.
    """

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(3, 16), double(16, 32), double(32, 64)])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList([self.larger(64, 32, transposed), self.larger(32, 16, transposed)])
        self.join = nn.ModuleList([double(64, 32), double(32, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def larger(self, before: int, after: int, transposed: bool) -> nn.Module:
        if transposed:
            return nn.ConvTranspose2d(before, after, 2, stride=2)
        bilinear = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return nn.Sequential(bilinear, nn.Conv2d(before, after, 1))

    def forward(self, xs: Tensor) -> Tensor:
        first = self.down[0](xs)
        second = self.down[1](self.pool(first))
        deep = self.down[2](self.pool(second))
        second = self.join[0](torch.cat([second, self.up[0](deep)], 1))
        return self.head(self.join[1](torch.cat([first, self.up[1](second)], 1)))


def signal() -> nn.Module:
    """Make convolutions of a signal of several channels."""
    layers: list[nn.Module] = []
    for before, after in ((8, 32), (32, 64), (64, 64)):
        layers += [nn.Conv1d(before, after, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))


def volume() -> nn.Module:
    """Make convolutions of a volume."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv3d(before, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU()]
        layers.append(nn.MaxPool3d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 10))


IMAGES = (32, 3, 32, 32)
CONVOLUTIONS = (
    Workload("residual 32-64, batch 32", residual, IMAGES, 10, 4),
    Workload("cifar-like 32-64, batch 32", cifar, IMAGES, 10, 4),
    Workload("grouped (ResNeXt, 8 groups), batch 32", partial(residual, 8), IMAGES, 10, 4),
    Workload("depthwise (MobileNet), batch 32", separable, IMAGES, 10, 10),
    Workload("patches and transformer, batch 32", Patches, IMAGES, 10, 8),
    Workload("U-Net, transposed, batch 8", partial(UNet, True), (8, 3, 48, 48), 4, 4, pixels=True),
    Workload("U-Net, bilinear, batch 8", partial(UNet, False), (8, 3, 48, 48), 4, 4, pixels=True),
    Workload("1-D, batch 32", signal, (32, 8, 256), 10, 10),
    Workload("3-D, batch 8", volume, (8, 1, 16, 16, 16), 10, 6),
)


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    table = Table(COLUMNS)
    for work in CONVOLUTIONS[:1] if quick else CONVOLUTIONS:
        measure(table, work, "SGD", SGD, quick)


if __name__ == "__main__":
    main()
