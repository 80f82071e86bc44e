"""What the examples share: their arguments, the digits, how features are scored and drawn."""

import argparse
import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from fluxloop import History, ProbePhase, seed_everything, split
from fluxloop.images import image_grid, save_image
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


def mlp(*sizes: int) -> nn.Sequential:
    """Make a perceptron with batch norm and ReLU between its linear layers, such as a projector."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def features_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Give what an encoder makes of images, in eval mode, on the CPU."""
    encoder.eval()
    device = next((parameter.device for parameter in encoder.parameters()), images.device)
    with torch.no_grad():
        return encoder(images.to(device)).cpu()


def measured(encoder: nn.Module, images: Tensor) -> nn.Module:
    """Give a copy of an encoder whose batch norms have measured their statistics on images."""
    encoder = copy.deepcopy(encoder).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the average of all batches: here of one
    with torch.no_grad():
        encoder(images)
    return encoder


def few(rows: Rows, per_class: int = 10) -> Rows:
    """Give the first rows of each class."""
    chosen = first_of_each(rows[1], per_class)
    return rows[0][chosen], rows[1][chosen]


def first_of_each(labels: Tensor, per_class: int) -> Tensor:
    """Give the places of the first rows of each class, class by class."""
    return torch.cat([(labels == label).nonzero()[:per_class, 0] for label in labels.unique()])


def scores(train: Rows, test: Rows, encoder: nn.Module | None = None) -> dict[str, float]:
    """Score features by nearest neighbours and by a logistic regression; without an encoder, the pixels.

    With all training labels, and with ten of each class, where it matters more what the features are.
    """
    (bank, labels), (queries, answers) = train, test
    if encoder is not None:
        bank, queries = features_of(encoder, bank), features_of(encoder, queries)
    bank, queries = bank.flatten(1), queries.flatten(1)
    chosen = first_of_each(labels, 10)
    return {
        "knn": neighbors(bank, labels, queries, answers, k=20),
        "linear": linear(bank, labels, queries, answers),
        "knn_100_labels": neighbors(bank[chosen], labels[chosen], queries, answers, k=5),
        "linear_100_labels": linear(bank[chosen], labels[chosen], queries, answers),
    }


def neighbors(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, k: int) -> float:
    """Give the share of rows that their nearest neighbours classify rightly."""
    return (knn_predict(bank, labels, queries, k=k) == answers).float().mean().item()


def linear(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor) -> float:
    """Give the share of rows that a logistic regression on standardised features classifies rightly."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(bank.numpy(), labels.numpy()).score(queries.numpy(), answers.numpy()))


def report(
    arguments: argparse.Namespace,
    history: History,
    train: Rows,
    test: Rows,
    views: Callable[[Tensor], tuple[Tensor, ...]],
    encoders: dict[str, nn.Module],
) -> None:
    """Score what a method without labels has learned, and draw it.

    Writes result.json (the scores of each encoder and of the pixels, and what was measured while training),
    probes.png, features.png and views.png. Among the scores are those of a stronger untrained encoder,
    ``"random_measured"``, whose batch norms have seen the training images as the learned one's have.

    Args:
        arguments: From `parse`.
        history: Of the training.
        train: Training images and classes.
        test: Those held out.
        views: What made the views of a batch.
        encoders: ``"random"``, as it began, ``"learned"``, and others.
    """
    results = {"pixels": scores(train, test), **{name: scores(train, test, e) for name, e in encoders.items()}}
    results["random_measured"] = scores(train, test, measured(encoders["random"], train[0]))
    last = {name: values[-1] for series in history.metrics.values() for name, values in series.items()}
    write_result(arguments, **results, last_epoch=last)
    save_probes(arguments.out / "probes.png", history, results)
    rows = {"raw pixels": test[0].flatten(1)}
    rows |= {f"{name} features": features_of(encoders[name], test[0]) for name in ("random", "learned")}
    save_maps(arguments.out / "features.png", rows, test[1], arguments.seed)
    save_views(arguments.out / "views.png", few(test, 1)[0], views)


def save_probes(path: Path, history: History, results: dict[str, dict[str, float]]) -> None:
    """Draw the probes' curves beside what random features and pixels give, and the effective ranks.

    Probes whose name ends in ``_100_labels`` have a panel of their own.
    """
    probes = history.metrics[ProbePhase]
    ranks = {n: v for series in history.metrics.values() for n, v in series.items() if n.endswith("_rank")}
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, suffix, title, lowest in (
        (panels[0], "", "all labels", 0.9),
        (panels[1], "_100_labels", "ten labels per class", 0.7),
    ):
        for name, values in probes.items():
            if name.endswith("_100_labels") == bool(suffix):
                axes.plot(range(1, len(values) + 1), values, label=name.removesuffix(suffix))
        for name, style in {"pixels": ":", "random": "--"}.items():
            axes.axhline(results[name]["knn" + suffix], color="gray", linestyle=style, label=f"knn of {name}")
        axes.set(title=f"held-out accuracy, {title}", xlabel="epoch", ylim=(lowest, 1.0))
    for name, values in ranks.items():
        panels[2].plot(range(1, len(values) + 1), values, label=name.removesuffix("_rank"))
    panels[2].set(title="effective rank of", xlabel="epoch", ylim=(0, None))
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is not panels[2] else "best")
    figure.savefig(path, dpi=90)


def save_maps(path: Path, rows: dict[str, Tensor], labels: Tensor, seed: int) -> None:
    """Draw a map of each kind of features (t-SNE of their directions), coloured by classes it has not seen."""
    figure = Figure(figsize=(4 * len(rows) + 0.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (title, features) in zip(panels, rows.items(), strict=True):
        places = TSNE(init="pca", random_state=seed).fit_transform(normalize(features, dim=1).numpy())
        points = axes.scatter(*places.T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=14)
        axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(points, ticks=range(10), label="class")
    figure.savefig(path, dpi=90)


def save_views(path: Path, images: Tensor, views: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """Draw images, one per column, and under each the views that it becomes, enlarged to one size."""
    rows = [interpolate(view, size=24, mode="nearest") for view in (images, *views(images))]
    save_image(image_grid(torch.cat(rows), len(images), (0, 1)), path, zoom=3)
