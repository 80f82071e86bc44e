from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fluxloop import (
    Accelerator,
    Learner,
    LossError,
    Metrics,
    ModelLossPhase,
    ObjectiveValidationPhase,
    Recorder,
    accuracy,
)
from fluxloop.testing import assert_resumes_exactly

ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)


class Output(OrderedDict[str, Any]):
    """A dict with attributes that refuses `update`, as the outputs of transformers do."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no update")


@dataclass
class Record:
    loss: Tensor | None
    logits: Tensor


class Tagger(nn.Module):
    """Computes its own loss where it is given labels."""

    def __init__(self, kind: str = "output") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3)), kind

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(inputs)
        loss = None if labels is None else cross_entropy(logits, labels)
        if self.kind == "scalar":
            return loss
        if self.kind == "record":
            return Record(loss, logits)
        return Output(loss=loss, logits=logits) if self.kind == "output" else {"loss": loss, "logits": logits}


def rows(count: int = 24) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(count, 4, generator=draws), "labels": torch.arange(count) % 3}


def learner_of(*callbacks: Any, kind: str = "output", data: Any = None, **options: Any) -> Learner:
    return Learner(
        Tagger(kind),
        data=(rows(64),) if data is None else data,
        optimizer=ADAM,
        callbacks=[Recorder(), Metrics(*options.pop("metrics", ())), *callbacks],
        default_callbacks=False,
        accelerator=Accelerator("cpu", **options),
        seed=0,
    )


@pytest.mark.parametrize("kind", ["output", "dict", "record", "scalar"])
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_it_trains_as_a_loop_by_hand(kind: str, form: str) -> None:
    batches = [{name: value[part : part + 8] for name, value in rows().items()} for part in (0, 8, 16)]
    given = batches if form == "dict" else [tuple(batch.values()) for batch in batches]
    learner = learner_of(kind=kind, data=(given,))
    learner.model.eval()
    learner.model.net[1] = nn.Identity()  # nothing is drawn
    learner.fit(2, phases=[ModelLossPhase()])
    by_hand = Tagger()
    by_hand.net[1] = nn.Identity()
    adam = ADAM(by_hand.parameters())
    for batch in 2 * batches:
        adam.zero_grad()
        by_hand(**batch)["loss"].backward()
        adam.step()
    assert all(torch.equal(a, b) for a, b in zip(learner.model.parameters(), by_hand.parameters(), strict=True))


def test_predictions_and_labels_are_entries_so_that_metrics_and_validation_work() -> None:
    phase = ModelLossPhase()
    learner = learner_of(data=(rows(64), rows(24)), metrics=[accuracy])
    history = learner.fit(2, phases=[phase, ObjectiveValidationPhase(phase)])
    with torch.no_grad():
        output = learner.model.eval()(**rows())
    assert history["validation/accuracy"][-1] == pytest.approx(accuracy(output["logits"], rows()["labels"]).item())
    assert history["validation/loss"][-1] == pytest.approx(output["loss"].item())
    assert type(learner.step.output) is Output


def test_a_weight_by_tokens_makes_the_mean_of_an_epoch_that_of_tokens() -> None:
    class ByTokens(ModelLossPhase):
        def weight(self, state: Any) -> Tensor:
            return (state.ys != -100).sum()

    first, second = rows(8), rows(8)
    second["labels"] = torch.tensor([0, 1, *[-100] * 6])
    learner = learner_of(data=([first, second],))
    learner.optimizer.param_groups[0]["lr"] = 0.0
    learner.model.net[1] = nn.Identity()
    history = learner.fit(1, phases=[ByTokens()])
    losses = [learner.model(**batch)["loss"].item() for batch in (first, second)]
    assert history["training/loss"] == [pytest.approx((8 * losses[0] + 2 * losses[1]) / 10)]


def test_it_resumes_to_the_bit() -> None:
    assert_resumes_exactly(lambda: learner_of(), phases=lambda: [ModelLossPhase()], at=[1, 3])


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"precision": "bf16"}])
def test_it_trains_with_other_ways_of_computing(options: dict[str, Any]) -> None:
    history = learner_of(**options).fit(3, phases=[ModelLossPhase()])
    assert history["training/loss"][-1] < history["training/loss"][0]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"inputs": torch.zeros(4, 4)}, r"gave .*without a loss for a batch with \['inputs'\].* 'labels'"),
        (torch.zeros(4, 4), "gave .*without a loss for a batch with a Tensor"),
    ],
    ids=["dict", "tensor"],
)
def test_an_output_without_a_loss_is_told(batch: Any, words: str) -> None:
    with pytest.raises(LossError, match=words):
        learner_of(data=([batch],)).fit(1, phases=[ModelLossPhase()])


def test_several_models_are_told() -> None:
    learner = Learner({"a": Tagger(), "b": Tagger()}, data=(rows(),), default_callbacks=False)
    with pytest.raises(LossError, match=r"runs one model that says its loss, and the learner has \['a', 'b'\]"):
        learner.fit(1, phases=[ModelLossPhase()])
