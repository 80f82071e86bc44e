from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from compiled_training import ADAM, RMSPROP, SGD, Every, Scale, both, full, graphs, learner, learner_of, rows, weights
from torch import Tensor, nn

from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    ActivationStats,
    BackwardBegin,
    BackwardEnd,
    Callback,
    CompileError,
    CustomCallback,
    GradientClip,
    Learner,
    LearningRate,
    LogHistograms,
    Memory,
    MixUp,
    Momentum,
    Scheduler,
    StepEnd,
    TrainingPhase,
    UpdateBegin,
    ValidationPhase,
    WeightDecay,
    accuracy,
    linear,
    on,
    one_cycle,
    runstep,
    throttle,
)
from fluxloop.testing import assert_observer, assert_resumes_exactly, toy_learner

pytestmark = pytest.mark.usefixtures("imported")


# Compiled by TorchInductor


@pytest.mark.slow
def test_a_compiled_training_agrees_with_eager_after_100_steps_ragged_batches_and_dropout_too() -> None:
    model = lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))  # noqa: E731
    clip = lambda: [GradientClip(0.5), Scheduler({LearningRate: one_cycle(100, 0.05)})]  # noqa: E731
    eager, compiled = both(34, callbacks=clip, model=model, tolerance=1e-4, data=(rows(),))
    assert compiled.history[TrainingPhase].steps == 102
    assert compiled.history[TrainingPhase].updates == eager.history[TrainingPhase].updates == {None: 102}
    assert graphs(compiled) == 2  # full batches, and the ragged one
    for name in ("training/loss", "training/grad_norm"):
        assert compiled.history[name] == pytest.approx(eager.history[name], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_dropout_draws_other_numbers_at_each_step_the_same_in_each_run() -> None:
    def outputs() -> list[Tensor]:
        seen: list[Tensor] = []
        note = CustomCallback(lambda learner: seen.append(learner.step.preds.clone()), StepEnd, TrainingPhase)
        xs = torch.ones(64 * 3, 8)
        model = lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4))  # noqa: E731
        data = ([(xs[:64], torch.zeros(64, dtype=torch.long))] * 4,)
        learner(model=model, data=data, callbacks=[note], optimizer=partial(torch.optim.SGD, lr=0.0)).fit(1)
        return seen

    first, again = outputs(), outputs()
    assert len(first) == 4
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[2], first[3])
    assert all(map(torch.equal, first, again))


# Resume, and watching


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_compiled_runs_resume_to_the_bit() -> None:
    def make() -> Learner[Any]:
        rates = Scheduler({LearningRate: one_cycle(9, 0.1), WeightDecay: linear(6, 0.3, 0.0)})
        callbacks = [rates, GradientClip(0.5), EMA("model", 0.9)]
        model = lambda: nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 4))  # noqa: E731
        return learner(model=model, callbacks=callbacks, optimizer=ADAM)

    assert_resumes_exactly(make, epochs=2, at=[2, 7])


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit_with_inductor_too() -> None:
    accelerator = partial(Accelerator, "cpu", compile="step")
    assert_resumes_exactly(lambda: toy_learner(accelerator=accelerator()), epochs=1, at=[1, 9])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_watching_changes_nothing_in_compiled_steps() -> None:
    note = CustomCallback(lambda learner: torch.rand(3), StepEnd, TrainingPhase)
    assert_observer(note, lambda: toy_learner(accelerator=Accelerator("cpu", compile="step")))
    assert_observer(ValidationPhase(), lambda: toy_learner(accelerator=Accelerator("cpu", compile="step")))


# Callbacks and phases of a user's that stand in the way


class Reads(Callback):
    reads = ("step.preds",)
    writes = ("step.loss",)

    @on(BackwardBegin, TrainingPhase)
    def change(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.loss = learner.step.loss * 2


class ReadsGradients(Callback):
    reads = ("step.grads",)

    @on(StepEnd, AbstractTrainingPhase)
    def look(self, event: Any, phase: Any, learner: Any) -> None:
        list(learner.step.grads)


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Reads(), ("Reads handles BackwardBegin of TrainingPhase", "reads 'step.preds'", "writes 'step.loss'")),
        (CustomCallback(print, BackwardEnd, TrainingPhase), ("CustomCallback handles BackwardEnd", "reads '*'")),
        (ReadsGradients(), ("ReadsGradients reads 'step.grads' at StepEnd",)),
        (ActivationStats(), ("ActivationStats looks into the step",)),
        (LogHistograms(Memory()), ("LogHistograms looks into the step",)),
        (MixUp(0.4), ("MixUp handles LossBegin",)),
        (throttle(GradientClip(), UpdateBegin, freq=2), ("GradientClip handles UpdateBegin",)),
    ],
    ids=lambda value: value[0].split(" ")[0] if isinstance(value, tuple) else "",
)
def test_a_callback_that_needs_a_moment_inside_is_an_error_when_the_learner_is_made(
    callback: Callback, words: tuple[str, ...]
) -> None:
    learner(False, callbacks=[copy.deepcopy(callback)])
    with pytest.raises(CompileError) as caught:
        learner(callbacks=[callback])
    for word in (*words, "compile=False"):
        assert word in str(caught.value)


def test_a_callback_added_later_is_refused_and_the_old_ones_stay() -> None:
    made = learner()
    before = made.callbacks.order
    with pytest.raises(CompileError, match="Reads handles BackwardBegin"):
        made.add_callback(Reads())
    assert made.callbacks.order == before


@pytest.mark.slow
def test_a_handler_added_from_outside_is_noticed_at_the_next_step(plain: None) -> None:
    class Taught(Callback):
        pass

    made = learner(callbacks=[Taught()])
    made.fit(1)

    @on(BackwardEnd, TrainingPhase, Taught)
    def look(callback: Any, event: Any, phase: Any, learner: Any) -> None: ...

    with pytest.raises(CompileError, match="Taught handles BackwardEnd"):
        made.fit(1)


class OwnStep(TrainingPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            learner.backward(state.loss)
            learner.update()
        return state


class AsItIs(OwnStep):
    compiled = False


def test_a_step_of_ones_own_is_refused_unless_its_class_says_that_it_runs_as_it_is(plain: None) -> None:
    with pytest.raises(
        CompileError, match=r"OwnStep has a step of its own; say what it does in entries\(batch\), body"
    ):
        learner().fit(1, phases=[OwnStep()])
    _, compiled = both(phases=lambda: [AsItIs()], tolerance=0.0)
    assert compiled._compiled is not None
    assert AsItIs not in compiled._compiled._plans


def test_explain_says_which_steps_can_be_compiled() -> None:
    text = learner(False, callbacks=[Reads()]).callbacks.explain().text
    training, validation = text.split("ValidationPhase")
    assert "steps are not fusable:\n    Reads handles BackwardBegin of TrainingPhase" in training
    assert "steps are fusable" in validation


def test_what_compile_may_be() -> None:
    with pytest.raises(ValueError, match="expected False, 'model' or 'step'"):
        Accelerator("cpu", compile="all")  # type: ignore[arg-type]  # what is tested


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own use of it
def test_a_model_is_compiled_by_torch_and_stays_what_it_is() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    eager, made = learner(False, data=(full(),)), learner("model", data=(full(),))
    kind, names = type(made.model), list(made.model.state_dict())
    assert (type(eager.model), list(eager.model.state_dict())) == (kind, names)
    for each in (eager, made):
        each.fit(1, steps_per_epoch=2)
    assert counters["stats"]["unique_graphs"] >= 1  # a Sequential is compiled too
    for a, b in zip(weights(eager), weights(made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert type(copy.deepcopy(made.model)) is kind


# Graphs are made anew, or used again


class Weighted(TrainingPhase):
    """Weighs its loss by a number that changes."""

    def __init__(self, change: float) -> None:
        self.weight, self.change = 1.0, change

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)
        state.loss = learner.loss_fn(state.preds, state.ys) * self.weight
        learner.backward(state.loss)
        learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.weight *= self.change


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_number_of_the_phase_that_changes_is_seen_and_said_when_it_changes_often() -> None:
    with pytest.warns(UserWarning, match=r"Weighted has been compiled 8 times.*Weighted.weight"):
        both(5, phases=lambda: [Weighted(0.9)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, compiled = both(5, phases=lambda: [Weighted(1.0)])
    assert graphs(compiled, Weighted) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_an_option_that_changes_at_every_step_is_right_and_said_where_it_is_no_input() -> None:
    schedule = linear(15, 0.5, 0.9)
    with pytest.warns(UserWarning, match=r"compiled 8 times.*the optimizer: momentum.*cycle_momentum=False"):
        both(5, callbacks=lambda: [Scheduler({Momentum: schedule})], optimizer=partial(RMSPROP, momentum=0.9))
    for optimizer in (SGD, ADAM):
        _, compiled = both(5, callbacks=lambda: [Scheduler({Momentum: schedule})], optimizer=optimizer)
        assert graphs(compiled) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_loading_a_state_goes_on_with_the_tensors_that_are_there_then() -> None:
    other = learner(optimizer=ADAM)
    other.fit(1)
    state = copy.deepcopy(other.state_dict())
    made = learner(optimizer=ADAM)
    made.fit(3)
    made.load_state_dict(state)
    other.fit(2)
    made.fit(2)
    for a, b in zip(weights(other), weights(made), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_evaluate_and_predict_are_compiled_and_reuse_their_graphs() -> None:
    made = learner(callbacks=[])
    made.fit(2)
    assert made._compiled is not None
    expected = learner(False)
    expected.model.load_state_dict(made.model.state_dict())
    for _ in range(2):
        assert made.evaluate(rows(), metrics=[accuracy]) == pytest.approx(
            expected.evaluate(rows(), metrics=[accuracy]), rel=1e-5
        )
        torch.testing.assert_close(made.predict(rows()), expected.predict(rows()))
    assert graphs(made, ValidationPhase) == 2
    assert sum(len(plan._graphs) for plan in made._compiled._plans.values()) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_an_optimizer_that_takes_its_first_step_late_costs_no_graph_of_a_later_epoch() -> None:
    made = learner(optimizer=ADAM, data=((rows()[0][:64], rows()[1][:64]),))
    made.fit(4, phases=[phase := Every(2)])
    plan = made._compiled._plans[Every]  # type: ignore[union-attr]  # it is compiled
    assert plan._built.graphs == 2
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    made.fit(2, phases=[phase])
    assert plan._built.graphs == 4  # the states are other tensors now


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_a_copied_learner_compiles_steps_of_its_own() -> None:
    made = learner_of(Scale())
    made.fit(1)
    copied = copy.deepcopy(made)
    for each in (made, copied):
        each.fit(1)
    for a, b in zip(made.model.parameters(), copied.model.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)
