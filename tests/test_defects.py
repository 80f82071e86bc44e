"""Defects of FluxTraining.jl (D-FT) and luz (D-LZ) that cannot happen here, one test for each."""

from __future__ import annotations

import ast
import io
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAUROC

import fluxloop
from fluxloop import (
    AbstractTrainingPhase,
    Callback,
    CallbackConflictError,
    CallbackCycleError,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    Check,
    CustomCallback,
    DataError,
    EpochBegin,
    EpochEnd,
    FitBegin,
    FitEnd,
    GarbageCollect,
    HandlerError,
    Learner,
    LossBegin,
    Metric,
    MetricError,
    Metrics,
    MissingProducerError,
    PerOptimizerPhase,
    Phase,
    ProgressBar,
    Recorder,
    RunFirst,
    SanityCheck,
    SmoothLoss,
    StateAccessError,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UpdateBegin,
    ValidationPhase,
    accuracy,
    as_dataloader,
    on,
    resolve_conflict,
    runstep,
    split,
)
from fluxloop.testing import EventRecorder, assert_order, bits, toy_learner

TESTS = Path(__file__).parent
SOURCES = Path(fluxloop.__file__).parent


class Writer(Callback):
    """Writes ``cbstate.things``."""

    writes = ("cbstate.things",)

    def __init__(self, things: Any = 0) -> None:
        self.things = things

    def init(self, learner: Any) -> None:
        learner.cbstate.things = self.things


class OtherWriter(Writer):
    """Another one."""


class Reader(Callback):
    """Does something with ``cbstate.things`` at each step."""

    reads = ("cbstate.things",)

    def __init__(self, touch: Callable[[Any], object] = lambda things: None) -> None:
        self.touch = touch

    @on(StepEnd)
    def look(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.touch(learner.cbstate.things)


# FluxTraining: the graph


def test_handlers_are_looked_up_once_and_not_at_every_event() -> None:
    asked: list[tuple[str, str]] = []

    class Counting(Callback):
        @on(StepEnd)
        def look(self, event: StepEnd, phase: Phase, learner: Any) -> None: ...

        def handler(self, event: Any, phase: Any) -> Any:
            asked.append((event.__name__, phase.__name__))
            return super().handler(event, phase)

    toy_learner(Counting()).fit(3)
    assert ("StepEnd", "TrainingPhase") in asked
    assert len(asked) == len(set(asked))


def test_a_cycle_is_an_error_at_construction_that_prints_it() -> None:
    class First(Callback):
        pass

    class Second(Callback):
        run_after = (First,)

    First.run_after = (Second,)
    with pytest.raises(CallbackCycleError) as caught:
        toy_learner(First(), Second())
    assert "First before Second: Second declares run_after = First" in str(caught.value)
    assert "Second before First: First declares run_after = Second" in str(caught.value)

    class Own(Callback):
        pass

    Own.run_after = (Own,)
    with pytest.raises(CallbackCycleError, match="Own before Own: Own declares run_after = Own"):
        toy_learner(Own())


def test_reading_what_nobody_writes_is_an_error_at_construction() -> None:
    with pytest.raises(
        MissingProducerError, match=r"Reader reads 'cbstate.things', which no callback writes; add .*Writer"
    ):
        toy_learner(Reader())
    assert_order(toy_learner(Reader(), Writer()), Writer, Reader)


def test_a_resolution_said_one_way_round_counts_both_ways() -> None:
    class Left(Writer):
        pass

    class Right(Writer):
        pass

    with pytest.raises(
        CallbackConflictError, match=r"^Left writes .* and Right writes .* nothing says which goes first"
    ):
        toy_learner(Left(), Right())

    @resolve_conflict.register(Right, Left)
    def _(a: Right, b: Left) -> RunFirst:
        return RunFirst(b)

    assert_order(toy_learner(Left(), Right()), Left, Right)
    assert_order(toy_learner(Right(), Left()), Left, Right)


def test_two_writers_can_be_ordered_with_run_first() -> None:
    @resolve_conflict.register(Writer, OtherWriter)
    def _(a: Writer, b: OtherWriter) -> RunFirst:
        return RunFirst(b)

    learner = toy_learner(Writer(1), OtherWriter(2))
    assert_order(learner, OtherWriter, Writer)
    assert learner.cbstate.things == 1


def test_an_order_through_a_third_callback_settles_a_conflict() -> None:
    class Earliest(Writer):
        pass

    class Between(Callback):
        run_after = (Earliest,)

    class Latest(Writer):
        run_after = (Between,)

    assert_order(toy_learner(Latest(), Between(), Earliest()), Earliest, Between, Latest)
    with pytest.raises(CallbackConflictError):
        toy_learner(Latest(), Earliest())


# FluxTraining: access


def test_declared_paths_of_one_branch_all_hold() -> None:
    seen: list[Any] = []

    def touch(learner: Any) -> None:
        learner.cbstate.first = learner.step.xs
        learner.cbstate.second = learner.step.ys
        learner.step.loss = learner.step.preds.mean()
        seen.append(learner.cbstate.first is learner.step.xs)

    callback = CustomCallback(
        touch,
        StepEnd,
        reads=("step.xs", "step.ys", "step.preds"),
        writes=("cbstate.first", "cbstate.second", "step.loss"),
    )
    toy_learner(callback, num_batches=2).epoch(TrainingPhase())
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("things", "change"),
    [
        ({}, lambda things: things.update(a=1)),
        ([], lambda things: things.append(1)),
        ({"a": []}, lambda things: things["a"].append(1)),
        (([],), lambda things: things[0].append(1)),
        (set(), lambda things: things.add(1)),
        (OrderedDict(), lambda things: things.update(a=1)),
        (defaultdict(list), lambda things: things["a"].append(1)),
    ],
    ids=["dict", "list", "list in a dict", "list in a tuple", "set", "OrderedDict", "defaultdict"],
)
def test_who_declared_to_read_a_container_cannot_change_it(things: Any, change: Callable[[Any], object]) -> None:
    before = deepcopy(things)
    learner = toy_learner(Writer(things), Reader(change))
    with pytest.raises(StateAccessError, match=r"Reader tried to write 'cbstate\.things"):
        learner.epoch(TrainingPhase())
    assert learner.cbstate.things == before


def test_asking_whether_an_entry_is_there_is_an_access() -> None:
    learner = toy_learner(CustomCallback(lambda learner: "loss" in learner.step, StepEnd, reads=("step.xs",)))
    with pytest.raises(StateAccessError, match=r"tried to read 'step\.loss' at StepEnd"):
        learner.epoch(TrainingPhase())


# FluxTraining: the learner


def test_parameters_and_optimizers_have_the_names_of_the_models() -> None:
    models = {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)}
    learner = Learner(models)  # the default optimizer
    assert learner.optimizer._fields == learner.params._fields == learner.model._fields == ("generator", "critic")
    for name, model in models.items():
        held = getattr(learner.optimizer, name).param_groups[0]["params"]
        assert [id(p) for p in held] == [id(p) for p in model.parameters()]
        assert [id(p) for p in getattr(learner.params, name)] == [id(p) for p in model.parameters()]


def test_data_may_be_training_data_alone() -> None:
    data = TensorBatches(torch.ones(8, 1), torch.ones(8, 1), batch_size=4)
    recorder = EventRecorder()
    learner = toy_learner(recorder, Recorder(), data=(data,))
    learner.fit(1)
    assert learner.history[TrainingPhase].steps == 2
    assert {phase for _, phase in recorder.trace} == {"FittingPhase", "TrainingPhase"}


def test_early_stop_returns_normally_with_its_reason_and_all_end_events() -> None:
    recorder = EventRecorder()

    class AStop(Callback):
        """Runs before the others that nothing orders."""

        @on(EpochEnd, TrainingPhase)
        def stop(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
            raise CancelFittingException("good enough")

    learner = toy_learner(AStop(), recorder, Recorder(), Metrics())
    history = learner.fit(10)
    assert history.stop_reason == "good enough"
    assert history[TrainingPhase].epochs == len(history["training/loss"]) == 1
    assert recorder.events[-2:] == ["EpochEnd", "FitEnd"]
    assert learner.fit(0).stop_reason is None


def test_loss_begin_is_fired_in_validation() -> None:
    seen: list[set[str]] = []
    look = CustomCallback(lambda learner: seen.append(set(learner.step)), LossBegin, ValidationPhase)
    recorder = EventRecorder()
    toy_learner(look, recorder, num_batches=1).epoch(ValidationPhase())
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    assert seen == [{"xs", "ys", "preds"}]


class Acquires(Callback):
    """Holds something from StepBegin to the end of the step, whatever end that is."""

    def __init__(self) -> None:
        self.held = 0
        self.log: list[int] = []

    @on(StepBegin)
    def acquire(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        self.held += 1
        self.log.append(self.held)
        learner.defer(self.release)

    def release(self) -> None:
        self.held -= 1


@pytest.mark.parametrize("event", [StepBegin, LossBegin, StepEnd])
@pytest.mark.parametrize("signal", [CancelStepException, CancelEpochException, CancelFittingException, RuntimeError])
def test_what_a_step_acquired_is_released_when_it_is_cancelled(event: Any, signal: Any) -> None:
    def cancel(learner: Any) -> None:
        raise signal("now")

    acquires = Acquires()
    learner = toy_learner(acquires, CustomCallback(cancel, event, TrainingPhase), num_batches=2)
    if signal is RuntimeError:
        with pytest.raises(RuntimeError, match="now"):
            learner.fit(1)
    else:
        learner.fit(1)
    assert acquires.log
    assert set(acquires.log) == {1}
    assert acquires.held == 0


def test_an_epoch_cancelled_at_its_end_ends_once_and_the_cancel_does_not_escape() -> None:
    def cancel(learner: Any) -> None:
        raise CancelEpochException("at the end")

    recorder = EventRecorder()
    learner = toy_learner(recorder, Recorder(), CustomCallback(cancel, EpochEnd, TrainingPhase), num_batches=1)
    learner.epoch(TrainingPhase())
    assert recorder.events.count("EpochEnd") == 1
    assert learner.fit(2).cycles == 2
    assert learner.history[TrainingPhase].epochs == 3


def shared_step(phase: Any, learner: Learner, batch: Any) -> None:
    with runstep(learner, phase, xs=batch[0], ys=batch[1]) as (_, state):
        state.preds = learner.model(state.xs)


class Mixin:
    step = shared_step


class InheritedStep(Mixin, AbstractTrainingPhase):
    pass


class AssignedStep(AbstractTrainingPhase):
    step = shared_step


class DecoratedStep(AbstractTrainingPhase):
    @wraps(shared_step)
    def step(self, learner: Learner, batch: Any) -> None:
        shared_step(self, learner, batch)


@pytest.mark.parametrize("phase", [InheritedStep(), AssignedStep(), DecoratedStep()], ids=repr)
def test_a_step_cancelled_when_it_begins_ends_there_however_its_phase_came_to_it(phase: Phase) -> None:
    def cancel(learner: Any) -> None:
        raise CancelStepException("not this one")

    recorder = EventRecorder()
    learner = toy_learner(recorder, CustomCallback(cancel, StepBegin), num_batches=2)
    learner.fit(1, phases=[phase])
    assert recorder.events[2:-2] == ["EpochBegin", "StepBegin", "StepBegin", "EpochEnd"]


class ClipTo(Callback):
    """Clip the gradients' norm."""

    writes = ("model",)

    @on(UpdateBegin)
    def clip(self, event: UpdateBegin, phase: Phase, learner: Any) -> None:
        nn.utils.clip_grad_norm_(learner.model.parameters(), 0.5)


def test_a_fit_has_events_clipping_has_a_place_and_prediction_exists() -> None:
    recorder, (xs, ys) = EventRecorder(), (torch.randn(20, 3), torch.randn(20, 1))
    model = nn.Linear(3, 1)
    own = deepcopy(model)
    learner = Learner(
        model,
        mse_loss,
        data=([(xs, ys)],),
        optimizer=partial(SGD, lr=0.1),
        callbacks=[ClipTo(), recorder],
        default_callbacks=False,
    )
    learner.fit(2)
    optimizer = SGD(own.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        mse_loss(own(xs), ys).backward()
        assert nn.utils.clip_grad_norm_(own.parameters(), 0.5) > 0.5
        optimizer.step()

    assert torch.equal(model.weight, own.weight)
    fit_events = [event for event, phase in recorder.trace if phase == "FittingPhase"]
    assert fit_events == ["FitBegin", *["CycleBegin", "CycleEnd"] * 2, "FitEnd"]
    torch.testing.assert_close(learner.predict(xs), own(xs).detach())


# FluxTraining: callbacks


class FedLoss(AbstractTrainingPhase):
    """The loss of each step is the batch's number."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (_, state):
            state.loss = state.xs.mean()


class SmoothWatch(Callback):
    """Keep the smooth loss after each step: of the epoch so far, and as the step's value."""

    reads = ("cbstate.metrics",)

    def __init__(self) -> None:
        self.running: list[float] = []
        self.latest: list[float] = []

    @on(StepEnd)
    def keep(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        metrics = learner.cbstate.metrics[phase]
        self.running.append(metrics.running()["smoothloss"].item())
        self.latest.append(metrics.latest()["smoothloss"].item())


def watch_smooth_loss(losses: list[float]) -> SmoothWatch:
    watch, data = SmoothWatch(), [torch.full((4,), loss) for loss in losses]
    toy_learner(Recorder(), Metrics(SmoothLoss()), watch, data=(data,)).fit(1, phases=[FedLoss()])
    return watch


def test_the_smooth_loss_gives_the_past_most_of_the_weight() -> None:
    losses = [float(i % 2) for i in range(200)]  # 0, 1, 0, 1, …
    running = watch_smooth_loss(losses).running
    value = weight = 0.0
    for smooth, loss in zip(running, losses, strict=True):
        value, weight = 0.98 * value + 0.02 * loss, 0.98 * weight + 0.02
        assert smooth == pytest.approx(value / weight, abs=1e-6)
    assert all(abs(smooth - 0.5) < 0.02 for smooth in running[100:])


def test_the_smooth_loss_is_smooth_as_a_steps_value_too() -> None:
    watch = watch_smooth_loss([0.0, 1.0, 0.0, 1.0])
    assert watch.latest == pytest.approx(watch.running)


def test_epoch_metrics_are_weighted_by_batch_size() -> None:
    data = [torch.zeros(9), torch.full((1,), 10.0)]
    mean = Metric(lambda xs: xs.mean(), name="mean", inputs=("xs",))
    learner = toy_learner(Recorder(), Metrics(mean), data=(data,))
    history = learner.fit(1, phases=[FedLoss()])
    assert history["training/loss"] == history["training/mean"] == [1.0]


@pytest.mark.parametrize("level", ["steps", "epoch"])
def test_an_epoch_without_a_finished_step_records_no_metric(level: str) -> None:
    class ACancel(Callback):
        """In the second epoch, before the others that nothing orders."""

        epochs = 0

        @on(EpochBegin, TrainingPhase)
        def begin(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
            self.epochs += 1
            if self.epochs == 2 and level == "epoch":
                raise CancelEpochException("not this one")

        @on(LossBegin, TrainingPhase)
        def cancel(self, event: LossBegin, phase: Phase, learner: Any) -> None:
            if self.epochs == 2:
                raise CancelStepException("nor this one")

    learner = toy_learner(ACancel(), Recorder(), Metrics())
    history = learner.fit(3, phases=[TrainingPhase()])
    assert history[TrainingPhase].epochs == 3
    assert [row["epoch"] for row in history.rows()] == [1, 3]
    assert history[TrainingPhase].steps == 32


def test_new_callbacks_are_initialised_and_the_runner_stays() -> None:
    initialised: list[str] = []

    class Counts(Callback):
        def __init__(self, label: str) -> None:
            self.label = label

        def init(self, learner: Any) -> None:
            initialised.append(self.label)

    learner, recorder = toy_learner(), EventRecorder()
    runner = learner.callbacks
    first = Counts("first")
    learner.set_callbacks([first, recorder])
    learner.add_callback(GarbageCollect())
    assert learner.replace_callback(Counts("second")) is first
    learner.remove_callback(GarbageCollect)
    assert initialised == ["first", "second"]
    assert learner.callbacks is runner
    learner.replace_callback(Recorder())
    learner.epoch(TrainingPhase())
    assert learner.history[TrainingPhase].epochs == 1
    assert recorder.events[0] == "EpochBegin"


def test_missing_validation_data_is_a_warning_and_own_checks_keep_the_default_ones() -> None:
    ran: list[str] = []
    check = SanityCheck(Check("mine", lambda learner: ran.append("mine")))
    data = TensorBatches(torch.ones(8, 1), torch.ones(8, 1), batch_size=4)
    learner = toy_learner(check, data=(data,))
    assert ran == []
    with pytest.warns(UserWarning, match="warning: validation data: the learner has no validation data"):
        learner.fit(1)
    assert ran == ["mine"]
    assert [c.name for c in check.checks] == [*(c.name for c in SanityCheck().checks), "mine"]


def bar_text(run: Callable[[Learner], object], **options: Any) -> str:
    file = io.StringIO()
    run(toy_learner(ProgressBar(enabled=True, interval=0.0, file=file), **options))
    return file.getvalue()


def test_the_bar_works_without_a_recorder() -> None:
    text = bar_text(lambda learner: learner.fit(1))
    assert "TrainingPhase" in text
    assert "ValidationPhase" in text
    assert "/16" in text


def test_the_bar_works_for_data_without_a_length() -> None:
    def batches() -> Iterator[Any]:
        for _ in range(3):
            yield torch.ones(2, 1), torch.ones(2, 1)

    text = bar_text(lambda learner: learner.epoch(TrainingPhase(), batches()))
    assert "0batch" in text
    assert "/16" not in text


def test_the_bar_measures_the_data_that_was_passed() -> None:
    data = TensorBatches(torch.ones(10, 1), torch.ones(10, 1), batch_size=2)
    text = bar_text(lambda learner: learner.epoch(TrainingPhase(), data))
    assert "/5" in text
    assert "/16" not in text


def test_an_error_in_a_handler_says_where_it_was_raised_and_keeps_its_type() -> None:
    class Fails(Callback):
        @on(StepEnd, ValidationPhase)
        def fail(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            raise ZeroDivisionError("oh")

    learner = toy_learner(Fails())
    with pytest.raises(ZeroDivisionError) as caught:
        learner.fit(3)
    assert str(caught.value) == "oh"
    assert caught.value.__notes__ == [
        "fluxloop: raised by Fails at StepEnd of ValidationPhase()",
        "fluxloop: in ValidationPhase(), epoch 1, step 1 of the run (both counted from 1)",
    ]


def test_every_file_with_tests_is_collected_and_no_collected_file_is_empty() -> None:
    for path in sorted(TESTS.rglob("*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        has_tests = any(function.name.startswith("test_") for function in functions)
        assert has_tests == path.name.startswith("test_"), path.name


# luz


class OwnLosses(PerOptimizerPhase):
    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        loss: Tensor = learner.loss_fn(state.preds, state.ys)
        return loss + 100 * sum(p.sum() for p in learner.model.parameters()) if name == "0" else loss


def test_no_gradient_leaks_from_one_optimizers_loss_into_anothers_update() -> None:
    model, xs, ys = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), torch.randn(8, 1), torch.randn(8, 1)
    own = deepcopy(model)
    optimizers = {"0": partial(SGD, lr=0.1), "1": partial(SGD, lr=0.1)}
    learner = Learner(model, mse_loss, data=([(xs, ys)],), optimizer=optimizers, default_callbacks=False)
    learner.fit(1, phases=[OwnLosses()])
    with torch.no_grad():  # what the first optimizer did
        own[0].weight.copy_(model[0].weight)
        own[0].bias.copy_(model[0].bias)
    mse_loss(own(xs), ys).backward()
    SGD(own[1].parameters(), lr=0.1).step()
    assert torch.equal(model[1].weight, own[1].weight)
    assert torch.equal(model[1].bias, own[1].bias)


def test_a_misspelt_event_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(HandlerError, match=r"on_batch_end looks like a handler but nothing calls it; expected @on"):

        class OneCycle(Callback):
            def on_batch_end(self) -> None: ...

    with pytest.raises(HandlerError, match=r"'StepEndd' as an event; .*did you mean 'StepEnd'\?"):
        on("StepEndd")
    with pytest.raises(HandlerError, match="'StepEnd' as an event; expected a type"):
        CustomCallback(print, "StepEnd")
    with pytest.raises(AttributeError, match=r"fluxloop has no 'StepBegn'; did you mean 'StepBegin'\?"):
        fluxloop.StepBegn  # noqa: B018


@pytest.mark.parametrize("fraction", [0, 0.0, 1.0, -0.1])
def test_a_validation_share_that_leaves_nothing_is_an_error(fraction: float) -> None:
    with pytest.raises(DataError, match="expected a share above 0 and below 1"):
        split(torch.arange(10), fraction)
    rest, part = split(torch.arange(10), 0.01)
    assert (len(rest), len(part)) == (9, 1)


def test_fewer_rows_than_a_batch_with_drop_last_is_an_error() -> None:
    xs, ys = torch.ones(5, 1), torch.ones(5, 1)
    with pytest.raises(DataError, match="5 rows make no full batch of 8"):
        TensorBatches(xs, ys, batch_size=8, drop_last=True)
    loader = DataLoader(TensorDataset(xs, ys), batch_size=8, drop_last=True)
    recorder = EventRecorder()
    with pytest.raises(DataError, match="gave no batch; expected at least one: fewer rows than batch_size"):
        toy_learner(recorder, data=(loader,)).fit(1)
    assert recorder.events == []
    with pytest.raises(DataError, match="gave no batch"):
        toy_learner().epoch(TrainingPhase(), iter(()))


class RowStream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(10, 1))


def test_options_of_a_loader_hold_for_every_kind_of_data_or_are_refused() -> None:
    xs = torch.arange(10.0).reshape(10, 1)
    for data in (xs, xs.numpy(), (xs, xs), {"xs": xs}, TensorDataset(xs)):
        loader: Any = as_dataloader(data, batch_size=4, drop_last=True)
        assert len(loader) == len(list(loader)) == 2
    with pytest.raises(DataError, match=r"\['num_workers'\] were given for tensors in memory"):
        as_dataloader(xs, num_workers=2)
    with pytest.raises(DataError, match="shuffle=True was given for an IterableDataset"):
        as_dataloader(RowStream(), shuffle=True)


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"shuffle": True}, {"drop_last": True}])
def test_options_for_what_makes_batches_already_are_refused(options: dict[str, Any]) -> None:
    rows = TensorDataset(torch.ones(10, 1))
    for loader in (DataLoader(rows, batch_size=5, shuffle=True), [torch.ones(5, 1)]):
        with pytest.raises(DataError, match=r"options were given for .*, which already makes batches"):
            as_dataloader(loader, **options)
        assert as_dataloader(loader) is loader


class Rows:
    """A data set that is no `Dataset`."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((1,), float(index))


def test_options_hold_for_whatever_gives_rows_by_their_number() -> None:
    loader: Any = as_dataloader(Rows(), batch_size=4, drop_last=True)
    assert len(loader) == 2


def test_the_loss_is_that_of_all_rows_and_auroc_of_several_classes_takes_logits() -> None:
    xs = torch.randn(100, 4)
    ys = (xs @ torch.randn(4, 3)).argmax(1)
    learner = Learner(
        nn.Linear(4, 3),
        cross_entropy,
        data=((xs, ys), (xs, ys)),  # batches of 32: the last has 4 rows
        callbacks=[Recorder(), Metrics(Metric(MulticlassAUROC(3), name="auroc"))],
        default_callbacks=False,
    )
    history = learner.fit(1)
    with torch.no_grad():
        logits = learner.model(xs)
    loss = cross_entropy(logits, ys).item()
    assert history["validation/loss"] == [pytest.approx(loss, rel=1e-6)]
    assert learner.evaluate()["loss"] == pytest.approx(loss, rel=1e-6)
    assert history["validation/auroc"] == [pytest.approx(MulticlassAUROC(3)(logits, ys).item())]


@pytest.mark.parametrize(
    "metrics",
    [
        (accuracy, accuracy),
        (Metric(accuracy, name="Share"), Metric(accuracy, name="share")),
        (Metric(accuracy, name="loss"),),
    ],
)
def test_two_metrics_of_one_name_are_an_error(metrics: tuple[Any, ...]) -> None:
    with pytest.raises(MetricError, match="two metrics are called"):
        Metrics(*metrics)


def test_a_collection_cannot_take_the_name_of_another_metric() -> None:
    collection = torchmetrics.MetricCollection({"accuracy": torchmetrics.classification.MulticlassAccuracy(3)})
    learner = Learner(
        nn.Linear(4, 3),
        cross_entropy,
        data=((torch.randn(8, 4), torch.randint(3, (8,))),),
        callbacks=[Recorder(), Metrics(accuracy, collection)],
        default_callbacks=False,
    )
    with pytest.raises(MetricError, match="two metrics are called 'accuracy'"):
        learner.fit(1)


def raise_error(error: BaseException) -> Callable[[Any], None]:
    def fail(learner: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("event", [FitBegin, EpochBegin, StepBegin, StepEnd, EpochEnd])
@pytest.mark.parametrize("error", [ValueError("oh"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_fit_that_fails_or_is_interrupted_anywhere_still_ends(event: Any, error: BaseException) -> None:
    ends: list[FitEnd] = []

    class Ends(Callback):
        @on(FitEnd)
        def keep(self, event: FitEnd, phase: Phase, learner: Any) -> None:
            ends.append(event)

    learner = toy_learner(Ends(), CustomCallback(raise_error(error), event))
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="oh"):
            learner.fit(1)
        assert [(end.reason, end.error) for end in ends] == [(None, error)]
    else:
        assert learner.fit(1).stop_reason == "interrupted (Ctrl+C)"
        assert [(end.reason, end.error) for end in ends] == [("interrupted (Ctrl+C)", None)]
    assert learner.scope is None


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_an_interrupted_evaluation_or_prediction_leaves_the_learner_as_it_was(call: str) -> None:
    def batches() -> Iterator[Any]:
        yield torch.ones(2, 1), torch.ones(2, 1)
        raise KeyboardInterrupt

    learner = toy_learner(Recorder(), Metrics())
    learner.model.train()
    learner.fit(1)
    before, step, rows, order = bits(learner), learner.step, learner.history.rows(), learner.callbacks.order
    with pytest.raises(KeyboardInterrupt):
        getattr(learner, call)(batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())
    assert (learner.step, learner.history.rows(), learner.callbacks.order) == (step, rows, order)
    assert learner.model.training
    assert learner.scope is None
    assert learner.fit(1).cycles == 2


PLACEHOLDER = re.compile(r"\{[A-Za-z_][\w.]*(\([^)]*\))?(!r)?(:[^}\s]*)?\}|%[sdr]")


def wrong_uses() -> dict[str, Callable[[], object]]:
    xs, model = torch.ones(4, 1), nn.Linear(1, 1)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    toy = toy_learner

    def taught(touch: Callable[[Any], object], **access: Any) -> Callable[[], object]:
        return lambda: toy(CustomCallback(touch, StepEnd, **{"reads": (), **access})).epoch(TrainingPhase())

    return {
        "model": lambda: Learner("model"),
        "model class": lambda: Learner(nn.Linear),
        "model name": lambda: Learner({"a b": model}),
        "no model": lambda: Learner({}),
        "model twice": lambda: Learner({"a": model, "b": model}),
        "loss class": lambda: Learner(model, nn.MSELoss),
        "seed": lambda: Learner(model, seed=-1),
        "optimizer": lambda: Learner(model, optimizer=3),
        "optimizer name": lambda: Learner(model, optimizer={"nobody": Adam}),
        "foreign": lambda: Learner(model, optimizer=SGD([nn.Parameter(xs)], lr=0.1)),
        "missing": lambda: Learner(model, optimizer=SGD([model.bias], lr=0.1)),
        "twice": lambda: Learner(
            model, optimizer={"a": SGD(model.parameters(), lr=0.1), "b": SGD([model.bias], lr=0.1)}
        ),
        "frozen": lambda: Learner({"a": model, "b": frozen}, optimizer={"a": Adam, "b": Adam}),
        "epochs": lambda: toy().fit(-1),
        "epochs text": lambda: toy().fit("ten"),
        "phase class": lambda: toy().epoch(TrainingPhase),
        "phase": lambda: toy().epoch("training"),
        "no data": lambda: toy(data=()).fit(1),
        "three data": lambda: toy(data=(xs, xs, xs)),
        "data": lambda: toy(data=3),
        "rows": lambda: TensorBatches(xs, torch.ones(3), batch_size=2),
        "batch size": lambda: TensorBatches(xs, batch_size=0),
        "fraction": lambda: split(xs, 2.0),
        "options": lambda: as_dataloader(xs, workers=3),
        "batch": lambda: toy().epoch(TrainingPhase(), [xs]),
        "empty": lambda: toy().epoch(TrainingPhase(), []),
        "no loss": lambda: Learner(model, data=(xs, xs)).fit(1),
        "no scalar": lambda: Learner(model, lambda p, y: p, data=((xs, xs),)).fit(1),
        "no gradient": lambda: Learner(model, lambda p, y: p.detach().sum(), data=((xs, xs),)).fit(1),
        "block": lambda: toy().optimizing("nobody"),
        "update": lambda: toy().update("nobody"),
        "defer": lambda: toy().defer(print),
        "callbacks": lambda: toy(callbacks=[Recorder]),
        "callback": lambda: Learner(model, callbacks=Recorder()),
        "no callback": lambda: toy(callbacks=[print]),
        "callback twice": lambda: toy(recorder := Recorder(), recorder),
        "two alike": lambda: toy(GarbageCollect(), GarbageCollect()),
        "find": lambda: toy().get_callback("Recorder"),
        "conflict": lambda: toy(Writer(), type("Third", (Writer,), {})()),
        "producer": lambda: toy(Reader()),
        "path": taught(print, reads=("stp.loss",)),
        "bare path": taught(print, reads="step.loss"),
        "explain": lambda: toy().callbacks.explain("steps"),
        "read": taught(lambda learner: learner.model),
        "write": taught(lambda learner: setattr(learner, "model", None), reads=("model",)),
        "entry": taught(lambda learner: learner.step.los, reads=("step",)),
        "metric": lambda: Metrics(3),
        "lambda metric": lambda: Metrics(lambda preds, ys: 0),
        "metric input": lambda: toy(Recorder(), Metrics(Metric(accuracy, inputs=("logits",)))).fit(1),
        "metric shape": lambda: toy(Recorder(), Metrics(Metric(lambda p, y: p, name="p"))).fit(1),
        "history": lambda: toy().fit(1)["training/acuracy"],
        "phase key": lambda: toy(Recorder()).cbstate.history["training"],
        "device": lambda: fluxloop.Accelerator("nowhere"),
        "throttle": lambda: fluxloop.throttle(Recorder(), StepEnd),
        "throttle event": lambda: fluxloop.throttle(Recorder(), "StepEnd", freq=2),
        "event": lambda: on(TrainingPhase),
        "handler phase": lambda: on(StepEnd, StepEnd),
        "garbage": lambda: GarbageCollect(0),
        "smooth": lambda: SmoothLoss(2.0),
        "check": lambda: Check("c", print, severity="bad"),
        "traces": lambda: fluxloop.Traces({}),
        "twin": lambda: fluxloop.PerOptimizerValidationPhase(TrainingPhase()),
        "nothing said": lambda: toy().fit(1, phases=[PerOptimizerPhase()]),
        "no step": lambda: toy().fit(1, phases=[AbstractTrainingPhase()]),
        "top": lambda: fluxloop.top_k(0),
        "name": lambda: fluxloop.Lerner,
    }


@pytest.mark.parametrize("case", list(wrong_uses()))
def test_no_error_text_has_an_unexpanded_placeholder(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=r"\w") as caught:
        wrong_uses()[case]()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert isinstance(caught.value, (fluxloop.FluxloopError, ValueError, AttributeError, RuntimeError)), text
    assert not PLACEHOLDER.search(text), text


def test_no_text_in_the_sources_names_a_placeholder_outside_of_an_f_string() -> None:
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        found += [
            f"{path.name}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside
            if PLACEHOLDER.search(node.value)
        ]
    assert found == []
