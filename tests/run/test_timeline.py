from __future__ import annotations

import copy
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.data import DataLoader, TensorDataset

import fluxloop.compile.graphs
from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    CancelStepException,
    Checkpointer,
    CustomCallback,
    Event,
    GANPhase,
    GradientClip,
    Learner,
    LossBegin,
    Metrics,
    MissingEntryError,
    MixUp,
    Phase,
    PhaseError,
    Recorder,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner


class Shown(Event):
    """A user's event inside a step."""


class GAN(TrainingPhase):
    def entries(self, batch: Any) -> dict[str, Any]:
        return {"real": batch}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        gen, disc = learner.model
        state.fake = gen(torch.randn(len(state.real), 4))
        with learner.optimizing("D") as block:
            block.loss = softplus(-disc(state.real)).mean() + softplus(disc(state.fake.detach())).mean()
        handle(Shown())
        with learner.optimizing("G") as block:
            block.loss = softplus(-disc(state.fake)).mean()


def adversarial(*callbacks: Any, **options: Any) -> Learner[Any]:
    torch.manual_seed(0)
    models = {"G": nn.Linear(4, 2), "D": nn.Linear(2, 1)}
    options = {"data": (torch.randn(64, 2),), "seed": 0, **options}
    return Learner(models, callbacks=callbacks, default_callbacks=False, **options)


def rows(diagram: Any) -> list[str]:
    return [" ".join(line.split()) for line in str(diagram).splitlines()[1:]]


def test_it_shows_the_events_of_a_step_who_acts_and_what_is_stored() -> None:
    learner = toy_learner(Recorder(), Metrics(), StopOnNaNLoss())
    assert rows(learner.timeline()) == [
        "StepBegin StopOnNaNLoss xs, ys",
        "LossBegin preds",
        "BackwardBegin StopOnNaNLoss loss",
        "BackwardEnd grads",
        "UpdateBegin StopOnNaNLoss",
        "UpdateEnd Recorder",
        "StepEnd Recorder → Metrics → StopOnNaNLoss",
    ]
    assert rows(learner.timeline(ValidationPhase())) == [
        "StepBegin xs, ys",
        "LossBegin preds",
        "StepEnd Recorder → Metrics loss",
    ]


def test_updates_of_several_optimizers_and_events_of_ones_own_are_shown_by_name() -> None:
    learner = adversarial(Recorder(), GradientClip(1.0), EMA("G", 0.9), EventRecorder())
    found = rows(learner.timeline(GAN()))
    assert found[:4] == [
        "StepBegin EMA → EventRecorder real",
        "BackwardBegin (D) EventRecorder fake, losses['D']",
        "BackwardEnd (D) EventRecorder grads",
        "UpdateBegin (D) EventRecorder → GradientClip",
    ]
    assert "Shown EventRecorder" in found
    assert [line.split(" ")[0] for line in found if "(G)" in line] == [
        "BackwardBegin",
        "BackwardEnd",
        "UpdateBegin",
        "UpdateEnd",
    ]


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_its_events_are_those_of_a_step_of_a_fit(phase: type[Phase]) -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, num_batches=1)
    shown = [line.split(" ")[0] for line in rows(learner.timeline(phase()))]
    learner.fit(1)
    mine = [event for event, name in recorder.trace if name == phase.__name__]
    assert shown == mine[1:-1]  # without EpochBegin and EpochEnd


def everything(learner: Learner[Any]) -> dict[str, Any]:
    """Give what a learner has, and what the process has of random numbers, as it is now."""
    gradients = {name: p.grad for m in learner.modules() for name, p in m.named_parameters()}
    entries = {name: id(value) for name, value in vars(learner.step).items()}
    apart = {"step": entries, "phases": list(map(id, learner.phases.values())), "order": learner.callbacks.order}
    numbers = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    return copy.deepcopy({"state": learner.state_dict(), "gradients": gradients, **apart, **numbers})


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}/{index}")
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        assert np.array_equal(one, other, equal_nan=one.dtype.is_floating_point if torch.is_tensor(one) else False), (
            path
        )
    else:
        assert one == other, path


def with_dropout(*callbacks: Any, **options: Any) -> Learner[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    rows = torch.randn(48, 4)
    loader = DataLoader(TensorDataset(rows, rows[:, :1]), batch_size=8, shuffle=True)
    options = {"optimizer": partial(torch.optim.Adam, lr=0.01), "seed": 0, **options}
    return Learner(
        model, mse_loss, data=(loader,), callbacks=[*callbacks, MixUp(0.4)], default_callbacks=False, **options
    )


class Counting(TrainingPhase):
    """A step of its own, that counts."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def step(self, learner: Any, batch: Any) -> Any:
        self.steps += 1
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.preds = learner.model(state.xs + torch.randn_like(state.xs) * random.random() * np.random.rand())
            handle(LossBegin())
            state.loss = mse_loss(state.preds, state.ys)
            learner.backward(state.loss)
            learner.update()
        return state


def gan_learner(*callbacks: Any, **options: Any) -> Learner[Any]:
    return adversarial(*callbacks, EMA("G", 0.9), optimizer=partial(torch.optim.Adam, lr=0.01), **options)


def accumulating(*callbacks: Any, **options: Any) -> Learner[Any]:
    return with_dropout(*callbacks, accelerator=Accelerator("cpu", accumulate=4), **options)


def in_backward(*callbacks: Any, **options: Any) -> Learner[Any]:
    without = [callback for callback in callbacks if not isinstance(callback, GradientClip)]
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return with_dropout(*without, optimizer=sgd, accelerator=Accelerator("cpu", optimizer_in_backward=True), **options)


def in_half_precision(*callbacks: Any, **options: Any) -> Learner[Any]:
    return with_dropout(*callbacks, accelerator=Accelerator("cpu", precision="bf16", accumulate=2), **options)


LOOKED_AT = [
    (in_backward, TrainingPhase),
    (in_half_precision, TrainingPhase),
    (with_dropout, TrainingPhase),
    (with_dropout, Counting),
    (accumulating, TrainingPhase),
    (gan_learner, GAN),
    (gan_learner, partial(GANPhase, noise=4)),
]


@pytest.mark.parametrize(("make", "phase"), LOOKED_AT)
def test_looking_changes_nothing(make: Any, phase: Callable[[], Phase]) -> None:
    looked, plain = (make(Recorder(), Metrics(), GradientClip(1.0)) for _ in range(2))
    fits = [(learner, phase()) for learner in (looked, plain)]
    for learner, own in fits:
        before = everything(learner)
        if learner is looked:
            learner.timeline(own)
            assert_equal(before, everything(learner))
        learner.fit(1, phases=[own])
        before = everything(learner)
        if learner is looked:
            learner.timeline(own)
            learner.timeline()
            assert_equal(before, everything(learner))
        learner.fit(1, phases=[own])
    assert_same_bits(looked, plain)
    assert_equal(everything(looked)["state"], everything(plain)["state"])


class Looking(UnsafeCallback):
    """Asks for the timeline in the middle of steps."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    @on(UpdateBegin, TrainingPhase)
    @on(StepEnd, TrainingPhase)
    def look(self, event: Event, phase: Phase, learner: Any) -> None:
        self.shown.append(str(learner.timeline(type(phase)())))


@pytest.mark.parametrize("make", [with_dropout, accumulating, in_half_precision, gan_learner])
def test_looking_in_the_middle_of_a_fit_changes_nothing(make: Any) -> None:
    phase = GAN if make is gan_learner else TrainingPhase
    look = Looking()
    looked, plain = make(Recorder(), Metrics(), look), make(Recorder(), Metrics())
    for learner in (looked, plain):
        learner.fit(2, phases=[phase()])
    assert len(look.shown) > 8
    assert len(set(look.shown)) == 1
    assert_same_bits(looked, plain)
    assert looked.history.rows() == plain.history.rows()


def test_a_copy_and_a_resumed_learner_show_the_same(tmp_path: Any) -> None:
    learner = adversarial(Recorder(), EMA("G", 0.9), Checkpointer(tmp_path))
    learner.fit(1, phases=[GAN()])
    shown = str(learner.timeline())
    assert str(copy.deepcopy(learner).timeline()) == shown
    again = adversarial(Recorder(), EMA("G", 0.9), Checkpointer(tmp_path))
    again.fit(2, phases=[GAN()], resume=tmp_path)
    assert str(again.timeline()) == shown


def test_left_out_the_phase_is_one_that_has_trained() -> None:
    learner = adversarial(Recorder())
    learner.fit(1, phases=[GAN()])
    assert str(learner.timeline()).startswith("One step of GAN: ")


@pytest.mark.parametrize("accumulate", [3, {"G": 2, "D": 3}])
def test_of_several_batches_that_make_one_update_a_last_one_is_shown(accumulate: Any) -> None:
    learner = adversarial(Recorder(), accelerator=Accelerator("cpu", accumulate=accumulate))
    found = rows(learner.timeline(GAN()))
    assert "UpdateEnd (D) Recorder" in found
    assert "UpdateEnd (G) Recorder" in found


def test_steps_that_are_compiled_whole_are_shown_as_they_are_written() -> None:
    learner = adversarial(Recorder(), accelerator=Accelerator("cpu", compile="step"))
    assert rows(learner.timeline(GAN()))[0] == "StepBegin real"


def test_looking_at_a_learner_whose_steps_are_compiled_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def lower(graph: Any, inputs: Any, device: Any) -> Any:
        graphs.append(graph)
        return torch.no_grad()(graph)

    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lower)
    looked, plain = (gan_learner(Recorder(), accelerator=Accelerator("cpu", compile="step")) for _ in range(2))
    for learner in (looked, plain):
        for _ in range(2):
            if learner is looked:
                learner.timeline(GAN())
            learner.fit(1, phases=[GAN()])
        if learner is looked:
            learner.timeline()
        assert len(graphs) == 1 + (learner is plain)  # looking makes no graph, and does not have one made anew
        learner.fit(1, phases=[GAN()])
    assert_same_bits(looked, plain)
    assert len(graphs) == 2


def test_frozen_models_have_no_update() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    learner = Learner(model, mse_loss, data=((torch.randn(8, 2), torch.randn(8, 1)),) * 2, default_callbacks=False)
    assert rows(learner.timeline(ValidationPhase())) == ["StepBegin xs, ys", "LossBegin preds", "StepEnd loss"]


class Ended(TrainingPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0]) as (handle, state):
            handle(LossBegin())
            raise CancelStepException
        return state


def test_a_step_that_ends_itself_is_shown_up_to_there() -> None:
    assert rows(toy_learner(Recorder()).timeline(Ended())) == ["StepBegin xs", "LossBegin"]


class Misspelt(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.inputs)


def test_an_error_of_the_step_leaves_with_a_note_and_everything_is_put_back() -> None:
    learner = toy_learner(Recorder())
    with pytest.raises(MissingEntryError) as caught:
        learner.timeline(Misspelt())
    assert any("Misspelt() that learner.timeline runs" in note for note in getattr(caught.value, "__notes__", ()))
    learner.fit(1)
    other = toy_learner(Recorder())
    other.fit(1)
    assert_same_bits(learner, other)


class EpochAlone(AbstractTrainingPhase):
    def epoch(self, learner: Any, data: Any) -> None: ...


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (TrainingPhase, "expected an instance"),
        (3, "expected an instance"),
        (EpochAlone(), "has no step to show"),
    ],
)
def test_what_has_no_step_is_refused(phase: Any, message: str) -> None:
    with pytest.raises(PhaseError, match=message):
        toy_learner().timeline(phase)


def test_data_that_can_be_iterated_once_is_not_begun() -> None:
    batches = iter([torch.randn(4, 2)] * 2)
    learner = adversarial(Recorder(), data=(batches,))
    with pytest.raises(PhaseError, match=r"give a batch to look at: learner.timeline\(batch=...\)"):
        learner.timeline(GAN())
    assert rows(learner.timeline(GAN(), torch.randn(4, 2)))[0] == "StepBegin real"
    assert len(list(batches)) == 2


def test_lazy_modules_are_refused() -> None:
    learner = Learner(nn.LazyLinear(1), mse_loss, data=((torch.randn(8, 2), torch.randn(8, 1)),))
    with pytest.raises(PhaseError, match=r"learner.timeline cannot look at lazy modules"):
        learner.timeline()


def test_the_picture_has_a_row_for_each_event_and_a_dot_for_each_who_acts() -> None:
    learner = adversarial(Recorder(), GradientClip(1.0), EMA("G", 0.9))
    diagram = learner.timeline(GAN())
    root = ET.fromstring(diagram.svg)
    svg = "{http://www.w3.org/2000/svg}"
    assert len(list(root.iter(f"{svg}circle"))) == sum(str(diagram).count(id) for id in learner.callbacks.order)
    found = [element.text for element in root.iter(f"{svg}text")]
    assert {"Recorder", "GradientClip", "EMA", "GAN", "UpdateEnd (G)", "has real"} <= set(found)


def test_mermaid_is_a_sequence_of_messages_from_the_phase_to_callbacks() -> None:
    lines = adversarial(Recorder()).timeline(GAN()).mermaid.splitlines()
    assert lines[:4] == [
        "sequenceDiagram",
        "    participant phase as GAN",
        "    participant n0 as Recorder",
        "    Note over phase: real",
    ]
    assert "    phase->>n0: UpdateEnd (D)" in lines
    assert "    phase->>phase: BackwardEnd (D)" in lines


def test_names_with_signs_of_mermaid_are_shown_as_they_are() -> None:
    class Noisy(TrainingPhase):
        name = "noise; #35;"

    learner = toy_learner(Recorder(), CustomCallback(print, StepEnd, name="a; b #1 <c>"))
    lines = learner.timeline(Noisy()).mermaid.splitlines()
    assert lines[1:4] == [
        "    participant phase as noise#59; #35;35#59;",
        "    participant n0 as Recorder",
        "    participant n1 as a#59; b #35;1 #60;c#62;",
    ]
