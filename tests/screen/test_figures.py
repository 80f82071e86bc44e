from __future__ import annotations

import copy
import pickle
import sys
from io import BytesIO

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fluxloop import Metrics, Recorder, find_lr
from fluxloop.screen.figures import new_figure
from fluxloop.testing import toy_learner


def test_a_notebook_shows_what_is_plotted_as_a_picture() -> None:
    history = toy_learner(Recorder(), Metrics()).fit(2)
    for figure in (history.plot(), find_lr(toy_learner(), steps=10).plot()):
        assert isinstance(figure, Figure)
        assert imread(BytesIO(figure._repr_png_())).std() > 0


def test_a_figure_that_was_copied_or_kept_is_shown_with_what_is_on_it() -> None:
    figure = new_figure("plot()", figsize=(2, 1))
    for other in (copy.deepcopy(figure), pickle.loads(pickle.dumps(figure))):
        empty = other._repr_png_()
        other.subplots().plot([1, 2])
        assert other._repr_png_() != empty
        assert not figure.axes


def test_without_matplotlib_it_says_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: pip install 'torch-fluxloop\[plot\]'"):
        new_figure("plot()")
