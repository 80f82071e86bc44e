from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from io import StringIO
from pathlib import Path

import pytest

from fluxloop.screen import bars
from fluxloop.screen.bars import Screen, between_bars, on_screen, tell, tracked


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    monkeypatch.setattr(bars, "INTERVAL", 0.0)


def test_the_bar_of_work_that_failed_is_gone_with_the_one_around_it(impatient: None) -> None:
    """Who tracks something leaves its generator as it is when the work on it fails; a traceback keeps that alive."""
    screen = Screen(StringIO())
    kept: list[Iterator[int]] = []
    with on_screen(screen):
        outer = screen.bar("epoch", 10)
        kept.append(tracked([1, 2, 3], "rows", 3))
        next(kept[0])
        assert [bar.title for bar in screen.bars] == ["epoch", "rows"]
        outer.close()
        assert screen.bars == []
        kept.append(tracked([1, 2, 3], "others", 3))
        next(kept[1])
    assert screen.bars == []
    assert [list(each) for each in kept] == [[2, 3], [2, 3]]  # and goes on without it


def test_the_time_that_is_left_follows_what_steps_take_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bars, "monotonic", lambda: now[0])
    bar = bars.Bar("epoch", 1000)
    assert bar.rest() is None
    now[0], bar.seen = 30.0, 1  # a first step that is compiled
    assert bar.rest() == pytest.approx(30 * 999)
    for _ in range(300):
        now[0], bar.seen = now[0] + 0.1, bar.seen + 1
        bar.rest()
    assert 70 <= bar.rest() <= 120  # 699 steps of 0.1 s; the mean of all steps says 140 s
    assert bars.Bar("unsized").rest() is None


def test_a_line_goes_to_standard_error_and_bars_are_drawn_again(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with on_screen(Screen(terminal)), bars.bar("rows", 3) as bar:
        bar.advance()
        tell("a line")
        assert terminal.getvalue().split("a line\n")[1].startswith("\rrows:  33%|")
    monkeypatch.setattr(sys, "stderr", None)
    tell("nobody reads this")


def test_what_writes_between_bars_may_fail(impatient: None) -> None:
    terminal = StringIO()
    with on_screen(Screen(terminal)), bars.bar("rows", 3):
        with pytest.raises(KeyError), between_bars():
            raise KeyError
        assert terminal.getvalue().rstrip("\r").split("\r")[-1].startswith("rows:   0%|")


def test_a_narrow_terminal_is_asked_for_its_width_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    width = [200]
    monkeypatch.setattr(bars, "columns_of", lambda file: width[0])
    terminal = StringIO()
    bar = Screen(terminal).bar("epoch 1/2", 10, interval=0)

    def shown() -> str:
        bar.advance()
        return terminal.getvalue().rstrip("\r").split("\r")[-1].rstrip(" ")

    bar.numbers = {"loss": "0.25", "accuracy": "0.75"}
    assert len(shown()) == 197
    width[0] = 52
    narrow = shown()
    assert len(narrow) == 49
    assert narrow.startswith("epoch 1/2:  20%|")
    assert narrow.endswith("| 2/10, loss=0.25, ...")
    bar.close()


def test_warnings_of_others_stand_above_the_bars_while_there_are_some(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = StringIO()

    def usual(message: Warning | str, *_: object) -> None:
        terminal.write(f"warned: {message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", usual)
        with on_screen(Screen(terminal)), bars.bar("rows", 3):
            with on_screen(Screen(terminal)), bars.bar("others", 3), pytest.warns(UserWarning, match="seen"):
                warnings.warn("seen", stacklevel=1)
            assert "seen" not in terminal.getvalue()
            warnings.warn("odd", stacklevel=1)
            before, after = terminal.getvalue().split("warned: odd\n")
            assert before.endswith(" \r")
            assert after.strip().startswith("rows:   0%|")
        assert warnings.showwarning is usual
        with on_screen(Screen(terminal)):
            own: Callable[..., None] = lambda *_: None  # noqa: E731
            warnings.showwarning = own
        assert warnings.showwarning is own  # what somebody has set meanwhile is left


FIT = """
import sys
import torch
from fluxloop import *

torch.manual_seed(0)
xs = torch.randn(64, 8)
batches = TensorBatches(xs, (xs.sum(1) > 0).long(), batch_size=4)
learner = Learner(
    torch.nn.Linear(8, 2), torch.nn.functional.cross_entropy, data=(batches, batches),
    callbacks=[Metrics(accuracy), ProgressBar(interval=0)], seed=0,
)
learner.fit(2)
"""


def rows_of(text: str) -> list[list[str]]:
    """Return what each row of a terminal has shown, one after another: each part is written from the first column."""
    return [row.removesuffix("\r").split("\r") for row in text.removesuffix("\r\n").split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_in_a_real_terminal_a_bar_stays_in_its_row_and_only_the_lines_of_epochs_are_left(columns: int) -> None:
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", FIT], stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # as Linux says that nobody is there any more
            while part := os.read(ours, 4096):
                found += part
    os.close(ours)
    rows = rows_of(found.decode())
    assert max(len(part) for row in rows for part in row) < columns
    bars = [part for row in rows for part in row if "16/16" in part]
    assert {part.split(" epoch")[0] for part in bars} == {"TrainingPhase", "ValidationPhase"}
    assert all(("batch/s" in part) == (columns == 200) for part in bars)
    left = [reduce(lambda under, part: part + under[len(part) :], row, "").rstrip() for row in rows]
    lines = [
        re.fullmatch(r"(Training|Validation)Phase +epoch ([12])/2  loss [\d.]+ +accuracy [\d.]+", line) for line in left
    ]
    assert [line.groups() for line in lines if line] == [
        ("Training", "1"),
        ("Validation", "1"),
        ("Training", "2"),
        ("Validation", "2"),
    ]
    assert all(lines)
