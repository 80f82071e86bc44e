from __future__ import annotations

import copy
import gc
import inspect
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import define
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    AbstractTrainingPhase,
    Accelerator,
    Callback,
    CallbackConflictError,
    CallbackTypeError,
    CheckpointError,
    CustomCallback,
    DataError,
    DuplicateCallbackError,
    EpochEnd,
    Learner,
    LossBegin,
    Metrics,
    MetricsPrinter,
    MissingProducerError,
    ModelError,
    ProgressBar,
    Recorder,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    find_lr,
    on,
    runstep,
    seed_everything,
    throttle,
)
from fluxloop.testing import Coefficient, EventRecorder, assert_same_bits, bits, toy_learner

DEFAULTS = ["Recorder", "Metrics", "MetricsPrinter", "ProgressBar", "StopOnNaNLoss"]


def quiet() -> list[Callback]:
    return [ProgressBar(enabled=False)]


def classes(learner: Learner) -> list[str]:
    return sorted(type(callback).__name__ for callback in learner.callbacks)


# Models, parameters, optimizers


def test_a_model_without_trainable_parameters_gets_no_optimizer() -> None:
    learner = Learner({"student": nn.Linear(1, 1), "teacher": nn.Linear(1, 1).requires_grad_(False), "act": nn.ReLU()})
    assert learner.optimizer_names == ("student",)


def test_frozen_parameters_are_given_to_no_optimizer() -> None:
    model = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    held = Learner(model).optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model[1].parameters()]


def test_an_optimizer_that_exists_is_used_as_it_is() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.5}, {"params": [model.bias]}], lr=0.1)
    assert Learner(model, optimizer=optimizer).optimizer is optimizer


def test_two_optimizers_over_one_model_have_names_of_their_own() -> None:
    model = nn.Sequential()
    model.encoder, model.head = nn.Linear(2, 2), nn.Linear(2, 1)
    head = torch.optim.SGD(model.head.parameters(), lr=0.1)
    learner = Learner(model, optimizer={"encoder": torch.optim.Adam, "last": head})
    assert learner.optimizer_names == ("encoder", "last")
    assert learner.optimizer.last is head
    held = learner.optimizer.encoder.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model.encoder.parameters()]


def test_a_loss_module_is_moved_to_the_device_and_a_function_used_as_it_is() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert Learner(nn.Linear(2, 3), loss, accelerator=Accelerator("meta")).loss_fn.weight.device.type == "meta"
    assert Learner(nn.Linear(2, 3), nn.functional.mse_loss).loss_fn is nn.functional.mse_loss


def test_a_loss_may_be_a_function_or_a_module() -> None:
    def trained(loss: Any) -> Learner:
        learner = toy_learner()
        learner.loss_fn = loss
        learner.fit(2)
        return learner

    assert_same_bits(trained(nn.functional.mse_loss), trained(nn.MSELoss()))


# Data


XS, YS = torch.linspace(1, 10, 70).reshape(70, 1), torch.linspace(3, 30, 70).reshape(70, 1)


@pytest.mark.parametrize(
    ("data", "keys", "batches"),
    [
        ((), [], None),
        (((XS, YS),), ["training"], 3),
        (((XS, YS), (XS, YS)), ["training", "validation"], 3),
        ({"training": (XS, YS), "validation": (XS, YS), "test": (XS, YS)}, ["test", "training", "validation"], 3),
        ((TensorDataset(XS, YS),), ["training"], 3),
        ((TensorBatches(XS, YS, batch_size=10),), ["training"], 7),
        ((DataLoader(TensorDataset(XS, YS), batch_size=35),), ["training"], 2),
        (((XS.numpy(), YS.numpy()),), ["training"], 3),
        ([(XS, YS), (XS, YS)], ["training"], 2),
        (DataLoader(TensorDataset(XS, YS), batch_size=7), ["training"], 10),
        (TensorDataset(XS, YS), ["training"], 3),
    ],
    ids=["none", "train", "pair", "mapping", "dataset", "batches", "loader", "arrays", "list", "bare", "bare dataset"],
)
def test_data_comes_in_many_forms(data: Any, keys: list[str], batches: int | None) -> None:
    learner = toy_learner(Recorder(), data=data)
    assert sorted(vars(learner.data)) == keys
    if batches is not None:
        learner.fit(1)
        assert learner.history[TrainingPhase].steps == batches


def test_one_element_of_data_is_training_data() -> None:
    learner = toy_learner(Recorder(), data=((XS, YS),))
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1
    assert learner.history[ValidationPhase].epochs == 0


def test_data_given_to_fit_is_used_instead_of_the_learners() -> None:
    learner = toy_learner(Recorder(), num_batches=5)
    learner.fit(1, data=([(XS, YS)], [(XS, YS), (XS, YS)]))
    assert learner.history[TrainingPhase].steps == 1
    assert learner.history[ValidationPhase].steps == 2
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 1 + 5


def test_data_given_to_epoch_is_used_instead_of_the_learners() -> None:
    learner = toy_learner(Recorder(), data=())
    learner.epoch(TrainingPhase(), (XS, YS))
    assert learner.history[TrainingPhase].steps == 3
    with pytest.raises(DataError, match="'training' data, and there is no data"):
        learner.epoch(TrainingPhase())


def test_a_learner_without_validation_data_only_trains() -> None:
    recorder = EventRecorder()
    toy_learner(recorder, data=((XS, YS),)).fit(1)
    assert {phase for _, phase in recorder.trace} == {"FittingPhase", "TrainingPhase"}


def test_num_batches_is_that_of_the_running_epoch() -> None:
    seen: list[int | None] = []
    look = CustomCallback(lambda learner: seen.append(learner.num_batches), EpochEnd)
    learner = toy_learner(look, data=([(XS, YS)] * 3, iter([(XS, YS)])))
    assert learner.num_batches is None
    learner.fit(1)
    assert seen == [3, None]
    assert learner.num_batches is None


def test_batch_size_is_the_number_of_rows_of_the_step() -> None:
    seen: list[int] = []
    learner = toy_learner(CustomCallback(lambda learner: seen.append(learner.batch_size), StepEnd), data=((XS, YS),))
    learner.fit(1)
    assert seen == [32, 32, 6]
    assert learner.batch_size == 6


# Seeds


def test_repr_shows_models_seed_data_and_callbacks() -> None:
    text = repr(toy_learner(Recorder(), Metrics(), seed=1234))
    assert text.splitlines() == [
        f"Learner(Coefficient; seed=1234, {Accelerator().device})",
        "  data: training, validation",
        "  callbacks: Recorder → Metrics",
    ]
    assert "generator: Linear, critic: Linear" in repr(
        Learner({"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)})
    )
    assert "data: none" in repr(toy_learner(data=()))


def test_without_a_seed_torchs_generator_decides_and_the_seed_is_shown() -> None:
    seed_everything(7)
    first, second = Learner(Coefficient()), Learner(Coefficient())
    seed_everything(7)
    again = Learner(Coefficient())
    assert first.seed == again.seed != second.seed
    assert f"seed={first.seed}" in repr(first)
    assert f"seed {first.seed}" in repr(first.history)


def test_a_seed_given_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert Learner(Coefficient(), seed=3).seed == 3
    assert torch.equal(torch.get_rng_state(), before)


# Callbacks


def test_the_default_callbacks_are_there_unless_unwanted() -> None:
    assert classes(toy_learner(default_callbacks=True)) == sorted(DEFAULTS)
    assert classes(toy_learner(default_callbacks=False)) == []


@pytest.mark.parametrize("default", [Recorder, Metrics, ProgressBar, MetricsPrinter, StopOnNaNLoss])
def test_a_callback_given_replaces_the_default_of_its_type(default: Any) -> None:
    mine = default()
    learner = toy_learner(mine, default_callbacks=True)
    assert classes(learner) == sorted(DEFAULTS)
    assert learner.get_callback(default) is mine


def test_a_subclass_replaces_the_default_too() -> None:
    class MyMetrics(Metrics):
        pass

    learner = toy_learner(MyMetrics(), default_callbacks=True)
    assert classes(learner) == sorted([*(name for name in DEFAULTS if name != "Metrics"), "MyMetrics"])


@pytest.mark.parametrize("default", [Recorder, Metrics, ProgressBar, MetricsPrinter, StopOnNaNLoss])
def test_a_throttled_callback_replaces_the_default_of_its_type(default: Any) -> None:
    mine = default()
    learner = toy_learner(throttle(mine, StepEnd, freq=2), default_callbacks=True)
    assert classes(learner) == sorted(DEFAULTS)
    assert learner.get_callback(default) is mine


def test_callbacks_are_found_by_their_class_wrapped_or_not() -> None:
    recorder, events = Recorder(), EventRecorder()
    learner = toy_learner(recorder, throttle(events, StepEnd, freq=2))
    assert learner.get_callback(Recorder) is recorder
    assert learner.get_callback(EventRecorder) is events
    assert learner.get_callback(Metrics) is None


def test_a_callback_added_is_initialised_and_runs_from_then_on() -> None:
    learner = toy_learner()
    learner.fit(1)
    learner.add_callback(Recorder())
    assert "history" in learner.cbstate
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


def test_a_callback_replaced_is_returned_and_no_longer_runs() -> None:
    first, second = EventRecorder(), EventRecorder()
    learner = toy_learner(first)
    assert learner.replace_callback(second) is first
    learner.fit(1)
    assert first.trace == []
    assert second.events[0] == "FitBegin"


def test_replacing_a_callback_that_is_not_there_adds_it() -> None:
    learner = toy_learner()
    assert learner.replace_callback(Recorder()) is None
    assert classes(learner) == ["Recorder"]


def test_a_wrapped_callback_is_replaced_by_its_type() -> None:
    first, second = EventRecorder(), EventRecorder()
    learner = toy_learner(throttle(first, StepEnd, freq=2))
    assert learner.replace_callback(throttle(second, StepEnd, freq=4)) is first
    assert learner.get_callback(EventRecorder) is second
    assert classes(learner) == ["EventRecorder"]


def test_a_callback_removed_is_returned_wrapped_or_not() -> None:
    first = EventRecorder()
    for given in (first, throttle(first, StepEnd, freq=2)):
        learner = toy_learner(given)
        assert learner.remove_callback(EventRecorder) is first
        assert learner.remove_callback(EventRecorder) is None
        assert classes(learner) == []


def test_set_callbacks_puts_new_ones_in_the_place_of_all() -> None:
    learner = toy_learner(default_callbacks=True, callbacks=quiet())
    learner.set_callbacks([Recorder()])
    assert classes(learner) == ["Recorder"]
    learner.set_callbacks([])
    assert classes(learner) == []


@define
class WritesLevel(Callback):
    writes = ("cbstate.level",)

    def init(self, learner: Any) -> None:
        learner.cbstate.level = getattr(self, "times", 0)
        self.times = getattr(self, "times", 0) + 1


@define
class ReadsLevel(Callback):
    reads = ("cbstate.level",)


@define
class WritesPreds(Callback):
    writes = ("step.preds",)

    @on(LossBegin)
    def double(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.preds = learner.step.preds * 2


def test_a_callback_is_initialised_once_per_learner_however_it_came() -> None:
    for manage in (
        lambda learner, callback: learner.add_callback(callback),
        lambda learner, callback: learner.replace_callback(callback),
        lambda learner, callback: learner.set_callbacks([callback]),
    ):
        learner, callback = toy_learner(), WritesLevel()
        manage(learner, callback)
        assert callback.times == 1
        learner.add_callback(Recorder())
        learner.fit(1)
        assert callback.times == 1
        assert learner.cbstate.level == 0


@pytest.mark.slow(quick=4)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda learner: learner.add_callback(WritesPreds(name="second")), CallbackConflictError),
        (lambda learner: learner.add_callback(learner.get_callback(Recorder)), DuplicateCallbackError),
        (lambda learner: learner.add_callback(Recorder), CallbackTypeError),
        (lambda learner: learner.replace_callback(Recorder), CallbackTypeError),
        (lambda learner: learner.remove_callback(WritesLevel), MissingProducerError),
        (lambda learner: learner.set_callbacks([ReadsLevel()]), MissingProducerError),
        (lambda learner: learner.set_callbacks(Recorder()), CallbackTypeError),
        (lambda learner: learner.get_callback(Recorder()), CallbackTypeError),
    ],
)
def test_a_change_without_an_order_changes_nothing(change: Any, error: type[Exception]) -> None:
    learner = toy_learner(Recorder(), WritesPreds(name="first"), WritesLevel(), ReadsLevel())
    before = learner.callbacks.order, learner.callbacks.digest, list(learner.callbacks), set(vars(learner.cbstate))
    with pytest.raises(error):
        change(learner)
    after = learner.callbacks.order, learner.callbacks.digest, list(learner.callbacks), set(vars(learner.cbstate))
    assert before == after
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 16


def test_an_init_that_fails_leaves_the_callbacks_as_they_were() -> None:
    @define
    class Fails(Callback):
        def init(self, learner: Any) -> None:
            raise OSError("disk full")

    learner = toy_learner(Recorder())
    with pytest.raises(OSError, match="disk full"):
        learner.add_callback(Fails())
    assert classes(learner) == ["Recorder"]
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


# Copies, and what is left behind


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("defaults", [False, True])
def test_a_learner_and_its_model_are_garbage_once_nobody_holds_them(defaults: bool) -> None:
    learner = toy_learner(default_callbacks=defaults, callbacks=quiet() if defaults else ())
    learner.fit(1)
    learner.evaluate()
    learner.callbacks.explain()
    held = [weakref.ref(learner), weakref.ref(learner.model), weakref.ref(learner.callbacks), weakref.ref(learner.step)]
    del learner
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


@pytest.mark.slow
def test_a_learner_is_garbage_after_a_failed_fit() -> None:
    def fail(learner: Any) -> None:
        raise RuntimeError("no")

    learner = toy_learner(CustomCallback(fail, StepEnd))
    with pytest.raises(RuntimeError, match="no"):
        learner.fit(1)
    held = weakref.ref(learner)
    del learner
    gc.collect()
    assert held() is None


def test_two_learners_share_nothing() -> None:
    first, second = (toy_learner(default_callbacks=True, callbacks=quiet()) for _ in range(2))
    untouched = bits(second), repr(second.history), second.streams.positions()
    first.fit(2)
    assert second.model.value.item() == untouched[0]["model..value"].item()
    assert (repr(second.history), second.streams.positions()) == untouched[1:]
    assert second.history[TrainingPhase].steps == 0
    assert vars(second.step) == {}
    second.fit(2)
    assert_same_bits(first, second)
    assert first.history.rows() == second.history.rows()


def test_training_two_learners_in_turns_is_training_each_alone() -> None:
    def make() -> Learner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        return Learner(
            model, nn.functional.mse_loss, data=((XS, YS),), seed=5, default_callbacks=False, callbacks=[Recorder()]
        )

    alone, first, second = make(), make(), make()
    alone.fit(3)
    for _ in range(3):
        first.fit(1)
        second.fit(1)
    assert_same_bits(alone, first)
    assert_same_bits(alone, second)


def test_a_copy_goes_on_where_the_original_stands_and_apart_from_it() -> None:
    original = toy_learner(Recorder(), Metrics(), optimizer=torch.optim.Adam)
    original.fit(1)
    clone = copy.deepcopy(original)
    assert_same_bits(original, clone)
    before = bits(original)
    clone.fit(2)
    assert all(torch.equal(bits(original)[name], tensor) for name, tensor in before.items())
    assert original.history[TrainingPhase].epochs == 1
    assert clone.history[TrainingPhase].epochs == 3
    assert clone.get_callback(Recorder) is not original.get_callback(Recorder)
    original.fit(2)
    assert_same_bits(original, clone)
    assert original.history.rows() == clone.history.rows()


def test_one_callback_may_serve_two_learners() -> None:
    recorder = Recorder()
    first, second = toy_learner(recorder), toy_learner(recorder)
    first.fit(2)
    second.fit(1)
    assert first.history[TrainingPhase].epochs == 2
    assert second.history[TrainingPhase].epochs == 1


def test_a_step_stays_readable_after_the_fit() -> None:
    learner = toy_learner()
    learner.fit(1, phases=[TrainingPhase()])
    assert sorted(vars(learner.step)) == ["grads", "loss", "preds", "xs", "ys"]
    assert learner.step.xs.shape == (8, 1)


# On the side, and hooks


@pytest.mark.parametrize("own_generator", [False, True])
def test_check_leaves_weights_and_the_order_of_the_data_as_they_were(own_generator: bool) -> None:
    def make() -> Learner:
        generator = torch.Generator().manual_seed(0) if own_generator else None
        loader = DataLoader(TensorDataset(XS, YS), batch_size=7, shuffle=True, generator=generator)
        return toy_learner(data=(loader,), optimizer=torch.optim.Adam)

    plain, checked = make(), make()
    assert checked.check() == []
    assert_same_bits(plain, checked)
    plain.fit(1)
    checked.fit(1)
    assert_same_bits(plain, checked)


def test_hooks_at_the_beginning_of_a_step_see_the_batch() -> None:
    seen: list[int] = []
    learner = toy_learner(CustomCallback(lambda learner: seen.append(len(learner.step.xs)), StepBegin, TrainingPhase))
    learner.fit(1)
    assert seen == [8] * 16


# Copies


class EveryFourth(AbstractTrainingPhase):
    """Updates at every fourth step."""

    def __init__(self) -> None:
        self.n = 0

    def step(self, learner: Any, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            learner.backward(state.loss)
            self.n += 1
            if self.n % 4 == 0:
                learner.update()


def test_a_copy_has_the_gradients_that_wait_and_trains_to_the_same_bits() -> None:
    learner, phase = toy_learner(), EveryFourth()
    batches = [(torch.ones(2, 1), torch.full((2, 1), float(n))) for n in range(6)]
    learner.epoch(phase, batches)
    copied = copy.deepcopy(learner)
    gradient = learner.model.value.grad
    assert gradient is not None
    assert torch.equal(gradient, copied.model.value.grad)
    assert gradient is not copied.model.value.grad
    learner.epoch(phase, batches)
    copied.epoch(copied.phases[EveryFourth], batches)
    assert_same_bits(learner, copied)


def test_a_copy_has_the_hooks_of_optimizers_and_parameters() -> None:
    class Counts:
        def __init__(self) -> None:
            self.steps = self.gradients = 0

        def step(self, *given: Any) -> None:
            self.steps += 1

        def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
            self.gradients += 1
            return gradient * 2

    class Holds(Callback):
        def __init__(self) -> None:
            self.counts = Counts()

    learner = toy_learner(holds := Holds())
    learner.optimizer.register_step_post_hook(holds.counts.step)
    learner.model.value.register_hook(holds.counts.gradient)
    copied = copy.deepcopy(learner)
    other = copied.get_callback(Holds)
    assert other is not None
    copied.fit(1)
    assert (holds.counts.steps, holds.counts.gradients) == (0, 0)
    assert (other.counts.steps, other.counts.gradients) == (16, 16)
    learner.fit(1)
    assert_same_bits(learner, copied)


def test_a_phase_goes_on_in_a_copy_from_where_it_was() -> None:
    class Every3(TrainingPhase):
        def __init__(self) -> None:
            self.n = 0

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            self.n += 1
            if self.n % 3:
                super().body(learner, handle, state)

    learner, phase = toy_learner(), Every3()
    learner.fit(1, phases=[phase], steps_per_epoch=4)
    copied = copy.deepcopy(learner)
    for each in (learner, copied):
        each.fit(1, phases=[phase if each is learner else Every3()])
    assert_same_bits(learner, copied)


def test_pickling_a_learner_says_what_to_do_instead() -> None:
    learner = toy_learner()
    learner.fit(1)
    with pytest.raises(CheckpointError, match=r"cannot be pickled; write its state, learner\.save\('state\.pt'\)"):
        pickle.dumps(learner)


@pytest.mark.filterwarnings("ignore")  # torch has a newer one, which can be copied
@pytest.mark.parametrize("copied", [copy.deepcopy, find_lr])
def test_a_model_that_torch_does_not_copy_is_told_with_what_to_use_instead(copied: Callable[[Learner], object]) -> None:
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(2, 2)), nn.Linear(2, 1))
    learner = Learner(model, mse_loss, data=((torch.ones(4, 2), torch.ones(4, 1)),), default_callbacks=False)
    learner.fit(1)
    model(torch.ones(4, 2))
    with pytest.raises(ModelError, match=r"cannot copy these weights: .*torch.nn.utils.parametrizations can be copied"):
        copied(learner)


# What it shows


def test_the_public_attributes_are_those_that_the_docstring_lists() -> None:
    told = inspect.getdoc(Learner) or ""
    section = told[told.index("Attributes:") : told.index("Raises:")]
    listed = set(re.findall(r"^    (\w+):", section, re.MULTILINE))
    learner = toy_learner()
    learner.fit(1)
    assert {name for name in vars(learner) if not name.startswith("_")} == listed


def test_every_public_method_and_property_says_what_it_does_those_of_its_bases_too() -> None:
    names = [name for name in dir(Learner) if not name.startswith("_")]
    assert {"fit", "add_callback", "save", "update", "cycle"} < set(names)
    assert [name for name in names if not inspect.getdoc(getattr(Learner, name))] == []
