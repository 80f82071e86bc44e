from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from fluxloop import CustomCallback, FitBegin, Learner, Metric, Metrics, Recorder, StepEnd, TrainingPhase
from fluxloop.testing import toy_learner
from read_pages import Reader, read_page


def shown(learner: Learner[Any]) -> Reader:
    return read_page(learner._repr_html_())


def test_a_learner_without_a_fit_shows_what_it_has() -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=4)
    found = shown(learner)
    assert f"Learner on cpu, seed {learner.seed}" in found.words
    assert found.rows == [
        ["name", "class", "parameters"],
        ["model", "Coefficient", "1"],
        ["name", "class", "learning rate"],
        ["optimizer", "SGD", "0.001"],
        ["of", "class", "batches"],
        ["training", "TensorBatches", "4"],
        ["validation", "TensorBatches", "4"],
    ]
    assert "History" not in found.words
    assert [word for word in found.words if word in learner.callbacks.order] == ["Recorder", "Metrics"]


def test_a_learner_that_has_trained_shows_its_history_too() -> None:
    learner = toy_learner(Recorder(), Metrics())
    learner.fit(2)
    assert shown(learner).rows[-2:] == read_page(learner.history._repr_html_()).rows[-2:]
    assert [row[:2] for row in shown(learner).rows[-2:]] == [["TrainingPhase", "loss"], ["ValidationPhase", "loss"]]


def test_a_learner_whose_fit_failed_shows_what_was_recorded_before() -> None:
    def fail(*_: object) -> None:
        if learner.history.cycles == 1:
            raise RuntimeError("of the user's own")

    learner = toy_learner(Recorder(), Metrics(), CustomCallback(fail, StepEnd, TrainingPhase))
    with pytest.raises(RuntimeError, match="own"):
        learner.fit(3)
    assert "TrainingPhase: 1 epoch, 17 steps; ValidationPhase: 1 epoch, 16 steps; seed 0" in shown(learner).words


def test_each_of_several_models_and_optimizers_has_a_row() -> None:
    models = {"G": nn.Linear(2, 2), "D": nn.LazyLinear(1), "fixed": nn.Linear(3, 1).requires_grad_(False)}
    optimizers = {"G": partial(torch.optim.Adam, lr=3e-4), "D": torch.optim.Adadelta}
    found = shown(Learner(models, optimizer=optimizers, default_callbacks=False))
    assert found.rows == [
        ["name", "class", "parameters"],
        ["G", "Linear", "6"],
        ["D", "LazyLinear", "lazy"],
        ["fixed", "Linear", "4"],
        ["name", "class", "learning rate"],
        ["G", "Adam", "0.0003"],
        ["D", "Adadelta", "1"],
    ]


def test_groups_with_several_learning_rates_and_data_without_a_length_are_shown() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    rows = [(torch.ones(2, 1), torch.ones(2, 1))]
    learner = Learner(model, mse_loss, data=(iter(rows),), optimizer=torch.optim.SGD(groups, lr=0.25))
    assert ["optimizer", "SGD", "0.5, 0.25"] in shown(learner).rows
    assert ["training", "list_iterator", "unknown"] in shown(learner).rows
    learner.fit(1)  # nothing was taken of it


def test_an_optimizer_without_a_rate_of_its_own_and_a_loader_that_cannot_be_counted_are_shown() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.param_groups[0]["lr"] = None

    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    found = shown(Learner(nn.Linear(1, 1), mse_loss, data=(DataLoader(Rows()),), optimizer=Own))
    assert ["optimizer", "Own", "-"] in found.rows
    assert ["training", "DataLoader", "unknown"] in found.rows


def test_names_of_the_users_own_are_shown_with_their_signs() -> None:
    model = type("Net<T>", (nn.Linear,), {})(1, 1)
    loss = Metric(mse_loss, name="l<2>&")
    hook = CustomCallback(type, FitBegin, name="<script>")
    data = ((torch.ones(2, 1), torch.ones(2, 1)),)
    learner = Learner(model, mse_loss, data=data, callbacks=[Recorder(), Metrics(loss), hook], default_callbacks=False)
    learner.fit(1)
    found = shown(learner)
    assert ["model", "Net<T>", "2"] in found.rows
    assert "l<2>&" in [cell for row in found.rows for cell in row]
    assert "<script>" in found.words
    assert {"script", "t"}.isdisjoint(tag for tag, _ in found.elements)


def test_as_text_it_is_the_same_as_ever() -> None:
    learner = toy_learner(Recorder(), Metrics())
    assert repr(learner) == (
        "Learner(Coefficient; seed=0, cpu)\n  data: training, validation\n  callbacks: Recorder → Metrics"
    )


def test_looking_at_a_learner_changes_nothing() -> None:
    looked, plain = toy_learner(Recorder(), Metrics()), toy_learner(Recorder(), Metrics())
    for learner in (looked, plain):
        learner.fit(1)
        if learner is looked:
            learner._repr_html_()
        learner.fit(1)
    assert torch.equal(looked.model.value, plain.model.value)
    assert looked.history.rows() == plain.history.rows()


def test_a_script_loads_nothing_of_what_a_notebook_is_shown() -> None:
    script = (
        "import sys\nfrom fluxloop.testing import toy_learner\n"
        "learner = toy_learner()\nlearner.fit(1)\nrepr(learner), repr(learner.history), str(learner.summary())\n"
        "print([name for name in ('fluxloop.screen.pages', 'IPython') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]"
