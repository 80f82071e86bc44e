"""Train with batches of 16 images and update once in four of them: as if batches had 64.

    python docs/examples/virtual_batch_digits.py --epochs 10 --seed 0 --out runs/virtual_batch_digits

Writes DIR/result.json (how far the weights are from those of a training with batches of 64, in
32 and in 64 bits) and DIR/virtual_batch_difference.png.
"""

from collections.abc import Callable
from functools import partial

import torch
from common import digits, parse, write_result
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    BackwardEnd,
    CustomCallback,
    Learner,
    LossBegin,
    Metrics,
    Phase,
    TensorBatches,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    accuracy,
    seed_everything,
)
from fluxloop.loop import Handle
from fluxloop.state import StepState

BATCH, COUNT = 16, 4


class VirtualBatchPhase(AbstractTrainingPhase):
    """Supervised training that updates with the mean gradient of every `count` batches."""

    def __init__(self, count: int) -> None:
        self.count, self.batches, self.updates = count, 0, count == 1

    def body(self, learner: Learner, handle: Handle, state: StepState) -> None:
        """Add the gradient of one batch; update where it completes a virtual one."""
        state.preds = learner.model(state.xs)
        handle(LossBegin())
        state.loss = learner.loss_fn(state.preds, state.ys)
        handle(BackwardBegin())
        learner.backward(state.loss / self.count)
        handle(BackwardEnd())
        if self.updates:
            learner.update()

    def finish(self, learner: Learner, state: StepState) -> None:
        """Count the batch, and note whether the next one completes a virtual batch."""
        self.batches += 1
        self.updates = (self.batches + 1) % self.count == 0


def network(activation: type[nn.Module], pool: type[nn.Module]) -> nn.Module:
    """Make a network without batch normalisation, which would see the small batches."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        activation(),
        nn.Conv2d(16, 32, 3, padding=1),
        activation(),
        pool(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(
    phase: Phase, batch_size: int, make_model: Callable[[], nn.Module], dtype: torch.dtype, epochs: int, seed: int
) -> tuple[Learner, list[Tensor]]:
    """Give the trained learner, and its weights after each update."""
    seed_everything(seed)
    (images, labels), (test_images, test_labels) = digits()
    whole = len(images) // (COUNT * BATCH) * COUNT * BATCH
    weights: list[Tensor] = []
    learner = Learner(
        make_model().to(dtype),
        nn.CrossEntropyLoss(),
        data=(
            TensorBatches(images[:whole].to(dtype), labels[:whole], batch_size=batch_size, shuffle=True),
            (test_images.to(dtype), test_labels),
        ),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[
            Metrics(accuracy),
            CustomCallback(
                lambda learner: weights.append(parameters_to_vector(learner.params).detach().cpu()),
                UpdateEnd,
                reads=("params",),
            ),
        ],
        seed=seed,
    )
    learner.fit(epochs, phases=[phase, ValidationPhase()])
    return learner, weights


def main() -> None:
    arguments = parse("virtual_batch_digits", 10, "Train on virtual batches of scikit-learn's digits.")
    smooth, kinked = partial(network, nn.GELU, nn.AvgPool2d), partial(network, nn.ReLU, nn.MaxPool2d)
    variants = {
        "32 bits": (smooth, torch.float32),
        "64 bits": (smooth, torch.float64),
        "32 bits, ReLU and max pooling": (kinked, torch.float32),
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, result = figure.subplots(), {}
    for name, (make_model, dtype) in variants.items():
        options = make_model, dtype, arguments.epochs, arguments.seed
        whole, expected = train(TrainingPhase(), COUNT * BATCH, *options)
        virtual, weights = train(VirtualBatchPhase(COUNT), BATCH, *options)
        apart = [(a - b).abs().max().item() for a, b in zip(expected, weights, strict=True)]
        axes.semilogy(range(1, len(apart) + 1), apart, label=name)
        result[name] = {
            "largest_weight": expected[-1].abs().max().item(),
            "largest_difference": max(apart),
            "updates": [whole.history[TrainingPhase].updates[None], virtual.history[VirtualBatchPhase].updates[None]],
            "steps": [whole.history[TrainingPhase].steps, virtual.history[VirtualBatchPhase].steps],
            "training_loss": [learner.history["training/loss"][-1] for learner in (whole, virtual)],
            "accuracy": [learner.evaluate()["accuracy"] for learner in (whole, virtual)],
        }
    write_result(arguments, **result)
    axes.set(xlabel="update", ylabel="largest difference of any weight")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out / "virtual_batch_difference.png", dpi=100)


if __name__ == "__main__":
    main()
