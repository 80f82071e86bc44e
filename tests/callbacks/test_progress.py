from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tqdm.std
from torch import Tensor

from fluxloop import (
    AbstractTrainingPhase,
    CancelEpochException,
    CancelFittingException,
    CancelStepException,
    CustomCallback,
    Learner,
    LossBegin,
    Metrics,
    MetricsPrinter,
    ProgressBar,
    Recorder,
    StepBegin,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    mae,
    runepoch,
    runstep,
)
from fluxloop.callbacks import progress
from fluxloop.compute.host import HostQueue
from fluxloop.testing import assert_observer, assert_same_bits, bits, toy_learner

pytestmark = pytest.mark.filterwarnings("ignore:.* did no step with them")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second goes by whenever somebody looks at the clock."""
    seconds = iter(range(10**9))
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(tqdm.std, "time", lambda: float(next(seconds)))


def screen(text: str) -> list[str]:
    """What a terminal shows after `text`: its lines, without trailing blanks and empty ones at the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        elif part == "\x1b[A":
            row -= 1
        else:
            while len(lines) <= row:
                lines.append("")
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    shown = [line.rstrip() for line in lines]
    while shown and not shown[-1]:
        shown.pop()
    return shown


def shown(learner: Learner, **options: Any) -> str:
    """What the bar of a learner wrote in one epoch of training."""
    bar = learner.get_callback(ProgressBar)
    assert bar is not None
    learner.fit(1, **{"phases": [TrainingPhase()], **options})
    assert isinstance(bar.file, StringIO)
    return bar.file.getvalue()


def bar(**options: Any) -> ProgressBar:
    return ProgressBar(**{"enabled": True, "file": StringIO(), **options})


def test_a_bar_per_epoch_names_the_phase_and_the_epoch() -> None:
    text = shown(toy_learner(Recorder(), bar()), phases=None)
    titles = re.findall(r"(\w+Phase \d+):\s+0%", text)
    assert titles == ["TrainingPhase 1", "ValidationPhase 1"]
    assert "0/16" in text


def test_a_fit_of_several_epochs_says_of_how_many_and_how_long_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(seconds)))
    learner = toy_learner(Recorder(), bar(interval=10**9), num_batches=2)
    phases = [TrainingPhase(), ValidationPhase(name="noisy", every=2)]
    learner.fit(3, phases=phases)
    text = learner.get_callback(ProgressBar).file.getvalue()
    titles = list(dict.fromkeys(re.findall(r"(\w+ \d+/\d+)(?: \(.*?\))?:", text)))
    assert titles == ["TrainingPhase 1/3", "TrainingPhase 2/3", "noisy 2/3", "TrainingPhase 3/3", "noisy 3/3"]
    assert re.search(r"TrainingPhase 2/3 \(\d\d:\d\d, \d\d:\d\d left\):", text)
    assert "left" not in text[: text.index("2/3")]


def test_a_bar_of_an_epoch_that_goes_on_begins_where_it_was_left(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        if learner.history[TrainingPhase].steps == 16 + 9:
            learner.save(tmp_path / "state.pt")
            raise Killed

    learner = toy_learner(Recorder(), bar())
    learner.at_safe_point(kill)
    with pytest.raises(Killed):
        learner.fit(3)
    resumed = toy_learner(Recorder(), bar(interval=0))
    resumed.fit(3, resume=tmp_path / "state.pt")
    text = resumed.get_callback(ProgressBar).file.getvalue()
    shown_counts = re.findall(r"TrainingPhase 2/3: +\d+%\|.*?\| (\d+)/16", text)
    assert [int(count) for count in dict.fromkeys(shown_counts)] == list(range(9, 17))


def test_it_works_alone() -> None:
    text = shown(toy_learner(bar()))
    assert "TrainingPhase:" in text
    assert "0/16" in text


@pytest.mark.usefixtures("clock")
def test_data_of_unknown_size_has_a_bar_that_counts() -> None:
    xs = torch.ones(2, 1)
    text = shown(toy_learner(bar(), data=((pair for pair in [(xs, xs)] * 7),)))
    assert "TrainingPhase: 0batch" in text
    assert "TrainingPhase: 7batch" in text
    assert "%" not in text


@pytest.mark.usefixtures("clock")
def test_the_bar_is_as_long_as_the_data_that_runs() -> None:
    learner = toy_learner(bar(), num_batches=16)
    xs = torch.ones(2, 1)
    learner.epoch(TrainingPhase(), [(xs, xs)] * 5)
    text = learner.get_callback(ProgressBar).file.getvalue()
    assert "5/5" in text
    assert "16" not in re.sub(r"\[.*?\]", "", text)


@pytest.mark.usefixtures("clock")
def test_running_metrics_are_shown_while_the_epoch_runs() -> None:
    learner = toy_learner(Recorder(), Metrics(mae), bar(), num_batches=20, optimizer=lambda p: torch.optim.SGD(p, lr=0))
    text = shown(learner)
    value = f"{learner.history['training/loss'][0]:.4g}"
    assert f"loss={value}, mae={value}" in text
    assert re.search(r"20/20.*loss=", text)


@pytest.mark.usefixtures("clock")
def test_values_without_a_single_number_are_not_shown() -> None:
    class Confusion:
        def reset(self) -> None: ...

        def update(self, preds: Tensor, ys: Tensor) -> None: ...

        def compute(self) -> Tensor:
            return torch.zeros(2, 2)

    with pytest.warns(UserWarning, match="the metrics 'confusion' .* are kept in the history"):
        text = shown(toy_learner(Recorder(), Metrics(Confusion()), bar()))
    assert "loss=" in text
    assert "confusion" not in text


def test_an_interval_of_zero_refreshes_at_every_step() -> None:
    text = shown(toy_learner(Recorder(), Metrics(), bar(interval=0), num_batches=4))
    assert [part for part in ("1/4", "2/4", "3/4", "4/4") if part in text] == ["1/4", "2/4", "3/4", "4/4"]
    assert "loss=" in text


def test_nothing_is_computed_between_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    learner = toy_learner(Recorder(), Metrics(), bar(interval=1000.0))
    monkeypatch.setattr(HostQueue, "request", lambda self, tensor, then: asked.append(tensor))
    shown(learner)
    assert asked == []


class Device(HostQueue):
    """Numbers arrive at the end of the step after that in which they were asked for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.asked: list[Any] = []
        self.arriving: list[Any] = []

    def request(self, tensor: Tensor, then: Callable[[Any], object]) -> None:
        self.asked.append((tensor.detach().clone(), then))
        self.busy = True

    def send(self) -> None:
        for tensor, then in self.arriving:
            then(tensor.item())
        self.arriving, self.asked = self.asked, []
        self.busy = bool(self.arriving)

    def flush(self) -> None:
        self.send()
        self.send()


@pytest.mark.usefixtures("clock")
def test_numbers_that_arrive_later_are_shown_when_they_have_arrived() -> None:
    learner = toy_learner(Recorder(), Metrics(), bar())
    learner._host_queue = Device()
    assert "loss=" in shown(learner)


# Where it is shown


def test_it_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(toy_learner(bar(enabled=None))) == ""
    toy_learner(ProgressBar()).fit(1)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_it_is_silent_in_a_terminal_when_not_wanted() -> None:
    assert shown(toy_learner(bar(enabled=False, file=Terminal()))) == ""


def test_it_is_shown_in_a_terminal() -> None:
    assert "TrainingPhase" in shown(toy_learner(bar(enabled=None, file=Terminal())))


def test_it_goes_to_standard_error_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    toy_learner(ProgressBar()).fit(1)
    assert "TrainingPhase" in terminal.getvalue()


def test_it_is_shown_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    assert "TrainingPhase" in shown(toy_learner(bar(enabled=None)))
    assert shown(toy_learner(bar(enabled=False))) == ""


@pytest.mark.parametrize(
    ("shell", "answer"),
    [
        (None, False),
        (SimpleNamespace(), False),
        (SimpleNamespace(kernel=None), False),
        (SimpleNamespace(kernel=1), True),
    ],
    ids=["no shell", "terminal", "no kernel", "kernel"],
)
def test_a_notebook_is_a_shell_with_a_kernel(monkeypatch: pytest.MonkeyPatch, shell: Any, answer: bool) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.in_notebook() is answer


def test_without_ipython_there_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert progress.in_notebook() is False


# Every bar that opens is closed


@pytest.mark.slow(quick=7)
@pytest.mark.parametrize("signal", [CancelStepException, CancelEpochException, CancelFittingException, RuntimeError])
@pytest.mark.parametrize("event", [StepBegin, LossBegin, StepEnd])
@pytest.mark.usefixtures("clock")
def test_the_bar_is_gone_after_every_way_out(signal: type[Exception], event: Any) -> None:
    def leave(learner: Any) -> None:
        if signal is CancelStepException or learner.step.xs is batches[3][0]:
            raise signal("out")

    batches = [(torch.ones(2, 1), torch.ones(2, 1)) for _ in range(5)]
    mine = bar()
    learner = toy_learner(mine, CustomCallback(leave, event), data=(batches, batches))
    with pytest.raises(RuntimeError, match="out") if signal is RuntimeError else nullcontext():
        learner.fit(1)
    text = mine.file.getvalue()
    assert "TrainingPhase" in text
    assert screen(text) == []


def test_a_bar_closes_when_the_data_fails() -> None:
    def rows() -> Any:
        yield torch.ones(2, 1), torch.ones(2, 1)
        raise OSError("disk gone")

    mine = bar()
    with pytest.raises(OSError, match="disk gone"):
        toy_learner(mine, data=(rows(),)).fit(1)
    assert "TrainingPhase" in mine.file.getvalue()
    assert screen(mine.file.getvalue()) == []


class ValidatesHalfway(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]):
            pass

    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for number, batch in enumerate(data):
                if number == 3:
                    learner.epoch(ValidationPhase())
                self.step(learner, batch)


@pytest.mark.usefixtures("clock")
def test_an_epoch_inside_another_has_a_bar_of_its_own() -> None:
    text = shown(toy_learner(bar(), num_batches=6), phases=[ValidatesHalfway()])
    before, inner, after = text.partition("ValidationPhase:")
    assert "ValidatesHalfway:" in before
    assert "3/6" in before
    assert "6/6" in inner + after
    assert "6/6" in after.split("ValidatesHalfway:")[-1]
    assert screen(text) == []


@pytest.mark.usefixtures("clock")
def test_lines_printed_at_the_end_of_an_epoch_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    learner = toy_learner(Recorder(), Metrics(), MetricsPrinter(), ProgressBar(file=terminal))
    learner.fit(2)
    lines = screen(terminal.getvalue())
    expected = [
        f"{phase.__name__:<18} epoch {epoch}/2  loss {learner.history.metrics[phase]['loss'][epoch - 1]:.4g}"
        for epoch in (1, 2)
        for phase in (TrainingPhase, ValidationPhase)
    ]
    assert lines == expected


# What it leaves as it was


def test_watching_the_bar_changes_nothing() -> None:
    assert_observer(bar(interval=0), lambda: toy_learner(Recorder(), Metrics()))


def test_evaluate_and_predict_show_a_bar_like_the_learners() -> None:
    learner = toy_learner(bar())
    before = bits(learner)
    learner.evaluate()
    learner.predict(torch.ones(3, 1))
    text = learner.get_callback(ProgressBar).file.getvalue()
    assert "ValidationPhase 1" in text
    assert "PredictionPhase 1" in text
    assert screen(text) == []
    assert all(torch.equal(bits(learner)[name], tensor) for name, tensor in before.items())


class DrawsWhenComputed:
    """A metric whose value is drawn."""

    def __init__(self) -> None:
        self.computed = 0

    def update(self, preds: Tensor, ys: Tensor) -> None: ...

    def reset(self) -> None: ...

    def compute(self) -> Tensor:
        return torch.rand(()) + np.random.rand() + np.random.randn() + random.random()


class RandomModel(torch.nn.Module):
    """Draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, xs: Tensor) -> Tensor:
        return self.weight * xs * (torch.rand(()) + np.random.rand() + np.random.randn() + random.random())


def test_a_metric_that_draws_when_the_bar_shows_it_changes_nothing() -> None:
    data = [(torch.ones(4, 1), torch.ones(4, 1))] * 7
    learners = [
        Learner(
            RandomModel(),
            torch.nn.functional.mse_loss,
            data=(data, data),
            optimizer=torch.optim.SGD,
            callbacks=[Recorder(), Metrics(DrawsWhenComputed()), *bars],
            default_callbacks=False,
            seed=2,
        )
        for bars in ([], [bar(interval=0.0)])
    ]
    for learner in learners:
        learner.fit(3)
    assert_same_bits(*learners)
    shown_bar = learners[1].get_callback(ProgressBar)
    assert shown_bar is not None
    assert isinstance(shown_bar.file, StringIO)
    assert "drawswhencomputed=" in shown_bar.file.getvalue().lower()
