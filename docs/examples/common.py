"""What the examples share: their arguments, the digits, and how features are scored."""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fluxloop import seed_everything, split
from fluxloop.metrics import knn_predict

Rows = tuple[Tensor, Tensor]


def parse(name: str, epochs: int, description: str) -> argparse.Namespace:
    """Read --epochs, --seed and --out, seed all generators, and make the folder for results."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    arguments = parser.parse_args()
    seed_everything(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def digits(fraction: float = 0.2) -> tuple[Rows, Rows]:
    """Load scikit-learn's 1,797 digits, images in [0, 1] of shape (N, 1, 8, 8) and classes; hold out a fraction."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return split((images, torch.tensor(data.target)), fraction)


def write_result(arguments: argparse.Namespace, **result: object) -> None:
    """Write DIR/result.json and print it."""
    whole = {"seed": arguments.seed, "epochs": arguments.epochs, **result}
    (arguments.out / "result.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole, indent=2))


def conv_encoder() -> nn.Sequential:
    """Make a small convnet that gives 256 features of an image of any size from 4 x 4."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


def features_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Give what an encoder makes of images, in eval mode."""
    encoder.eval()
    with torch.no_grad():
        return encoder(images)


def scores(train: Rows, test: Rows, encoder: nn.Module | None = None) -> dict[str, float]:
    """Score features by nearest neighbours and by a logistic regression; without an encoder, the pixels.

    With all training labels, and with ten of each class, where it matters more what the features are.
    """
    (bank, labels), (queries, answers) = train, test
    if encoder is not None:
        bank, queries = features_of(encoder, bank), features_of(encoder, queries)
    bank, queries = bank.flatten(1), queries.flatten(1)
    few = torch.cat([(labels == label).nonzero()[:10, 0] for label in labels.unique()])
    return {
        "knn": neighbors(bank, labels, queries, answers, k=20),
        "linear": linear(bank, labels, queries, answers),
        "knn_100_labels": neighbors(bank[few], labels[few], queries, answers, k=5),
        "linear_100_labels": linear(bank[few], labels[few], queries, answers),
    }


def neighbors(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, k: int) -> float:
    """Give the share of rows that their nearest neighbours classify rightly."""
    return (knn_predict(bank, labels, queries, k=k) == answers).float().mean().item()


def linear(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor) -> float:
    """Give the share of rows that a logistic regression on standardised features classifies rightly."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(bank.numpy(), labels.numpy()).score(queries.numpy(), answers.numpy()))
