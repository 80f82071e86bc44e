from __future__ import annotations

import random
import re
import sys
import warnings
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
    Checkpointer,
    CustomCallback,
    KNNProbe,
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
    find_lr,
    mae,
    runepoch,
    runstep,
)
from fluxloop.callbacks import progress
from fluxloop.compute.host import HostQueue
from fluxloop.errors import warn_user
from fluxloop.screen import bars
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
    monkeypatch.setattr(bars, "monotonic", lambda: float(next(seconds)))
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
    titles = re.findall(r"(\w+Phase epoch \d+):\s+0%", text)
    assert titles == ["TrainingPhase epoch 1", "ValidationPhase epoch 1"]
    assert "0/16" in text


def test_a_fit_of_several_epochs_says_of_how_many_and_how_long_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 seconds, so that an epoch of 2 steps takes 20, and nothing else any."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(bars, "monotonic", lambda: now[0])

    def work(learner: Any) -> None:
        now[0] += 10

    slow = CustomCallback(work, StepBegin)
    learner = toy_learner(Recorder(), bar(interval=0), slow, num_batches=2)
    learner.fit(3, phases=[TrainingPhase(), ValidationPhase(name="noisy", every=2)])
    text = learner.get_callback(ProgressBar).file.getvalue()
    titles = list(dict.fromkeys(re.findall(r"(\w+ epoch \d+/\d+(?: \(.*?\))?):", text)))
    assert titles == [
        "TrainingPhase epoch 1/3",
        "TrainingPhase epoch 1/3 (00:10, 00:50 left)",
        "TrainingPhase epoch 1/3 (00:20, 00:40 left)",
        "TrainingPhase epoch 2/3",
        "TrainingPhase epoch 2/3 (00:30, 00:30 left)",
        "TrainingPhase epoch 2/3 (00:40, 00:20 left)",
        "noisy epoch 2/3",
        "noisy epoch 2/3 (00:50, 00:10 left)",
        "noisy epoch 2/3 (01:00, 00:00 left)",
        "TrainingPhase epoch 3/3",
        "TrainingPhase epoch 3/3 (01:10, 00:20 left)",
        "TrainingPhase epoch 3/3 (01:20, 00:10 left)",
        "noisy epoch 3/3",
        "noisy epoch 3/3 (01:30, 00:10 left)",
        "noisy epoch 3/3 (01:40, 00:00 left)",
    ]


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
    shown_counts = re.findall(r"TrainingPhase epoch 2/3(?: \([^)]*\))?: +\d+%\|.*?\| (\d+)/16", text)
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
    assert re.search(r"TrainingPhase \(\d\d:\d\d\): 7batch", text)  # how long it still will take nobody knows
    assert "left" not in text
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


# Beside the bar of an epoch


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a bar once it takes long has it from the first step on, and shows each."""
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    monkeypatch.setattr(bars, "INTERVAL", 0.0)


def counts_of(title: str, text: str) -> list[str]:
    """The counts that the bars of a title have shown."""
    return list(dict.fromkeys(re.findall(rf"{re.escape(title)}: +\d+%\|.*?\| ([\d.kMG]+/[\d.kMG]+)", text)))


@pytest.mark.usefixtures("impatient")
def test_find_lr_shows_how_many_of_its_steps_are_done() -> None:
    learner = toy_learner(Recorder(), bar())
    find_lr(learner, steps=5)
    text = learner.get_callback(ProgressBar).file.getvalue()
    assert counts_of("find_lr", text) == [f"{step}/5" for step in range(6)]
    assert screen(text) == []
    silent = toy_learner(Recorder(), bar(enabled=False))
    find_lr(silent, steps=5)
    assert silent.get_callback(ProgressBar).file.getvalue() == ""


@pytest.mark.usefixtures("impatient")
def test_a_probe_shows_how_far_it_has_come_below_the_bar_of_the_epoch() -> None:
    rows = [(torch.randn(4, 1), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    learner = toy_learner(Recorder(), Metrics(), bar(), KNNProbe(bank=rows, queries=rows[:2]))
    learner.fit(1)
    text = learner.get_callback(ProgressBar).file.getvalue()
    assert counts_of("features of model", text) == ["0/3", "1/3", "2/3", "3/3", "0/2", "1/2", "2/2"]
    assert "TrainingPhase epoch 1" in text[: text.index("features of model")]
    assert screen(text) == []


@pytest.mark.usefixtures("impatient")
def test_a_checkpoint_that_takes_long_shows_how_much_is_written(tmp_path: Path) -> None:
    learner = toy_learner(Recorder(), bar(), Checkpointer(tmp_path))
    learner.fit(1)
    text = learner.get_callback(ProgressBar).file.getvalue()
    name = next(tmp_path.glob("epoch-0001*.pt")).name
    assert f"writing {name}" in text
    assert f"checksums of {name}" in text
    assert screen(text) == []
    background = toy_learner(Recorder(), bar(), Checkpointer(tmp_path / "other", background=True))
    background.fit(1)  # nobody waits for it
    assert "writing" not in background.get_callback(ProgressBar).file.getvalue()


def test_what_is_quick_shows_no_bar(tmp_path: Path) -> None:
    learner = toy_learner(Recorder(), bar(interval=0), Checkpointer(tmp_path))
    learner.fit(1)
    find_lr(learner, steps=5)
    text = learner.get_callback(ProgressBar).file.getvalue()
    assert "TrainingPhase" in text
    assert "writing" not in text
    assert "find_lr" not in text


@pytest.mark.usefixtures("clock")
def test_warnings_and_lines_of_a_step_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)

    def say(learner: Any) -> None:
        learner.accelerator.print("printed")
        tqdm.std.tqdm.write("by tqdm", file=terminal)
        warn_user("odd")

    learner = toy_learner(Recorder(), ProgressBar(file=terminal), CustomCallback(say, StepEnd, TrainingPhase))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: terminal.write(f"warned: {message}\n"))
        learner.fit(1)
    assert screen(terminal.getvalue()) == ["printed", "by tqdm", "warned: odd"] * 16


# Quiet


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_one_switch_silences_all(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], impatient: None, tmp_path: Path
) -> None:
    def learner(**options: Any) -> Learner:
        xs = torch.ones(4, 1)
        callbacks = [bar(), KNNProbe(queries=[(xs, xs[:, 0].long())], bank=[(xs, xs[:, 0].long())])]
        model = torch.nn.Linear(1, 1)
        return Learner(model, torch.nn.functional.mse_loss, data=((xs, xs), (xs, xs)), callbacks=callbacks, **options)

    options: dict[str, Any] = {"quiet": True}
    if how == "environment":
        monkeypatch.setenv("FLUXLOOP_QUIET", "1")
        options = {}
    quiet = learner(**options)
    assert quiet.quiet
    quiet.fit(2)
    find_lr(quiet, steps=3)
    quiet.evaluate()
    quiet.predict(torch.ones(4, 1))
    assert quiet.get_callback(ProgressBar).file.getvalue() == ""
    assert capsys.readouterr() == ("", "")
    loud = learner(quiet=False)  # what is said to the learner goes before the environment
    loud.fit(1)
    assert "TrainingPhase" in loud.get_callback(ProgressBar).file.getvalue()
    assert "TrainingPhase" in capsys.readouterr().out


def test_a_switch_that_says_neither_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="quiet='yes' was given; expected True, False, or None"):
        Learner(torch.nn.Linear(1, 1), quiet="yes")
    monkeypatch.setenv("FLUXLOOP_QUIET", "a bit")
    with pytest.raises(ValueError, match="FLUXLOOP_QUIET='a bit'; expected 1 to show nothing, or 0"):
        Learner(torch.nn.Linear(1, 1))
    monkeypatch.setenv("FLUXLOOP_QUIET", "0")
    assert not Learner(torch.nn.Linear(1, 1)).quiet


# In a notebook


class Output:
    """What stands in for IPython's display: one output of a cell, and how it changes."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        assert self.shown == [], "a fit has one output"
        self.shown.append(data)
        return SimpleNamespace(update=lambda data, raw: self.shown.append(data))


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Output:
    made = Output()
    shell = SimpleNamespace(kernel=1)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=made.display))
    return made


def test_a_fit_in_a_notebook_has_one_output_and_leaves_one_line(output: Output) -> None:
    learner = toy_learner(Recorder(), Metrics(), ProgressBar(interval=0), num_batches=3)
    learner.fit(2)
    texts = [each["text/plain"] for each in output.shown]
    assert any(re.match(r"TrainingPhase epoch 1/2 2/3 batch 00:0\d, 00:0\d left loss=", text) for text in texts)
    assert any('<progress value="2" max="3"' in each["text/html"] for each in output.shown)
    assert re.fullmatch(r"2 epochs in 00:0\d", texts[-1])
    assert "progress" not in output.shown[-1]["text/html"]


def test_a_fit_in_a_notebook_that_ends_early_says_why(output: Output) -> None:
    def leave(learner: Any) -> None:
        raise signal("a < b")

    signal: type[Exception] = CancelFittingException
    learner = toy_learner(Recorder(), ProgressBar(), CustomCallback(leave, StepEnd, ValidationPhase))
    learner.fit(2)
    assert re.fullmatch(r"0 of 2 epochs in 00:0\d; stopped: a < b", output.shown[-1]["text/plain"])
    assert "a &lt; b" in output.shown[-1]["text/html"]
    output.shown.clear()
    signal = KeyError
    with pytest.raises(KeyError):
        learner.fit(2)
    assert output.shown[-1]["text/plain"].endswith("stopped: KeyError")


@pytest.mark.parametrize("slow", [False, True])
def test_an_evaluation_in_a_notebook_leaves_nothing(
    slow: bool, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "PATIENCE", 0.0 if slow else 100.0)
    toy_learner(ProgressBar(interval=0)).evaluate()
    assert bool(output.shown) == slow
    assert not slow or output.shown[-1] == {"text/html": "", "text/plain": ""}


# What it leaves as it was


def test_watching_the_bar_changes_nothing() -> None:
    assert_observer(bar(interval=0), lambda: toy_learner(Recorder(), Metrics()))


def test_evaluate_and_predict_show_a_bar_like_the_learners() -> None:
    learner = toy_learner(bar())
    before = bits(learner)
    learner.evaluate()
    learner.predict(torch.ones(3, 1))
    text = learner.get_callback(ProgressBar).file.getvalue()
    assert re.findall(r"(\w+): +0%", text) == ["evaluate", "predict"]
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
