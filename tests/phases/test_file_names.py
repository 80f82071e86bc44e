"""Rows with the names of files behind them, as lightly's data sets give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fluxloop import (
    Accelerator,
    BatchError,
    CustomCallback,
    GANPhase,
    KNNProbe,
    Learner,
    LeJEPAPhase,
    Metrics,
    Recorder,
    SimCLRPhase,
    StepEnd,
    SupConPhase,
    SwAVPhase,
    TrainingPhase,
    TripletPhase,
    TwoViews,
)
from fluxloop.phase import inputs_and_labels

WIDTH = 6


class WithNames(Dataset[Any]):
    """Gives rows as lightly's data sets do: views or an image, a target, and the name of a file."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        row = torch.rand(WIDTH, generator=torch.Generator().manual_seed(index))
        return [row + 0.1 * k for k in range(self.count)] if self.count else row, index % 3, f"{index}.png"


@pytest.mark.parametrize(
    ("phase", "count", "parts"),
    [
        (SimCLRPhase, 2, {"encoder": WIDTH, "projector": WIDTH}),
        (lambda: SimCLRPhase(TwoViews(lambda rows: rows + 0.1)), 0, {"encoder": WIDTH, "projector": WIDTH}),
        (LeJEPAPhase, 3, {"encoder": WIDTH, "projector": WIDTH}),
        (SwAVPhase, 3, {"encoder": WIDTH, "projector": WIDTH, "prototypes": 5}),
        (SupConPhase, 2, {"encoder": WIDTH, "projector": WIDTH}),
        (TripletPhase, 3, {"encoder": WIDTH}),
    ],
)
def test_file_names_behind_views_and_labels_are_passed_over(phase: Any, count: int, parts: dict[str, int]) -> None:
    seen: list[tuple[Tensor, bool]] = []
    note = CustomCallback(lambda learner: seen.append((learner.step.ys, "names" in learner.step)), StepEnd)
    models = {name: nn.Linear(WIDTH, size, bias=False) for name, size in parts.items()}
    loader = DataLoader(WithNames(count), batch_size=8)
    learner = Learner(models, data=(loader,), callbacks=[note], default_callbacks=False, accelerator=Accelerator("cpu"))
    learner.fit(1, phases=[phase()])
    assert [ys.tolist() for ys, _ in seen] == [[k % 3 for k in range(8)], [k % 3 for k in range(8, 16)]]


def test_file_names_are_passed_over_in_supervised_training_and_by_a_probe() -> None:
    loader = DataLoader(WithNames(0), batch_size=8)
    callbacks = [Recorder(), Metrics(), KNNProbe(bank=loader, queries=loader, k=1)]
    loss = nn.functional.cross_entropy
    cpu = Accelerator("cpu")
    model = nn.Linear(WIDTH, 3)
    learner = Learner(model, loss, data=(loader, loader), callbacks=callbacks, default_callbacks=False, accelerator=cpu)
    history = learner.fit(1)
    assert history["training/loss"][0] > 0
    assert history["validation/loss"][0] > 0
    assert history["validation/knn_model"] == [1.0]  # each row is its own nearest neighbour
    assert learner.predict(loader).shape == (16, 3)


def test_texts_that_are_no_file_names_are_not_passed_over() -> None:
    texts = ["What is it? (a cat)", "Who is there?"]
    with pytest.raises(BatchError, match="3 items"):
        inputs_and_labels((torch.zeros(2, 1), torch.zeros(2), texts))
    with pytest.raises(BatchError):
        TrainingPhase().entries((torch.zeros(2, 1), torch.zeros(2), texts))
    triplet = (["a.b", "c.d"], ["e.f", "g.h"], ["i.j", "k.l"])  # which are inputs here, whatever they look like
    assert TripletPhase().entries(triplet) == dict(zip(("anchor", "positive", "negative"), triplet, strict=True))


def test_a_conditional_gan_takes_labelled_images_with_names() -> None:
    entries = GANPhase(conditional=True).entries((torch.zeros(2, 3), torch.tensor([0, 1]), ("cats/1.png", "2.jpg")))
    assert entries["ys"].tolist() == [0, 1]
