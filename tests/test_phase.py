from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch
from attrs import define, field
from torch import nn

from fluxloop import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Callback,
    CancelStepException,
    DataError,
    DiffusionPhase,
    Event,
    FittingPhase,
    GANPhase,
    GANValidationPhase,
    Learner,
    LossBegin,
    Metrics,
    Phase,
    PhaseError,
    PredictionPhase,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    UnsafeCallback,
    ValidationPhase,
    on,
    runepoch,
    runstep,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner


class SkipFirst(Callback):
    """Cancel the first step when it begins."""

    draws = False
    done = False

    @on(StepBegin)
    def cancel(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        if not self.done:
            self.done = True
            raise CancelStepException


class SetRate(Callback):
    """A schedule: the learning rate of the t-th step in training is 1 / (t + 1)."""

    reads = ("optimizer",)
    draws = False

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    @on(StepBegin, AbstractTrainingPhase)
    def set(self, event: StepBegin, phase: Phase, learner: Any) -> None:
        self.rates.append(1 / (len(self.rates) + 1))
        learner.optimizer.param_groups[0]["lr"] = self.rates[-1]


class Watch(Callback):
    """Note the phase of each step."""

    draws = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    @on(StepEnd, AbstractTrainingPhase)
    def any_training(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.seen.append(("training", repr(phase)))

    @on(StepEnd, AbstractValidationPhase)
    def any_validation(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        self.seen.append(("validation", repr(phase)))


class Mine(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            learner.backward(state.loss)
            learner.update()
        return state


# What the phase types say


def test_the_phase_types_say_their_data_mode_and_gradients():
    said = {
        cls: (cls.data_key, cls.train_mode, cls.gradients)
        for cls in (AbstractTrainingPhase, TrainingPhase, AbstractValidationPhase, ValidationPhase, PredictionPhase)
    }
    assert said == {
        AbstractTrainingPhase: ("training", True, True),
        TrainingPhase: ("training", True, True),
        AbstractValidationPhase: ("validation", False, False),
        ValidationPhase: ("validation", False, False),
        PredictionPhase: ("validation", False, False),
    }
    assert all(issubclass(cls, Phase) for cls in (*said, FittingPhase))
    assert not issubclass(TrainingPhase, AbstractValidationPhase)
    assert repr(TrainingPhase()) == "TrainingPhase()"


class Kept(TrainingPhase):
    """Has arguments of all kinds, and passes on others."""

    def __init__(self, size: int, views: Any = None, *, rate: float = 0.5, lost: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.size, self.views, self.rate = size, views, rate


def test_a_phase_shows_the_plain_arguments_that_are_no_defaults() -> None:
    assert repr(Kept(3, len, lost=4)) == "Kept(size=3)"
    assert repr(Kept(3, rate=0.1, name="fast")) == "Kept(size=3, rate=0.1, name='fast')"
    assert repr(DiffusionPhase("edm", log_sigma=(0, 1))) == "DiffusionPhase(predict='edm', log_sigma=(0, 1))"
    assert repr(DiffusionPhase()) == "DiffusionPhase()"
    assert repr(GANPhase("hinge", r1=0.5)) == "GANPhase(loss='hinge', r1=0.5)"
    assert repr(GANValidationPhase(GANPhase(every=4))) == "GANValidationPhase(GANPhase(every=4))"


@pytest.mark.parametrize("phase", [AbstractTrainingPhase(), AbstractValidationPhase()], ids=repr)
def test_a_phase_without_a_body_says_what_to_write(phase):
    recorder = EventRecorder()
    learner = toy_learner(recorder)
    with pytest.raises(PhaseError, match=rf"(?s){type(phase).__name__} does not say .* write a body:.*def body\(self"):
        learner.fit(1, phases=[phase])
    assert recorder.events == ["FitBegin", "CycleBegin", "EpochBegin", "FitEnd"]


def test_a_phase_runs_on_the_data_of_its_key():
    class Extra(AbstractValidationPhase):
        data_key = "extra"

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch):
                seen.append(batch)

    seen: list[Any] = []
    learner = toy_learner(data={"training": [1], "extra": [2, 3]})
    learner.fit(2, phases=[Extra()])
    assert seen == [2, 3, 2, 3]
    learner.epoch(Extra(), [4])
    assert seen[4:] == [4], "data given to the call goes first"


def test_a_phase_without_its_data_says_what_there_is_and_what_to_type():
    class Extra(AbstractValidationPhase):
        data_key = "validatoin"

    learner = toy_learner()
    with pytest.raises(DataError, match=r"Extra runs on the 'validatoin' data.*\['training', 'validation'\]") as caught:
        learner.epoch(Extra())
    assert "did you mean 'validation'?" in str(caught.value)
    assert "data={'validatoin': ...}" in str(caught.value)


# A subclass is a phase of its kind


def test_a_subclass_of_an_abstract_phase_inherits_what_callbacks_do_in_it():
    class Other(AbstractValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self):
                pass

    watch = Watch()
    toy_learner(watch, num_batches=1).fit(1, phases=[TrainingPhase(), Mine(), ValidationPhase(), Other()])
    assert watch.seen == [
        ("training", "TrainingPhase()"),
        ("training", "Mine()"),
        ("validation", "ValidationPhase()"),
        ("validation", "Other()"),
    ]


def test_a_handler_for_a_more_specific_phase_goes_before_one_for_its_base():
    class Special(Watch):
        @on(StepEnd, Mine)
        def special(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            self.seen.append(("special", repr(phase)))

    watch = Special()
    toy_learner(watch, num_batches=1).fit(1, phases=[TrainingPhase(), Mine()])
    assert watch.seen == [("training", "TrainingPhase()"), ("special", "Mine()")]


@pytest.mark.parametrize("phase", [TrainingPhase, Mine])
def test_a_schedule_for_training_phases_acts_in_them_alone(phase):
    schedule = SetRate()
    learner = toy_learner(schedule, num_batches=2)
    learner.fit(2, phases=[phase(), ValidationPhase()])
    assert schedule.rates == [1, 1 / 2, 1 / 3, 1 / 4]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1)
    rates = iter(schedule.rates)
    for _ in range(2):
        for xs, ys in learner.data.training:
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.zero_grad()
            nn.functional.l1_loss(xs * weight, ys).backward()
            optimizer.step()
    assert torch.equal(learner.model.value, weight)


def test_a_subclass_that_only_overrides_its_epoch_keeps_its_step():
    class FirstBatch(TrainingPhase):
        def epoch(self, learner: Learner, data: Any) -> None:
            with runepoch(learner, self):
                self.step(learner, next(iter(data)))

    learner = toy_learner(Recorder())
    learner.fit(2, phases=[FirstBatch()])
    counts = learner.history[FirstBatch]
    assert (counts.epochs, counts.steps, counts.updates) == (2, 2, {None: 2})


def test_a_step_without_runstep_trains_and_its_epoch_is_still_told():
    class Bare(AbstractTrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            learner.optimizer.zero_grad()
            learner.loss_fn(learner.model(batch[0]), batch[1]).backward()
            learner.optimizer.step()

    recorder = EventRecorder()
    bare, built_in = toy_learner(recorder), toy_learner()
    bare.fit(2, phases=[Bare()])
    built_in.fit(2, phases=[TrainingPhase()])
    assert recorder.events == ["FitBegin", *["CycleBegin", "EpochBegin", "EpochEnd", "CycleEnd"] * 2, "FitEnd"]
    assert torch.equal(bare.model.value, built_in.model.value)


# However a step is written


@define
class WithField(TrainingPhase):
    scale: float = 2.0

    def step(self, learner: Learner, batch: Any) -> Any:
        return super().step(learner, (batch[0] * self.scale, batch[1] * self.scale))


@dataclass
class WithData(TrainingPhase):
    scale: float = 2.0

    def step(self, learner: Learner, batch: Any) -> Any:
        return super().step(learner, (batch[0] * self.scale, batch[1] * self.scale))


class WithInit(TrainingPhase):
    def __init__(self, scale: float = 2.0) -> None:
        self.scale = scale

    def step(self, learner: Learner, batch: Any) -> Any:
        return super().step(learner, (batch[0] * self.scale, batch[1] * self.scale))


@pytest.mark.parametrize("phase", [WithField, WithData, WithInit])
def test_a_phase_with_fields_may_extend_the_step_of_its_base(phase):
    learner, twice = toy_learner(Recorder()), toy_learner(Recorder())
    learner.fit(1, phases=[phase(scale=3.0)])
    data = [(3 * xs, 3 * ys) for xs, ys in twice.data.training]
    twice.fit(1, (data,))
    assert_same_bits(learner, twice)
    assert learner.history[phase].steps == 16


class Mixin:
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0]) as (handle, state):  # type: ignore[arg-type]
            handle(LossBegin())
        return state


class FromMixin(Mixin, AbstractTrainingPhase):
    pass


class Decorated(AbstractTrainingPhase):
    @torch.enable_grad()
    def step(self, learner: Learner, batch: Any) -> Any:
        return Mixin.step(self, learner, batch)  # type: ignore[arg-type]


def logged(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def call(*args: Any) -> Any:
        return step(*args)

    return call


class Wrapped(AbstractTrainingPhase):
    @logged
    def step(self, learner: Learner, batch: Any) -> Any:
        return Mixin.step(self, learner, batch)  # type: ignore[arg-type]


class Plain(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        return Mixin.step(self, learner, batch)  # type: ignore[arg-type]


class Inline(AbstractTrainingPhase):
    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for batch in data:
                try:
                    Mixin.step(self, learner, batch)  # type: ignore[arg-type]
                except CancelStepException:  # a with statement cannot skip its body: this loop takes it
                    pass


@pytest.mark.parametrize("phase", [Plain, FromMixin, Decorated, Wrapped, Inline])
def test_a_step_cancelled_at_its_begin_is_skipped_however_it_is_written(phase):
    recorder = EventRecorder()
    learner = toy_learner(recorder, SkipFirst(), num_batches=2)
    learner.fit(1, phases=[phase()])
    assert recorder.events == [
        *["FitBegin", "CycleBegin", "EpochBegin", "StepBegin"],
        *["StepBegin", "LossBegin", "StepEnd"],
        *["EpochEnd", "CycleEnd", "FitEnd"],
    ]


def test_a_cancelled_step_that_was_called_by_itself_gives_the_state_it_began_with():
    learner = toy_learner(SkipFirst())
    state = TrainingPhase().step(learner, (torch.ones(2, 1), torch.ones(2, 1)))
    assert state is learner.step
    assert list(state) == ["xs", "ys"]


# Something that is no phase


def calls(learner: Learner, phase: Any) -> dict[str, Callable[[], object]]:
    return {
        "fit": lambda: learner.fit(1, phases=[phase]),
        "epoch": lambda: learner.epoch(phase),
        "evaluate": lambda: learner.evaluate(phase=phase),
        "predict": lambda: learner.predict(torch.ones(3, 1), phase=phase),
        "check": lambda: learner.check(phases=[phase]),
    }


@pytest.mark.parametrize("call", ["fit", "epoch", "evaluate", "predict", "check"])
def test_a_phase_class_instead_of_an_instance_says_what_to_type(call):
    recorder = EventRecorder()
    learner = toy_learner(recorder)
    with pytest.raises(PhaseError, match=r"the class Mine was given as a phase; expected an instance: Mine\(\)"):
        calls(learner, Mine)[call]()
    assert recorder.events == []


@pytest.mark.parametrize("call", ["fit", "epoch", "evaluate", "predict", "check"])
@pytest.mark.parametrize(("wrong", "described"), [("training", "'training'"), (3, "3"), (nn.Linear(1, 1), "a Linear")])
def test_something_that_is_no_phase_is_described(call, wrong, described):
    recorder = EventRecorder()
    learner = toy_learner(recorder)
    with pytest.raises(PhaseError, match=rf"{described} was given as a phase; expected an instance"):
        calls(learner, wrong)[call]()
    assert recorder.events == []


@pytest.mark.parametrize("wrong", [TrainingPhase(), TrainingPhase], ids=["instance", "class"])
def test_a_single_phase_where_several_belong_says_what_to_type(wrong):
    with pytest.raises(PhaseError, match=r"phases=\["):
        toy_learner().fit(1, phases=wrong)


def test_phases_may_come_from_a_generator():
    learner = toy_learner(Recorder())
    learner.fit(2, phases=(phase for phase in [Mine(), ValidationPhase()]))
    assert (learner.history[Mine].epochs, learner.history[ValidationPhase].epochs) == (2, 2)


# State per phase


def test_per_phase_state_is_found_by_the_class_and_by_an_instance():
    seen: list[tuple[int, int]] = []

    class Look(Callback):
        reads = ("cbstate.history",)
        draws = False

        @on(StepEnd, Mine)
        def look(self, event: StepEnd, phase: Phase, learner: Any) -> None:
            history = learner.cbstate.history
            seen.append((history[phase].steps, history[Mine].steps))

    learner = toy_learner(Recorder(), Look(), num_batches=2)
    phase = Mine()
    learner.fit(1, phases=[phase])
    assert seen == [(1, 1), (2, 2)]
    for history in (learner.cbstate.history, learner.history):
        assert history[phase] is history[Mine] is history[Mine()]
    assert phase in learner.cbstate.history
    assert Mine in learner.cbstate.history


def test_a_subclass_has_state_of_its_own():
    class Other(Mine):
        pass

    learner = toy_learner(Recorder(), num_batches=2)
    learner.fit(3, phases=[Mine()])
    learner.fit(1, phases=[Other()])
    assert (learner.history[Mine].epochs, learner.history[Other].epochs) == (3, 1)
    assert learner.history[AbstractTrainingPhase].epochs == 0


@pytest.mark.parametrize("wrong", ["training", 3, None, Event, nn.Linear], ids=str)
def test_per_phase_state_asked_for_by_something_else_says_what_was_expected(wrong):
    learner = toy_learner(Recorder())
    with pytest.raises(PhaseError, match=r"was used as a key; expected a phase or its class, e\.g\. \[TrainingPhase\]"):
        _ = learner.cbstate.history[wrong]


def test_a_handler_gets_the_running_instance_of_the_phase():
    phase = WithInit(scale=5.0)
    seen: list[Phase] = []

    class Look(UnsafeCallback):
        @on(StepEnd)
        def look(self, event: StepEnd, phase: Phase, learner: Learner) -> None:
            seen.append(phase)

    toy_learner(Look(), num_batches=1).fit(1, phases=[phase])
    assert seen == [phase]
    assert seen[0] is phase


class OwnEpoch(Phase):
    """Needs no data."""

    data_key = ""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for number in range(3):
                self.step(learner, number)

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, number=batch) as (_, state):
            self.numbers.append(state.number)


def test_a_phase_without_data_and_with_an_epoch_of_its_own_runs_in_a_fit():
    phase, recorder = OwnEpoch(), EventRecorder()
    learner = toy_learner(recorder, Recorder(), data=(), default_callbacks=True)
    learner.fit(2, phases=[phase])
    assert phase.numbers == [0, 1, 2] * 2
    assert learner.history[OwnEpoch].steps == 6
    assert learner.history[OwnEpoch].epochs == 2
    assert recorder.trace.count(("StepEnd", "OwnEpoch")) == 6


def test_a_data_key_that_is_a_field_is_refused():
    with pytest.raises(PhaseError, match=r"data_key.*belongs to the class"):

        @define
        class Field(ValidationPhase):
            data_key: str = "test"

    with pytest.raises(PhaseError, match=r"data_key.*belongs to the class"):

        @define
        class Given(ValidationPhase):
            data_key: str = field(default="test")

    @define(slots=False)
    class Unslotted(ValidationPhase):
        data_key: str = "test"

    with pytest.raises(PhaseError, match=r"data_key of its own, 'test'; expected a class"):
        toy_learner().epoch(Unslotted())


def test_a_data_key_set_on_an_instance_is_refused():
    phase = ValidationPhase()
    phase.data_key = "test"  # type: ignore[misc]  # what is refused
    learner = toy_learner()
    for run in (
        lambda: learner.fit(1, phases=[phase]),
        lambda: learner.epoch(phase),
        lambda: learner.evaluate(learner.data.validation, phase=phase),
    ):
        with pytest.raises(PhaseError, match=r"data_key of its own, 'test'; expected a class"):
            run()


# Names


@define
class AttrsPhase(ValidationPhase):
    noise: float = 0.0
    name: str | None = None


@dataclass
class DataPhase(ValidationPhase):
    noise: float = 0.0
    name: str | None = None


class InitPhase(ValidationPhase):
    def __init__(self, noise: float, name: str | None = None) -> None:
        self.noise = noise
        if name is not None:
            self.name = name


class ClassNamed(ValidationPhase):
    name = "noisy"


@pytest.mark.parametrize("phase", [AttrsPhase, DataPhase, InitPhase])
def test_a_phase_of_any_kind_of_class_can_be_named(phase: Any) -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    history = learner.fit(2, phases=[TrainingPhase(), phase(1.0, "one"), phase(2.0, name="two"), phase(3.0)])
    assert [len(history[f"{name}/loss"]) for name in ("one", "two", phase.__name__)] == [2, 2, 2]


def test_a_name_may_be_said_in_the_class_and_a_subclass_has_its_own() -> None:
    class Below(ClassNamed):
        pass

    history = toy_learner(Recorder(), Metrics(), num_batches=2).fit(1, phases=[TrainingPhase(), ClassNamed(), Below()])
    assert len(history["noisy/loss"]) == len(history["Below/loss"]) == 1
    assert history[ClassNamed] is history["noisy"]


def test_a_name_can_be_given_to_a_phase_that_is_made() -> None:
    phase = ValidationPhase()
    phase.name = "later"
    history = toy_learner(Recorder(), Metrics(), num_batches=2).fit(1, phases=[TrainingPhase(), phase])
    assert len(history["later/loss"]) == 1
    assert repr(phase) == "ValidationPhase(name='later')"
    assert repr(ValidationPhase(name="a", every=2)) == "ValidationPhase(name='a', every=2)"


def test_an_attribute_of_a_users_phase_that_is_no_text_is_no_name() -> None:
    phase = ValidationPhase()
    phase.name = 3
    history = toy_learner(Recorder(), Metrics(), num_batches=2).fit(1, phases=[TrainingPhase(), phase])
    assert len(history["ValidationPhase/loss"]) == 1
    with pytest.raises(PhaseError, match=r"ValidationPhase\(name=3\) was given; expected a text"):
        ValidationPhase(name=3)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a[b]"])
def test_a_name_that_cannot_stand_before_a_metrics_is_refused(name: Any) -> None:
    with pytest.raises(PhaseError, match=r"has name=.*; expected a text without slashes and brackets"):
        ValidationPhase(name=name)
    phase = ValidationPhase()
    phase.name = name
    with pytest.raises(PhaseError, match="expected a text without slashes and brackets"):
        toy_learner().fit(1, phases=[TrainingPhase(), phase])


def test_two_different_phases_of_one_name_in_a_fit_are_refused_before_anything_runs() -> None:
    learner = toy_learner(Recorder(), Metrics())
    with pytest.raises(PhaseError, match=r"two phases that are called 'InitPhase'.*Give each a name of its own"):
        learner.fit(1, phases=[TrainingPhase(), InitPhase(1.0), InitPhase(2.0)])
    with pytest.raises(PhaseError, match=r"two phases are called 'noisy': .*ValidationPhase\[noisy\] and .*ClassNamed"):
        learner.fit(1, phases=[TrainingPhase(), ValidationPhase(name="noisy"), ClassNamed()])
    with pytest.raises(PhaseError, match=r"is called 'training', as some data of the learner is"):
        learner.fit(1, phases=[TrainingPhase(), ValidationPhase(name="training")])
    assert learner.history.cycles == 0


def test_a_name_that_another_phase_had_is_refused_later_too() -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    learner.fit(1, phases=[TrainingPhase(), ClassNamed()])
    with pytest.raises(PhaseError, match="two phases are called 'noisy'"):
        learner.epoch(ValidationPhase(name="noisy"))


def test_phases_without_anything_of_their_own_are_one_phase() -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    history = learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), TrainingPhase(), ValidationPhase()])
    assert history[ValidationPhase].epochs == len(history["validation/loss"]) == 4


def test_a_validation_phase_with_a_name_draws_from_a_stream_of_its_own() -> None:
    class Draws(ValidationPhase):
        def step(self, learner: Any, batch: Any) -> Any:
            drawn.setdefault(self.name, []).append(torch.rand(()).item())
            return super().step(learner, batch)

    drawn: dict[str, list[float]] = {}
    toy_learner(num_batches=2).fit(1, phases=[TrainingPhase(), Draws(), Draws(name="a"), Draws(name="b")])
    assert len({tuple(numbers) for numbers in drawn.values()}) == 3
    assert Draws().owner == "validation/Draws"
    assert TrainingPhase(name="other").owner == "training"


# Every so many cycles


def test_a_validation_phase_runs_in_every_nth_cycle_and_in_the_last() -> None:
    recorder = EventRecorder()
    learner = toy_learner(recorder, num_batches=1)
    learner.fit(7, phases=[TrainingPhase(), ValidationPhase(every=3)])
    begun = [phase for event, phase in recorder.trace if event == "EpochBegin"]
    train, watch = "TrainingPhase", "ValidationPhase"
    assert begun == [train, train, train, watch, train, train, train, watch, train, watch]


def test_the_cycles_are_counted_over_all_fits() -> None:
    learner = toy_learner(Recorder(), Metrics(), num_batches=1)
    phases = [TrainingPhase(), ValidationPhase(every=3)]
    for epochs in (2, 5):
        learner.fit(epochs, phases=phases)
    assert [row["epoch"] for row in learner.history.rows() if row["phase"] == "ValidationPhase"] == [2, 3, 6, 7]


def test_a_class_says_in_which_cycles_its_phases_run() -> None:
    class Seldom(AbstractValidationPhase):
        every = 2

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)

    history = toy_learner(Recorder(), Metrics(), num_batches=1).fit(5, phases=[TrainingPhase(), Seldom()])
    assert [row["epoch"] for row in history.rows() if row["phase"] == "Seldom"] == [2, 4, 5]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "3"])
def test_a_number_of_cycles_that_is_none_is_refused(every: Any) -> None:
    with pytest.raises(PhaseError, match=r"expected in which cycles of a fit it runs, a whole number from 1"):
        ValidationPhase(every=every)
    phase = ValidationPhase()
    phase.every = every
    with pytest.raises(PhaseError, match="whole number from 1"):
        toy_learner().fit(1, phases=[TrainingPhase(), phase])


def test_a_sparse_validation_changes_nothing_of_the_training() -> None:
    plain, watched = toy_learner(), toy_learner()
    plain.fit(4, phases=[TrainingPhase()])
    watched.fit(4, phases=[TrainingPhase(), ValidationPhase(every=3), ValidationPhase(name="other", every=2)])
    assert_same_bits(plain, watched)


# What its methods take


@pytest.mark.parametrize("method", ["step", "epoch", "entries", "body", "finish"])
def test_a_method_with_other_arguments_is_refused_before_anything_runs(method: str) -> None:
    wrong = type("Wrong", (ValidationPhase,), {method: lambda self: None})
    learner = toy_learner(Recorder(), num_batches=2)
    with pytest.raises(PhaseError, match=rf"Wrong\.{method} has the arguments \(self\); expected \(self, "):
        learner.fit(1, phases=[TrainingPhase(), wrong()])
    assert learner.history[TrainingPhase].steps == 0


def test_methods_may_take_anything_or_have_defaults() -> None:
    class Free(ValidationPhase):
        def step(self, *args: Any, more: int = 0) -> Any:
            return super().step(*args)

        @staticmethod
        def entries(batch: Any) -> dict[str, Any]:
            return {"xs": batch[0], "ys": batch[1]}

    learner = toy_learner(Recorder(), Metrics(), num_batches=2)
    assert len(learner.fit(1, phases=[TrainingPhase(), Free()])["Free/loss"]) == 1
