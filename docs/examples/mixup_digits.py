"""Train on mixtures of images (mixup, Zhang et al., 2018), with few of them, against training without.

    python docs/examples/mixup_digits.py --epochs 60 --seed 0 --out runs/mixup_digits

Writes DIR/result.json (validation accuracy with and without, for several seeds), DIR/mixup_images.png
(what the network is shown) and DIR/mixup_history.png.
"""

from functools import partial

import torch
from attrs import define
from common import Rows, conv_encoder, digits, parse, write_result
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.functional import one_hot

from fluxloop import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Callback,
    History,
    Learner,
    Metric,
    Metrics,
    Recorder,
    StepBegin,
    TensorBatches,
    accuracy,
    on,
    seed_everything,
)

IMAGES, SEEDS = 200, 5


@define
class MixUp(Callback):
    """Mix each training row with another one of its batch: the images, and the classes' probabilities alike."""

    alpha: float = 0.4
    num_classes: int = 10
    writes = ("step.xs", "step.ys")
    draws = True

    @on(StepBegin, AbstractTrainingPhase)
    def mix(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Learner) -> None:
        """Replace the batch."""
        step = learner.step
        share = Beta(self.alpha, self.alpha).sample((len(step.xs),)).to(step.xs.device)
        other = torch.randperm(len(step.xs), device=step.xs.device)
        step.xs = mixed(step.xs, other, share)
        step.ys = mixed(one_hot(step.ys, self.num_classes).float(), other, share)


def mixed(rows: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Give `share` of each row and the rest of another, in any shape (N, …)."""
    share = share.view(-1, *[1] * (rows.ndim - 1))
    return share * rows + (1 - share) * rows[other]


def train(rows: Rows, held_out: Rows, epochs: int, seed: int, callbacks: list[Callback]) -> Learner:
    seed_everything(seed)
    learner = Learner(
        nn.Sequential(conv_encoder(), nn.Linear(256, 10)),
        nn.CrossEntropyLoss(),
        data=(rows, TensorBatches(*held_out, batch_size=512)),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[Recorder(), Metrics(Metric(accuracy, phase=AbstractValidationPhase)), *callbacks],
        default_callbacks=False,
        seed=seed,
    )
    learner.fit(epochs)
    return learner
