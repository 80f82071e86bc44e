"""The checks of FluxTraining's own tests, with the behaviour fluxloop defines where the two differ."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    DataError,
    GarbageCollect,
    Learner,
    Metric,
    Metrics,
    MissingProducerError,
    ProgressBar,
    Recorder,
    SanityCheck,
    SanityCheckError,
    StateAccessError,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    Traces,
    TrainingPhase,
    ValidationPhase,
    accuracy,
    on,
    runepoch,
    runstep,
    throttle,
)
from fluxloop.testing import EventRecorder, bits, toy_learner


def first_batch(learner: Learner) -> Any:
    return next(iter(learner.data.training))


# training.jl


class OwnPhase(AbstractTrainingPhase):
    pass


def test_runstep_gives_a_state_that_holds_what_the_body_stored() -> None:
    learner, phase = toy_learner(), OwnPhase()
    with runepoch(learner, phase), runstep(learner, phase, xs=1) as (_, state):
        state.ys = 2
    assert (state.xs, state.ys) == (1, 2)
    assert learner.step is state


def test_an_epoch_cancelled_in_its_body_raises_nothing_and_ends() -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder)
    with runepoch(learner, OwnPhase()):
        raise CancelEpochException("enough")
    assert recorder.events == ["EpochBegin", "EpochEnd"]


def test_a_training_step_returns_its_entries_and_gradients() -> None:
    learner = toy_learner()
    xs, ys = first_batch(learner)
    state = TrainingPhase().step(learner, (xs, ys))
    assert {"xs", "ys", "preds", "loss", "grads"} <= set(vars(state))
    assert torch.equal(state.preds, torch.zeros_like(xs))
    assert state.loss.item() == pytest.approx(ys.mean().item())
    assert state.grads["value"].item() == pytest.approx(-xs.mean().item())
    assert learner.model.value.item() == pytest.approx(0.001 * xs.mean().item())


def test_a_validation_step_returns_the_same_without_gradients() -> None:
    learner = toy_learner()
    state = ValidationPhase().step(learner, first_batch(learner))
    assert set(vars(state)) == {"xs", "ys", "preds", "loss"}
    assert not state.loss.requires_grad
    assert learner.model.value.item() == 0


@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.001), partial(Adam, lr=0.05)], ids=["sgd", "adam"])
def test_the_toy_learner_comes_near_its_coefficient_in_five_epochs(optimizer: Any) -> None:
    learner = toy_learner(optimizer=optimizer)
    learner.fit(5)
    assert learner.model.value.item() == pytest.approx(3, abs=0.1)


# callbacks/recorder.jl


def test_the_recorder_counts_epochs_steps_and_steps_of_the_epoch() -> None:
    learner = toy_learner(Recorder())
    counts = learner.cbstate.history[TrainingPhase()]
    assert (counts.epochs, counts.steps_epoch, counts.steps) == (0, 0, 0)
    learner.fit(10)
    assert (counts.epochs, counts.steps_epoch, counts.steps) == (10, 16, 160)
    assert learner.cbstate.history[ValidationPhase].steps == 160


# callbacks/conditional.jl, and throttle


class CancelEverySecond(Callback):
    def __init__(self) -> None:
        self.begun = 0

    @on(StepBegin)
    def cancel(self, event: StepBegin, phase: Any, learner: Any) -> None:
        self.begun += 1
        if self.begun % 2 == 0:
            raise CancelStepException("every second")


def test_a_step_cancelled_when_it_begins_is_not_counted() -> None:
    learner = toy_learner(CancelEverySecond(), Recorder())
    learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase].steps == 8
    assert learner.history[TrainingPhase].epochs == 1
    assert learner.history[TrainingPhase].updates == {None: 8}


@pytest.mark.parametrize(
    ("every", "counted"), [({"freq": 2}, 8), ({"freq": 16}, 1), ({"seconds": 0}, 16), ({"seconds": 10}, 1)]
)
def test_a_throttled_recorder_counts_the_steps_that_pass(every: dict[str, int], counted: int) -> None:
    learner = toy_learner(throttle(Recorder(), StepEnd, **every))
    learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase].steps == counted
    assert learner.history[TrainingPhase].epochs == 1


@pytest.mark.parametrize("every", [{}, {"freq": 2, "seconds": 1}])
def test_throttle_wants_exactly_one_of_freq_and_seconds(every: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected exactly one of the two"):
        throttle(Recorder(), StepEnd, **every)


# callbacks/custom.jl


def test_a_hook_is_called_at_each_of_its_events() -> None:
    calls: list[Any] = []
    learner = toy_learner(CustomCallback(calls.append, StepBegin, TrainingPhase))
    learner.fit(1)
    assert len(calls) == 16


def test_a_hook_that_cancels_the_fitting_interrupts_the_epoch() -> None:
    def interrupt(learner: Any) -> None:
        raise CancelFittingException("test")

    learner = toy_learner(CustomCallback(interrupt, StepEnd), Recorder())
    with pytest.raises(CancelFittingException, match="test"):
        learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase].epochs == 0
    assert learner.history[TrainingPhase].steps == 1  # the step had ended: its other handlers run


# callbacks/stoponnanloss.jl


def nan_learner() -> Learner:
    batch = torch.ones(8, 1), torch.full((8, 1), torch.nan)
    return toy_learner(StopOnNaNLoss(), Recorder(), data=([batch] * 4,))


@pytest.mark.filterwarnings("ignore:the fit stops")
def test_a_fit_on_nan_data_returns_with_the_reason_and_clean_weights() -> None:
    learner = nan_learner()
    before = bits(learner)
    history = learner.fit(3)
    assert history.stop_reason == "the loss became nan in TrainingPhase(), epoch 1, step 1 of the run"
    assert history[TrainingPhase].epochs == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


@pytest.mark.filterwarnings("ignore:the fit stops")
def test_an_epoch_on_nan_data_raises_and_is_not_counted() -> None:
    learner = nan_learner()
    with pytest.raises(CancelFittingException, match="the loss became nan"):
        learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase].epochs == 0


class TwoCriticSteps(AbstractTrainingPhase):
    """The loss of the critic's second block is NaN."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (_, state):
            for name, factor in (("critic", 1.0), ("generator", 1.0), ("critic", torch.nan)):
                with learner.optimizing(name) as block:
                    block.loss = factor * getattr(learner.model, name)(state.xs).sum()


@pytest.mark.filterwarnings("ignore:the fit stops")
def test_a_nan_loss_of_a_later_block_ends_the_fit_before_it_reaches_the_weights() -> None:
    models = {"critic": nn.Linear(1, 1), "generator": nn.Linear(1, 1)}
    data = ([torch.ones(2, 1)],)
    learner = Learner(models, data=data, default_callbacks=False, callbacks=[StopOnNaNLoss(), Recorder()])
    history = learner.fit(3, phases=[TwoCriticSteps()])
    assert history.stop_reason == "the loss of 'critic' became nan in TwoCriticSteps(), epoch 1, step 1 of the run"
    assert history[TwoCriticSteps].updates == {"critic": 1, "generator": 1}
    assert all(torch.isfinite(p).all() for p in models["critic"].parameters())


# callbacks/sanitycheck.jl


def test_each_default_check_passes_on_the_toy_learner() -> None:
    learner, checks = toy_learner(), SanityCheck().checks
    for check in checks:
        check.run(learner)  # raises where it fails
    assert [check.name for check in checks] == [
        "training data",
        "validation data",
        "parameters are finite",
        "model and loss on one batch",
    ]


def test_a_learner_that_passes_its_checks_trains() -> None:
    learner = toy_learner(SanityCheck())
    assert len(learner.get_callback(SanityCheck).checks) == 4
    assert learner.fit(1).cycles == 1
    assert learner.model.value.item() != 0


def test_missing_training_data_fails_the_fit_and_the_check() -> None:
    learner = toy_learner(SanityCheck(), data=())
    with pytest.raises(DataError, match="TrainingPhase runs on the 'training' data, and there is no data"):
        learner.fit(1)
    with pytest.raises(ValueError, match="the learner has no training data"):
        SanityCheck().checks[0].run(learner)


class SaysText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, xs: Tensor) -> str:
        return "text"


def one_argument(preds: Tensor) -> Tensor:
    return preds.mean()


PAIRS = [(torch.ones(8, 1), torch.ones(8, 1))]


@pytest.mark.parametrize(
    ("model", "loss_fn", "data", "words"),
    [
        (nn.Linear(1, 1), nn.functional.l1_loss, [torch.ones(8, 1)], r"a batch is a Tensor .*, not a pair \(xs, ys\)"),
        (SaysText(), nn.functional.l1_loss, PAIRS, "error: model and loss on one batch: .*str"),
        (nn.Linear(1, 1), one_argument, PAIRS, "takes 1 positional argument but 2 were given"),
        (nn.Linear(1, 1), lambda preds, ys: "text", PAIRS, "the loss of one batch is a str, not a scalar tensor"),
    ],
    ids=["items are no pairs", "the model returns text", "the loss takes one argument", "the loss is text"],
)
def test_a_failed_check_ends_the_fit_before_its_first_step(model: Any, loss_fn: Any, data: Any, words: str) -> None:
    recorder = EventRecorder()
    learner = Learner(model, loss_fn, data=(data, data), default_callbacks=False, callbacks=[SanityCheck(), recorder])
    with pytest.raises(SanityCheckError, match=words):
        learner.fit(1)
    assert "StepBegin" not in recorder.events
    assert recorder.events[-1] == "FitEnd"


def test_the_checks_look_at_the_data_that_was_passed_to_fit() -> None:
    learner = toy_learner(SanityCheck(), data=())
    data = TensorBatches(torch.ones(8, 1), torch.ones(8, 1), batch_size=4)
    assert learner.fit(1, (data, data)).cycles == 1


# callbacks/garbagecollect.jl


def test_garbage_is_collected_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    toy_learner(GarbageCollect(every=5)).epoch(TrainingPhase())
    assert len(collected) == 3


# callbackutils.jl, and learner.jl on an empty learner


def empty_learner() -> Learner:
    return Learner(nn.Linear(1, 1), default_callbacks=False)


def test_callbacks_are_added_found_and_removed() -> None:
    learner, recorder = empty_learner(), Recorder()
    assert learner.get_callback(Recorder) is None
    assert learner.remove_callback(Recorder) is None
    learner.add_callback(recorder)
    assert learner.get_callback(Recorder) is recorder
    assert learner.remove_callback(Recorder) is recorder
    assert list(learner.callbacks) == []


def test_replacing_a_callback_gives_the_old_one_and_adds_it_where_there_is_none() -> None:
    learner = empty_learner()
    first, second = GarbageCollect(10), GarbageCollect(20)
    assert learner.replace_callback(first) is None
    assert learner.replace_callback(second) is first
    assert list(learner.callbacks) == [second]


def test_setting_callbacks_puts_them_in_the_place_of_all() -> None:
    learner = Learner(nn.Linear(1, 1))
    assert learner.get_callback(ProgressBar) is not None
    collect = GarbageCollect()
    learner.set_callbacks([collect])
    assert list(learner.callbacks) == [collect]


def test_a_callback_that_another_one_needs_is_not_removed() -> None:
    learner = toy_learner(Recorder(), Metrics())
    with pytest.raises(MissingProducerError, match=r"Metrics reads 'cbstate.history', .* add Recorder\(\)"):
        learner.remove_callback(Recorder)
    assert learner.callbacks.order == ["Recorder", "Metrics"]


# src/callbacks/protect.jl


class Toucher(Callback):
    """Do something with the learner at each step, and keep what comes of it."""

    def __init__(self, touch: Any, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()) -> None:
        self.touch, self.reads, self.writes = touch, reads, writes

    @on(StepEnd)
    def do(self, event: StepEnd, phase: Any, learner: Any) -> None:
        self.result = self.touch(learner)


def set_loss(learner: Any) -> Tensor:
    learner.step.loss = torch.tensor(-1.0)
    loss: Tensor = learner.step.loss
    return loss


def set_preds(learner: Any) -> None:
    learner.step.preds = torch.zeros(())


def read_loss(learner: Any) -> Any:
    return learner.step.loss


@pytest.mark.parametrize(
    ("touch", "access"),
    [
        (read_loss, {"reads": ("step",)}),
        (read_loss, {"reads": ("step.loss",)}),
        (read_loss, {"writes": ("step.loss",)}),
        (set_loss, {"writes": ("step",)}),
        (set_loss, {"writes": ("step.loss",)}),
    ],
)
def test_what_is_declared_is_allowed(touch: Any, access: dict[str, tuple[str, ...]]) -> None:
    toucher = Toucher(touch, **access)
    learner = toy_learner(toucher)
    learner.epoch(TrainingPhase())
    assert torch.equal(toucher.result, learner.step.loss)
    assert (learner.step.loss.item() == -1) == (touch is set_loss)


@pytest.mark.parametrize(
    ("touch", "access", "words"),
    [
        (read_loss, {}, "Toucher tried to read 'step.loss' at StepEnd"),
        (read_loss, {"reads": ("model",)}, "tried to read 'step.loss' at StepEnd"),
        (read_loss, {"reads": ("step.preds",)}, "tried to read 'step.loss' at StepEnd"),
        (set_loss, {"reads": ("step",)}, "tried to write 'step.loss' at StepEnd"),
        (set_loss, {"reads": ("step.loss",)}, "tried to write 'step.loss' at StepEnd"),
        (set_preds, {"writes": ("step.loss",)}, "tried to write 'step.preds' at StepEnd"),
        (set_preds, {"reads": ("step",), "writes": ("step.loss",)}, "tried to write 'step.preds' at StepEnd"),
    ],
)
def test_what_is_not_declared_is_refused(touch: Any, access: dict[str, tuple[str, ...]], words: str) -> None:
    learner = toy_learner(Toucher(touch, **access))
    with pytest.raises(StateAccessError, match=words):
        learner.epoch(TrainingPhase())


# src/callbacks/metrics.jl and trace.jl


def test_a_metric_with_a_phase_is_recorded_there_alone_for_steps_and_epochs() -> None:
    latest: dict[str, set[str]] = {}

    class Watch(Callback):
        reads = ("cbstate.metrics",)

        @on(StepEnd)
        def keep(self, event: StepEnd, phase: Any, learner: Any) -> None:
            latest[type(phase).__name__] = set(learner.cbstate.metrics[phase].latest())

    metric = Metric(lambda preds, ys: (preds - ys).abs().mean(), name="gap", phase=TrainingPhase)
    learner = toy_learner(Recorder(), Metrics(metric), Watch())
    learner.fit(3)
    metrics = learner.cbstate.metrics
    assert latest == {"TrainingPhase": {"loss", "gap"}, "ValidationPhase": {"loss"}}
    assert [epoch for epoch, _ in metrics[TrainingPhase].epochs["gap"]] == [1, 2, 3]
    assert list(metrics[ValidationPhase].epochs) == ["loss"]
    assert len(metrics[ValidationPhase].epochs["loss"]) == 3


def test_traces_are_recorded_in_their_phase_alone() -> None:
    functions = {"loss": lambda learner: learner.step.loss, "rows": lambda learner: len(learner.step.xs)}
    learner = toy_learner(Traces(functions, phase=ValidationPhase), Recorder(), num_batches=3)
    learner.fit(2)
    traces = learner.cbstate.traces
    assert traces[TrainingPhase] == {}
    assert traces[ValidationPhase]["rows"] == [(step, 8) for step in range(1, 7)]
    step, loss = traces[ValidationPhase]["loss"][-1]
    assert step == 6
    assert torch.equal(loss, learner.step.loss)


# metrics.jl


def test_accuracy_is_one_for_exact_and_for_soft_one_hot_scores() -> None:
    exact = torch.eye(4)[torch.tensor([0, 3, 1, 1, 2])]
    soft = 0.1 + 0.6 * exact
    for preds in (exact, soft):
        assert accuracy(preds, exact).item() == 1
        assert accuracy(preds, exact.argmax(1)).item() == 1
        assert accuracy(preds, soft).item() == 1
    assert accuracy(exact, exact.roll(1, 1)).item() == 0
