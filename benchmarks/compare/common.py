"""What every version of the comparison starts from and nobody's lines count: networks, data, numbers.

The functions that are neither torch's nor a framework's are the same for everybody too: a grid of
images, the vote of the nearest neighbours, NT-Xent, and schedules as functions of the step. They
are fluxloop's, and plain functions; torchvision, lightly and others have their like.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from fluxloop.callbacks.sample_images import image_grid, save_image
from fluxloop.losses import nt_xent
from fluxloop.metrics import knn_predict
from fluxloop.schedules import cosine

__all__ = ["cosine", "knn_predict", "nt_xent"]

SEED = 0
EPOCHS = 3
FOLDER = Path("runs/compare")
BATCH = 128

# GAN
NOISE = 64
GAN_LR, BETAS = 2e-4, (0.5, 0.999)
CLIP = 1.0
DECAY = 0.9
"""Of the averaged generator; low, because the runs are short."""

# BYOL, SimCLR
FEATURES, CLASSES = 64, 10
SSL_LR, PROBE_LR = 1e-3, 1e-2
TAU = 0.9
TEMPERATURE = 0.5
WARMUP = 5
STEPS_PER_EPOCH = 1437 // BATCH


class Generator(nn.Sequential):
    """A small DCGAN generator: noise (N, 64) to images (N, 1, 8, 8) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (NOISE, 1, 1)),
            nn.ConvTranspose2d(NOISE, 64, 2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )


class Discriminator(nn.Sequential):
    """A small DCGAN discriminator: images (N, 1, 8, 8) to logits (N, 1)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 1),
        )


class Network(nn.Module):
    """An encoder and a projector, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.projector = head(FEATURES, 32)

    def forward(self, xs: Tensor) -> Tensor:
        return self.projector(self.encoder(xs))


def head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, outputs))


class TwoViews(Dataset):
    """Rows ``((view1, view2), label)``: each view shifted by up to a pixel and noisy, by numbers of its own."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.generator = torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.view(self.images[index]), self.view(self.images[index])), self.labels[index]

    def view(self, image: Tensor) -> Tensor:
        dy, dx = (torch.randint(3, (2,), generator=self.generator) - 1).tolist()
        noise = torch.empty_like(image).normal_(0, 0.1, generator=self.generator)
        return image.roll((dy, dx), (1, 2)) + noise


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Give scikit-learn's digits in [0, 1], shape (1, 8, 8), and their classes: 1,437 to train on, 360 held out."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    valid, train = order[:360], order[360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[valid], labels[valid])


class Shuffled(Sampler):
    """A new order in every epoch, by numbers of its own.

    Torch's ``RandomSampler`` draws once more where a loop goes on to the end of it, which not every framework does.
    """

    def __init__(self, dataset: Dataset | Tensor) -> None:
        self.size = len(dataset)
        self.generator = torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size, generator=self.generator).tolist()


def shuffled(dataset: Dataset | Tensor) -> DataLoader:
    return DataLoader(dataset, batch_size=BATCH, sampler=Shuffled(dataset), drop_last=True)


def start() -> None:
    """Begin a version's file: equal initial weights, and a folder for what it writes."""
    torch.manual_seed(SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)


def gan_setup() -> tuple[Generator, Discriminator, DataLoader]:
    """Give both networks, and a loader of images in [-1, 1]."""
    start()
    return Generator(), Discriminator(), shuffled(2 * digits()[0].tensors[0] - 1)


def ssl_setup() -> tuple[Network, nn.Module, DataLoader, DataLoader, DataLoader]:
    """Give the network and a predictor for it, and loaders: two views to train on, plain rows, held-out rows."""
    start()
    train, valid = digits()
    network, predictor = Network(), head(32, 32)
    return (
        network,
        predictor,
        shuffled(TwoViews(*train.tensors)),
        DataLoader(train, batch_size=512),
        DataLoader(valid, batch_size=512),
    )


def lr_factor(step: int) -> float:
    """Give the factor of the learning rate: a linear warm-up, then half a cosine down to 0."""
    total = EPOCHS * STEPS_PER_EPOCH
    return (step + 1) / WARMUP if step < WARMUP else cosine(total - WARMUP, 1.0, 0.0)(step - WARMUP)


def save_grid(images: Tensor, path: Path) -> None:
    """Write images in [-1, 1] as one PNG file, as torchvision's ``save_image`` does."""
    save_image(image_grid(images, value_range=(-1, 1)), path)
