"""The training of digits.py in plain PyTorch, to compare.

    python docs/examples/plain_digits.py --epochs 15 --seed 0 --out runs/plain_digits

The same model, data, optimizer, metrics and plot; what fluxloop adds besides is a progress bar, the
stop at a loss that is not finite, and Ctrl+C that ends the training in good order.
"""

import argparse
import json
from pathlib import Path

import torch
from digits import load, make_model
from matplotlib.figure import Figure
from torch import Tensor, nn


def run_epoch(
    model: nn.Module, images: Tensor, classes: Tensor, size: int, optimizer: torch.optim.Optimizer | None
) -> tuple[float, float]:
    """Run one epoch, training where there is an optimizer; give the mean loss and the accuracy."""
    training = optimizer is not None
    model.train(training)
    order = torch.randperm(len(images)) if training else torch.arange(len(images))
    total, hits = 0.0, 0
    with torch.set_grad_enabled(training):
        for rows in order.split(size):
            xs, ys = images[rows], classes[rows]
            preds = model(xs)
            loss = nn.functional.cross_entropy(preds, ys)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item() * len(rows)
            hits += int((preds.argmax(1) == ys).sum())
    return total / len(images), hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description="The training of digits.py in plain PyTorch.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/plain_digits"))
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    images, classes = load()
    order = torch.randperm(len(images))
    valid, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    history: dict[str, list[tuple[float, float]]] = {"training": [], "validation": []}
    for epoch in range(1, arguments.epochs + 1):
        history["training"].append(run_epoch(model, images[train], classes[train], 64, optimizer))
        history["validation"].append(run_epoch(model, images[valid], classes[valid], 256, None))
        for name, values in history.items():
            print(f"{name:<11} epoch {epoch:<4} loss {values[-1][0]:.4g}   accuracy {values[-1][1]:.4g}")

    loss, accuracy = run_epoch(model, images[valid], classes[valid], 256, None)
    result = {"seed": arguments.seed, "epochs": arguments.epochs, "loss": loss, "accuracy": accuracy}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for index, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True)):
        for name, values in history.items():
            axes.plot(range(1, len(values) + 1), [value[index] for value in values], marker="o", label=name)
        axes.set(title=title, xlabel="epoch")
        axes.legend()
    figure.savefig(arguments.out / "history.png", dpi=120)


if __name__ == "__main__":
    main()
