"""Phases that compare rows with each other train in several processes what one trains on the joined batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from processes.launching import SIZES, run

SCRIPT = """
import copy
import os

import torch
from torch import nn

from fluxloop import (
    Accelerator, BarlowTwinsPhase, DINOPhase, DINOv2Phase, EMA, IBOTPhase, LeJEPAPhase, Learner, MSNPhase,
    MoCoPhase, MoCoV3Phase, NNCLRPhase, ObjectiveValidationPhase, SimCLRPhase, SupConPhase, SwAVPhase,
    TensorBatches, TripletPhase, VICRegPhase,
)
from processes.launching import report

world = int(os.environ["WORLD_SIZE"])
torch.manual_seed(0)
rows, labels = torch.randn(42, 6, dtype=torch.float64), torch.arange(42) % 5


def views(xs):
    return xs * 1.1 + 0.3, xs * 0.9 - 0.1 * xs.roll(1, dims=1)


def crops(xs):
    return *views(xs), xs * 0.5


def models():
    return {"encoder": nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double(), "projector": nn.Linear(8, 4).double()}


def networks():
    student = nn.ModuleDict(models())
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def with_part(make, name):
    return lambda: {**make(), name: nn.Linear(4, 4, bias=False).double()}


class Along(LeJEPAPhase):  # looks along the axes, as what processes draw differs from what one does
    def draw_directions(self, learner, embeddings):
        drawn = super().draw_directions(learner, embeddings)
        torch.testing.assert_close(drawn.norm(dim=0), torch.ones(5).double())
        if learner.accelerator.group is not None:
            assert all(torch.equal(drawn, other) for other in learner.accelerator.group.gather_objects(drawn))
        return torch.eye(4, dtype=torch.float64)


def images(xs):
    return tuple(view.reshape(-1, 1, 2, 3) for view in views(xs))


def first(n, grid, device):  # hides two patches of six
    return torch.arange(6).expand(n, -1) < 2


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Conv2d(1, 4, 1).double(), nn.Linear(4, 4).double()

    def forward(self, images, mask):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = tokens.masked_fill(mask[:, :, None], 0.0)
        token = self.mix(tokens.mean(1)).tanh()
        return token, tokens + token[:, None]


def patched():
    student = nn.ModuleDict({"encoder": Patches(), "projector": nn.Linear(4, 5).double()})
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


cases = {
    "LeJEPA": (Along(crops, num_directions=5), models, 41),
    "MoCo v3": (MoCoV3Phase(views), with_part(networks, "predictor"), 41),
    "MSN": (MSNPhase(crops), with_part(networks, "prototypes"), 41),
    "iBOT": (IBOTPhase(images, patch_size=1, masks=first), patched, 41),
    "DINOv2": (DINOv2Phase(images, patch_size=1, masks=first, koleo=0.2), patched, 42),
    "NNCLR": (NNCLRPhase(views, queue_size=20), with_part(models, "predictor"), 41),
    "SwAV": (SwAVPhase(crops, queue_size=20, queue_from=2), with_part(models, "prototypes"), 41),
    "SimCLR": (SimCLRPhase(views), models, 41),
    "SupCon": (SupConPhase(views), models, 41),
    "VICReg": (VICRegPhase(views), models, 42),
    "Barlow Twins": (BarlowTwinsPhase(views), models, 42),
    "MoCo": (MoCoPhase(views, queue_size=20), networks, 41),
    "DINO": (DINOPhase(crops), networks, 41),
    "triplets": (TripletPhase(), models, 41),
    "own rows": (SimCLRPhase(views, gather=False), models, 41),
}
for name, (phase, make, count) in cases.items():
    for batches in (1, 2):
        torch.manual_seed(1)
        phase, xs = copy.deepcopy(cases[name][0]), rows[:count]
        data = (xs, xs + 0.1, xs.flip(0)) if name == "triplets" else (xs, labels[:count])
        made = make()
        if name == "triplets":
            del made["projector"]
        learner = Learner(
            made, data=tuple(TensorBatches(*data, batch_size=8 // world, shuffle=train) for train in (True, False)),
            optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05),
            callbacks=[EMA("student", 0.9, into="teacher")] if "student" in made else [],
            seed=3, accelerator=Accelerator("cpu", accumulate=batches),
        )
        learner.fit(2, phases=[phase, ObjectiveValidationPhase(phase)])
        weights = [tensor.clone() for module in learner.models.values() for tensor in module.state_dict().values()]
        kept = getattr(phase, "queue", getattr(phase, "center", None))
        report(**{f"{name}, {batches}": (weights, [row["value"] for row in learner.history.rows()], kept)})
"""


@pytest.mark.slow
def test_weights_losses_queues_and_centres_are_those_of_one_process_also_with_ragged_rows_and_windows() -> None:
    (alone,) = run(SCRIPT, 1, timeout=120).reports
    first, *others = run(SCRIPT, SIZES[-1], timeout=240).reports
    assert len(alone) == 30
    for name, (weights, values, kept) in first.items():
        found: Any
        for other in others:
            assert all(map(torch.equal, weights, other[name][0])), name
            assert values == other[name][1], name
            assert kept is None or torch.equal(kept, other[name][2]), name
        if name.startswith("own rows"):  # each process has other negatives than one would have
            assert abs(values[0] - alone[name][1][0]) > 0.1
            continue
        for found, expected in zip(weights, alone[name][0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert values == pytest.approx(alone[name][1], abs=1e-12), name
        if kept is not None:
            torch.testing.assert_close(kept.sort(0).values, alone[name][2].sort(0).values, rtol=0, atol=1e-12)
