from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from fluxloop import (
    Callback,
    CancelStepException,
    CustomCallback,
    EpochBegin,
    EpochEnd,
    Event,
    FitEnd,
    Learner,
    MetricError,
    Phase,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    on,
)
from fluxloop.callbacks.profile import Profile
from fluxloop.testing import assert_observer, assert_resumes_exactly, toy_learner

T, V = "TrainingPhase", "ValidationPhase"


class Clock:
    """A clock that stands still unless somebody says that time goes by."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def later(clock: Clock, seconds: float) -> Any:
    def wait(*args: Any) -> None:
        clock.now += seconds

    return wait


def profiled(*callbacks: Callback, clock: Clock | None = None, **options: Any) -> tuple[Profile, Learner]:
    profile = Profile(clock=clock or Clock())
    return profile, toy_learner(profile, *callbacks, num_batches=3, **options)


class Slow:
    """Batches that take a second each, and half a second to notice the end."""

    def __init__(self, clock: Clock, batches: list[Any]) -> None:
        self.clock = clock
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.clock.now += 1.0
            yield batch
        self.clock.now += 0.5


def slow(clock: Clock) -> Slow:
    return Slow(clock, list(toy_learner(num_batches=3).data.training))


def test_a_fit_of_five_epochs_has_one_timing_of_the_fit_and_five_of_each_phase() -> None:
    profile, learner = profiled()
    learner.fit(5)
    assert {name: len(seconds) for name, seconds in profile.seconds.items()} == {"fit": 1, "cycle": 5, T: 5, V: 5}
    assert {name: len(seconds) for name, seconds in profile.parts[T].items()} == {"data": 5, "steps": 5, "callbacks": 5}


def test_an_epoch_is_split_into_waiting_for_data_steps_and_callbacks() -> None:
    clock = Clock()
    handler = CustomCallback(later(clock, 0.25), StepEnd, TrainingPhase)
    profile, learner = profiled(handler, clock=clock)
    learner.data.training = slow(clock)
    loss = learner.loss_fn

    def timed_loss(*args: Any) -> Any:
        clock.now += 4.0
        return loss(*args)

    learner.loss_fn = timed_loss
    learner.fit(2, phases=[TrainingPhase()])
    assert profile.parts[T] == {"data": [3.5, 3.5], "steps": [12.0, 12.0], "callbacks": [0.75, 0.75]}
    assert profile.seconds == {T: [16.25, 16.25], "cycle": [16.25, 16.25], "fit": [32.5]}


@define
class Waits(Callback):
    """Takes two seconds at each event."""

    clock: Clock
    draws = False

    @on(Event)
    def wait(self, event: Event, phase: Phase, learner: Any) -> None:
        self.clock.now += 2.0


def test_each_callbacks_calls_and_seconds_are_told_by_phase_and_event() -> None:
    clock = Clock()
    profile, learner = profiled(Waits(clock), clock=clock)
    learner.fit(2)
    steps = 2 * 3
    assert profile.handlers[T, "StepBegin", "Waits"] == (steps, 2.0 * steps)
    assert profile.handlers[V, "LossBegin", "Waits"] == (steps, 2.0 * steps)
    assert profile.handlers[T, "UpdateEnd", "Waits"] == (steps, 2.0 * steps)
    assert profile.handlers[T, "EpochEnd", "Waits"] == (2, 4.0)
    assert profile.handlers["FittingPhase", "FitEnd", "Waits"] == (1, 2.0)
    assert not any(callback == "Profile" for _, _, callback in profile.handlers)
    assert profile.parts[T]["data"] == [0.0, 0.0]
    assert profile.parts[T]["steps"] == [0.0, 0.0]


def test_what_a_handler_has_others_do_is_charged_to_it_once() -> None:
    clock = Clock()
    inner = CustomCallback(later(clock, 1.0), StepEnd, ValidationPhase, name="inner", reads=())
    profile, learner = profiled(inner, clock=clock)
    learner.add_callback(
        CustomCallback(lambda _: learner.epoch(ValidationPhase()), StepEnd, TrainingPhase, name="outer")
    )
    learner.fit(1, phases=[TrainingPhase()])
    assert profile.handlers[T, "StepEnd", "outer"] == (3, 9.0)
    assert profile.parts[T] == {"data": [0.0], "steps": [0.0], "callbacks": [9.0]}


def test_the_table_shows_phases_and_the_costliest_handlers_first() -> None:
    clock = Clock()
    quick = CustomCallback(later(clock, 0.5), StepEnd, TrainingPhase, name="quick")
    profile, learner = profiled(quick, Waits(clock), clock=clock)
    learner.data.training = slow(clock)
    learner.fit(1, phases=[TrainingPhase()])
    lines = str(profile).splitlines()
    assert lines[0] == "1 fit, 1 cycle, 57 s"
    assert lines[1].split() == ["phase", "epochs", "s/epoch", "data", "steps", "callbacks"]
    assert lines[2].split() == [T, "1", "49", "7", "%", "0", "%", "93", "%"]
    assert lines[5].startswith("Waits ")
    assert [line.split()[0] for line in lines[5:]].index("quick") > 0
    assert lines[-1].split() == ["quick", "StepEnd", T, "3", "1.5", "5e+05"]


def widths(axes: Any) -> list[list[float]]:
    return [[float(bar.get_width()) for bar in bars] for bars in axes.containers]


def test_the_picture_shows_the_parts_of_an_epoch_and_the_costliest_handlers_first() -> None:
    clock = Clock()
    quick = CustomCallback(later(clock, 0.5), StepEnd, TrainingPhase, name="quick")
    slower = CustomCallback(later(clock, 2.0), StepBegin, ValidationPhase, name="slower")
    profile, learner = profiled(quick, slower, clock=clock)
    learner.data.training = slow(clock)
    learner.fit(2, phases=[TrainingPhase(), ValidationPhase()])
    phases, calls = profile.plot().axes
    assert [text.get_text() for text in phases.get_legend().get_texts()] == ["data", "steps", "callbacks"]
    assert widths(phases) == [[3.5, 0.0], [0.0, 0.0], [1.5, 6.0]]
    assert [text.get_text() for text in phases.get_yticklabels()] == [T, V]
    names = [text.get_text() for text in calls.get_yticklabels()]
    assert names[:2] == [f"slower, StepBegin of {V}", f"quick, StepEnd of {T}"]
    assert widths(calls)[0][:2] == [12.0, 3.0]


def test_a_picture_without_measurements_or_matplotlib_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MetricError, match="nothing was measured; expected a fit with it first"):
        Profile().plot()
    profile, learner = profiled()
    learner.fit(1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"profile.plot\(\) needs matplotlib: pip install 'torch-fluxloop\[plot\]'"):
        profile.plot()


def test_a_profile_before_a_fit_says_so() -> None:
    assert str(Profile()) == "Profile(trace=None, steps=(10, 3)): nothing was measured; fit first"


def test_the_seconds_of_a_cancelled_step_are_in_no_column() -> None:
    clock = Clock()

    class Cancelled(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            clock.now += 1.0
            return super().step(learner, batch)

    losses = iter([1, 2, 3])
    profile, learner = profiled(clock=clock)
    plain = learner.loss_fn

    def loss(*args: Any) -> Any:
        clock.now += 4.0
        if next(losses) == 2:
            raise CancelStepException
        return plain(*args)

    learner.loss_fn = loss
    learner.fit(1, phases=[Cancelled()])
    assert profile.parts["Cancelled"] == {
        "data": [2.0],  # before the first and the second
        "steps": [8.0],
        "callbacks": [0.0],
    }
    assert profile.seconds["Cancelled"] == [15.0]


@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
def test_handlers_are_called_as_they_are_once_the_fit_has_ended(error: BaseException | None) -> None:
    left = [error]

    def fail(learner: Any) -> None:
        if left and (failure := left.pop()) is not None:
            raise failure

    profile, learner = profiled(Recorder(), CustomCallback(fail, EpochEnd, TrainingPhase))
    if error is None:
        learner.fit(1)
    else:
        with pytest.raises(RuntimeError, match="broken"):
            learner.fit(1)
        assert len(profile.seconds["fit"]) == 1
    before = dict(profile.handlers)
    recorder = learner.get_callback(Recorder)
    (call, _, id), *_ = learner.callbacks.table(TrainingPhase)[StepEnd]
    assert id == "Recorder"
    assert call == recorder.count_step  # type: ignore[union-attr]  # it is there
    learner.epoch(TrainingPhase())
    assert profile.handlers == before
    assert len(profile.seconds[T]) == 1


def test_without_a_profile_nothing_is_timed_and_with_one_only_its_own_learner() -> None:
    profile, _ = profiled()
    other = toy_learner(Recorder(), num_batches=2)
    other.fit(1)
    assert profile.seconds == {}


def test_a_handler_added_in_the_middle_is_timed_from_the_next_epoch_on() -> None:
    clock = Clock()
    profile, learner = profiled(clock=clock)
    added: list[Callback] = []

    def add(view: Any) -> None:
        if not added:
            added.append(CustomCallback(later(clock, 1.0), StepBegin, TrainingPhase, name="late"))
            learner.add_callback(added[0])

    learner.add_callback(CustomCallback(add, EpochEnd, TrainingPhase, name="adds"))
    learner.fit(3, phases=[TrainingPhase()])
    assert profile.handlers[T, "StepBegin", "late"] == (6, 6.0)


def test_a_second_fit_is_measured_too_and_a_second_learner_anew() -> None:
    profile, learner = profiled()
    learner.fit(1)
    learner.fit(2)
    assert len(profile.seconds["fit"]) == 2
    assert len(profile.seconds[T]) == 3
    second = toy_learner(profile, num_batches=2)
    assert profile.seconds == {}
    second.fit(1)
    assert len(profile.seconds["fit"]) == 1


def test_profiling_changes_no_weight(tmp_path: Path) -> None:
    assert_observer(Profile(), toy_learner)
    assert_observer(Profile(tmp_path, steps=(1, 2)), toy_learner)


def names_in(trace: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}


def test_a_trace_shows_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    learner = toy_learner(Profile(tmp_path / "runs" / "one", steps=(2, 3)), num_batches=4)
    learner.fit(2)
    (trace,) = tmp_path.rglob("*.json")
    assert trace == tmp_path / "runs" / "one" / "trace-step-3.json"
    names = names_in(trace)
    assert {"ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"} <= names
    assert "ProfilerStep#4" not in names
    assert "aten::mul" in names


def test_a_fit_that_fails_in_the_middle_of_a_trace_closes_it(tmp_path: Path) -> None:
    seen: list[int] = []

    def fail(learner: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("broken")

    profile = Profile(tmp_path, steps=(1, 5))
    learner = toy_learner(profile, CustomCallback(fail, StepBegin, TrainingPhase), num_batches=8)
    with pytest.raises(RuntimeError, match="broken"):
        learner.fit(1)
    assert profile._profiler is None
    assert "aten::mul" in names_in(tmp_path / "trace-step-2.json")
    learner.fit(1)  # another one can be made


def test_a_fit_too_short_for_a_trace_says_so(tmp_path: Path) -> None:
    learner = toy_learner(Profile(tmp_path), num_batches=2)
    with pytest.warns(UserWarning, match=r"wrote no trace: the fit had 2 training steps, and 10 go by first"):
        learner.fit(1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    learner = toy_learner(Profile(tmp_path / "taken"), Recorder(), num_batches=2)
    with pytest.raises(FileExistsError):
        learner.fit(1)
    assert learner.history[TrainingPhase].steps == 0


@pytest.mark.parametrize("steps", [(0, 3), (1, 0), (1,), 3, (1.0, 2)])
def test_steps_that_are_no_numbers_from_1_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"expected how many steps go by and how many are shown"):
        Profile(steps=steps)


def test_only_the_first_of_two_errors_leaves_and_the_end_is_measured() -> None:
    clock = Clock()

    def fail(learner: Any) -> None:
        clock.now += 1.0
        raise RuntimeError("first")

    profile, learner = profiled(
        CustomCallback(fail, EpochBegin, name="a"), CustomCallback(fail, FitEnd, name="b"), clock=clock
    )
    with pytest.raises(RuntimeError, match="first"):
        learner.fit(1)
    assert profile.seconds["fit"] == [2.0]


def test_a_profiled_run_that_was_killed_ends_as_one_that_was_not() -> None:
    def make() -> Learner:
        return toy_learner(Profile(), Recorder(), num_batches=3)

    assert_resumes_exactly(make, at=[1, 4, 8])
