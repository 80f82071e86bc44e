"""Train on mixtures of images (mixup, Zhang et al., 2018) where there are few of them, and without, to compare.

    python docs/examples/mixup_digits.py --epochs 40 --seed 0 --out runs/mixup_digits

Twice: with 200 images, and with 200 of which three in ten have a wrong label; five seeds each. Writes
DIR/result.json, DIR/mixup_images.png (what the network is shown) and DIR/mixup_history.png.
"""

from functools import partial
from statistics import mean

import torch
from common import Rows, digits, parse, write_result
from matplotlib.figure import Figure
from torch import Tensor, nn

from fluxloop import (
    BackwardBegin,
    Callback,
    CustomCallback,
    Learner,
    Metrics,
    MixUp,
    Recorder,
    TrainingPhase,
    accuracy,
    seed_everything,
    split,
)

IMAGES, SEEDS = 200, 5


def few_digits(seed: int, wrong: float) -> tuple[Rows, Rows, Rows]:
    """Give a few images to train on, with a share of wrong labels, and others to validate and to test."""
    seed_everything(seed)
    (images, labels), others = digits(1 - IMAGES / 1797)
    lies = torch.rand(IMAGES) < wrong
    labels[lies] = (labels[lies] + torch.randint(1, 10, labels[lies].shape)) % 10
    test, valid = split(others, 0.2)
    return (images, labels), valid, test


def train(rows: Rows, valid: Rows, epochs: int, seed: int, callbacks: list[Callback]) -> Learner:
    seed_everything(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    learner = Learner(
        model,
        nn.CrossEntropyLoss(),
        data=(rows, valid),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[Recorder(), Metrics(accuracy), *callbacks],
        default_callbacks=False,
        seed=seed,
    )
    learner.fit(epochs)
    return learner


def average(runs: list[list[float]]) -> list[float]:
    """Give the mean over runs at each epoch."""
    return [mean(values) for values in zip(*runs, strict=True)]


def draw_batch(learner: Learner) -> Figure:
    """Draw what the last step of an epoch is trained on: afterwards ``ys`` are classes again."""
    shares: list[Tensor] = []
    learner.add_callback(
        CustomCallback(lambda learner: shares.append(learner.step.ys.cpu()), BackwardBegin, reads=("step.ys",))
    )
    learner.epoch(TrainingPhase())
    figure = Figure(figsize=(9, 1.6), layout="constrained")
    images, labels = learner.step.xs.cpu(), shares[-1]
    for axes, image, label in zip(figure.subplots(1, 8), images, labels, strict=False):
        share, classes = label.topk(2)
        parts = [f"{p:.2f} of a {c}" for p, c in zip(share.tolist(), classes.tolist(), strict=True) if p > 0]
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axes.set_title("\n".join(parts), fontsize=8)
        axes.set_axis_off()
    return figure


def draw_histories(curves: dict[str, dict[str, list[list[float]]]]) -> Figure:
    """Draw validation accuracy over epochs: a faint line for each seed, a strong one for their mean."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (title, variants) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for (name, runs), color in zip(variants.items(), ("tab:gray", "tab:orange"), strict=True):
            for run in runs:
                axes.plot(range(1, len(run) + 1), run, color=color, alpha=0.2)
            axes.plot(range(1, len(run) + 1), average(runs), color=color, label=name)
        axes.set(title=title, xlabel="epoch", ylabel="validation accuracy", ylim=(0.4, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main() -> None:
    arguments = parse("mixup_digits", 40, "Train with and without mixup on few of scikit-learn's digits.")
    results, curves = {}, {}
    for setting, wrong in (("right labels", 0.0), ("three in ten labels wrong", 0.3)):
        results[setting] = {"without mixup": [], "with mixup": []}
        curves[setting] = {"without mixup": [], "with mixup": []}
        for seed in range(arguments.seed, arguments.seed + SEEDS):
            rows, valid, test = few_digits(seed, wrong)
            for name, callbacks in (("without mixup", []), ("with mixup", [MixUp(1.0)])):
                learner = train(rows, valid, arguments.epochs, seed, callbacks)
                results[setting][name].append(learner.evaluate(test)["accuracy"])
                curves[setting][name].append(learner.history["validation/accuracy"])

    means = {setting: {name: mean(runs) for name, runs in found.items()} for setting, found in results.items()}
    best = {setting: {name: max(average(runs)) for name, runs in found.items()} for setting, found in curves.items()}
    write_result(arguments, accuracy=means, validation_accuracy_at_best_epoch=best, accuracy_by_seed=results)
    draw_histories(curves).savefig(arguments.out / "mixup_history.png", dpi=100)
    rows, valid, _ = few_digits(arguments.seed, wrong=0.0)
    draw_batch(train(rows, valid, 1, arguments.seed, [MixUp(1.0)])).savefig(arguments.out / "mixup_images.png", dpi=100)


if __name__ == "__main__":
    main()
