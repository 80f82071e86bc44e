"""What is told of graphs that are made: while they are compiled, and afterwards."""

from __future__ import annotations

import re
import threading
from io import StringIO
from typing import Any

import pytest
import torch
from compiled_training import full, learner, rows
from torch import Tensor, nn

import fluxloop.compile.graphs
from fluxloop import CompileError, ProgressBar, StepEnd, TrainingPhase, throttle

pytestmark = pytest.mark.usefixtures("uncompiled")


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_that_a_step_is_compiled_and_counts_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    seen: list[str] = []

    def lower(graph: Any, inputs: Any, device: Any) -> Any:
        begun = terminal.getvalue()
        waited = threading.Event()
        while terminal.getvalue() == begun:  # another line comes while this one is busy
            waited.wait(0.01)
        seen.append(terminal.getvalue())
        return torch.no_grad()(graph)

    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lower)
    made = learner(data=(full(),), callbacks=[ProgressBar(file=terminal)])
    made.fit(1)
    (shown,) = seen
    assert re.findall(r"compiling a step of TrainingPhase \(00:0[0-9]\)", shown)[-1] != (
        "compiling a step of TrainingPhase (00:00)"
    )
    last = terminal.getvalue()[len(shown) :]
    assert "compiling" not in re.sub(r"\r *\r", "", last.partition("\r")[2])
    assert "compiled" not in last


def test_where_the_output_is_a_file_one_line_per_graph_tells_what_it_took() -> None:
    file = StringIO()
    learner(callbacks=[ProgressBar(file=file)]).fit(
        2
    )  # full batches, and a smaller last one; the first step is not compiled
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    assert all(re.fullmatch(r"compiled a step of (Training|Validation)Phase in \d+\.\d s", line) for line in lines)


@pytest.mark.parametrize("enabled", [False, None])
def test_who_wants_no_bars_is_told_nothing(enabled: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    file = StringIO()
    bar = [ProgressBar(enabled, file=file)] if enabled is False else []
    made = learner(data=(full(),), callbacks=bar, default_callbacks=False)
    made.fit(1)
    assert file.getvalue() == ""
    assert capsys.readouterr().err == ""


def test_a_quiet_learner_tells_nothing() -> None:
    for shown in (StringIO(), Terminal()):
        made = learner(data=(full(),), callbacks=[ProgressBar(file=shown)])
        made.quiet = True
        made.fit(1)
        assert shown.getvalue() == ""


def test_only_the_first_process_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxloop.compute.accelerator import Accelerator

    file = StringIO()
    made = learner(data=(full(),), callbacks=[ProgressBar(file=file)])
    monkeypatch.setattr(Accelerator, "is_main", False)
    made.fit(1)
    assert file.getvalue() == ""


def test_a_bar_that_is_wrapped_tells_too() -> None:
    file = StringIO()
    learner(data=(full(),), callbacks=[throttle(ProgressBar(file=file), StepEnd, freq=2)]).fit(1)
    assert file.getvalue().startswith("compiled a step of TrainingPhase in ")


def test_a_step_that_cannot_be_compiled_is_not_said_to_have_been() -> None:
    class Asks(nn.Linear):
        def forward(self, xs: Tensor) -> Tensor:
            return super().forward(xs) if xs.sum() > -1e9 else xs

    for shown in (StringIO(), Terminal()):
        made = learner(model=lambda: Asks(16, 4), data=(full(),), callbacks=[ProgressBar(file=shown)])
        with pytest.raises(CompileError):
            made.fit(1)
        assert "compiled" not in shown.getvalue()
        assert ("compiling" in shown.getvalue()) == shown.isatty()


def test_a_bar_whose_stream_is_closed_stops_no_compiling() -> None:
    file = Terminal()
    made = learner(data=(full(),), callbacks=[ProgressBar(file=file)])
    file.close()
    made.fit(1)
    assert made.history[TrainingPhase].steps == 2


def test_a_summary_tells_how_many_graphs_there_were_and_what_they_took() -> None:
    made = learner(data=(rows(), full()))
    assert not made.summary().compiled
    made.fit(2)
    told = made.summary()
    assert list(told.compiled) == ["TrainingPhase", "ValidationPhase"]
    assert re.fullmatch(r"2 graphs, traced in \d+\.\d s, compiled in \d+\.\d s", told.compiled["TrainingPhase"])
    assert "compiled steps of ValidationPhase: 1 graph, traced in" in str(told)
    assert not learner(False).summary().compiled
